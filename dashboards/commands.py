"""Commands to type, with the options by which they find the store of this dashboard."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from workbench.tracking.runs import default_store, public_url, sqlite_file

COMMAND = "workbench"


def store_options(uri: str) -> list[str]:
    """`--home` of an embedded store, `--tracking-uri` of any other, without its password; nothing for `./runs`."""
    if uri == default_store("runs")[0]:
        return []
    file = sqlite_file(uri)
    if file is not None and uri == default_store(file.parent)[0]:
        return ["--home", str(file.parent)]
    return ["--tracking-uri", public_url(uri)]


def of_trial(uri: str, study: pd.Series, trial: pd.Series) -> list[tuple[str, str]]:
    """What one can do with a trial: words and command.

    Args:
        study: its row of `frames.studies`.
        trial: its row of `frames.trials`.
    """
    name, number, options = study["study"], str(trial["number"]), store_options(uri)
    found = []
    if pd.notna(trial["objective"]) and pd.notna(trial["init_seed"]):
        again = ["reproduce", name, "--trial", number, *options]
        found.append(("Train it again and see whether it comes to the same", again))
    if trial["outcome"] == "complete":
        folder = str(Path("exported") / f"{name}-{number}")
        keep = ["export", name, "--trial", number, "--format", "peft", folder, *options]
        found.append(("Write its adapter to a folder, for peft or transformers", keep))
        version = ["register", name, "--trial", number, "--name", name, *options]
        found.append(("Make it a version of a registered model, which predicts and is served", version))
    if trial["outcome"] == "pruned" and study["file"]:
        go_on = ["sweep", study["file"], "--resume-trial", number, *options]
        found.append(("Take it up again and train it to its last step", go_on))
    return [(words, f"{COMMAND} {shlex.join(command)}") for words, command in found]
