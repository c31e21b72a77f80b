"""`workbench export`: a trial's adapter, or the base with it merged in, for those who have no workbench."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from workbench.adapters import PeftModel
from workbench.errors import MergeError, StorageError
from workbench.tracking import frames
from workbench.tracking.recorded import configuration, recorded_study
from workbench.tracking.runs import Run, open_client
from workbench.training.adapted import ADAPTER
from workbench.training.base import MODEL_CLASSES, Base, load_base, quiet
from workbench.training.data import read_data

from .match import restored
from .register import chosen
from .reproduce import check_same
from .spec import Study, load_study
from .stores import Stores

Format = Literal["peft", "merged"]
BASE = "base"  # folder of a base whose weights were drawn, as an artifact of its study


def export(
    name: str, stores: Stores, folder: Path, format: Format, say: Callable[[str], None], trial: int | None = None
) -> str:
    """Write a folder that peft's `PeftModel.from_pretrained` loads, or transformers' `from_pretrained`.

    Args:
        folder: is made; it may be there if it is empty.
        format: peft: the adapter with its tokenizer; merged: the whole model with its tokenizer.
        say: hears what is being done.
        trial: its number; None takes the best one, as `register` does.

    Returns:
        lines of Python that load it.

    Raises:
        StorageError: the study or trial is not there or not complete, or the folder holds files.
        MergeError: the trial's method cannot be merged.
        ModelError, DataError: the base model or the data cannot be loaded any more.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} is there already; name a new folder.")
    about = recorded_study(stores.tracking, name)
    study = load_study(about.file, about.text)
    row = chosen(frames.trials(stores.tracking, name), study, stores.tracking, trial, None)
    client = open_client(stores.tracking)
    config = restored(configuration(client, row["run_id"]), study)
    say("loading the base model ...")
    raw = read_data(study.data, study.model.task)
    whole = load_base(study.model, raw.labels or None, study.training.seed, "cpu")
    check_same(about, whole.fingerprint, raw.fingerprint)
    say(f"writing trial {row['number']} to {folder} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, whole.vocabulary(config.new_tokens) as base:
        Run(client, row["run_id"]).download(ADAPTER, Path(place))
        made = Path(place) / ADAPTER
        if format == "merged":
            made = merged(base, made, Path(place) / "model")
        elif study.model.weights == "random":
            Run(client, about.run_id).download(BASE, made)
        with quiet():
            base.tokenizer.save_pretrained(made)
        made.rename(folder)
        return loading(study, base, folder, format, bool(config.new_tokens))


def merged(base: Base, adapter: Path, folder: Path) -> Path:
    """The base with an adapter merged into its weights, saved."""
    with torch.random.fork_rng(devices=[]), quiet():
        model: Any = PeftModel.from_pretrained(base.model, adapter)
        try:
            model.merge_and_unload().save_pretrained(folder)
        except MergeError as error:
            raise MergeError(f"{error} `--format peft` writes the adapter by itself.") from error
    return folder


def loading(study: Study, base: Base, folder: Path, format: Format, grown: bool) -> str:
    """What to write in order to load it."""
    cls, path = MODEL_CLASSES[base.task].__name__, json.dumps(str(folder))
    if format == "merged":
        return (
            f"from transformers import {cls}, AutoTokenizer\n\n"
            f"model = {cls}.from_pretrained({path})\ntokenizer = AutoTokenizer.from_pretrained({path})"
        )
    source = str(folder / BASE) if study.model.weights == "random" else study.model.path
    options = [json.dumps(source)]
    if study.model.revision:
        options.append(f"revision={study.model.revision!r}")
    if study.model.overrides:
        options.append(f"**{study.model.overrides!r}")
    if base.task in ("SEQ_CLS", "TOKEN_CLS"):
        options.append(f"id2label={dict(enumerate(base.labels))!r}")
    more = "base.resize_token_embeddings(len(tokenizer))\n" if grown else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {cls}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({path})\nbase = {cls}.from_pretrained({', '.join(options)})\n"
        f"{more}model = PeftModel.from_pretrained(base, {path})"
    )
