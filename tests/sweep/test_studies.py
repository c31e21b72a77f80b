"""Every shipped study is right, and each of its methods trains and is measured on the shipped model and data."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from workbench.sweep.display import Display
from workbench.sweep.run import sweep
from workbench.sweep.spec import load_study
from workbench.sweep.stores import Stores
from workbench.tracking import frames
from workbench.tracking.runs import default_store

FILES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
ENTRIES = [(file, label) for file in FILES for label in YAML(typ="safe").load(file)["methods"]]


def shortened(file: Path, label: str, folder: Path) -> Path:
    """The study with this one method, one trial of two steps and a few rows."""
    study = YAML(typ="safe").load(file)
    for section in ("model", "data"):
        study[section]["path"] = str(file.parent / study[section]["path"])
    study["methods"] = {label: study["methods"][label]}
    for key in ("tinit", "tfinal"):  # AdaLoRA's, in steps
        (study["methods"][label] or {}).pop(key, None)
    study["data"]["max_rows"] = {"train": 400, "validation": 8, "test": 8}
    study["training"] |= {"steps": 2, "eval_every": 2, "batch_size": 4, "device": "cpu"}
    for section in ("constraints", "finalists"):  # whatever is drawn shall train, once
        study.pop(section, None)
    study |= {"budget": {"trials": 1}, "search": {"sampler": "random", "pruner": "none"}}
    short = folder / file.name
    with short.open("w") as stream:
        YAML().dump(study, stream)
    return short


def test_there_are_studies_for_three_tasks():
    assert {load_study(file).model.task for file in FILES} == {"SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"}


@pytest.mark.parametrize(("file", "label"), ENTRIES, ids=[f"{file.stem}-{label}" for file, label in ENTRIES])
def test_a_shipped_study_runs(file: Path, label: str, tmp_path: Path):
    study = load_study(shortened(file, label, tmp_path))
    home = tmp_path / "home"
    tracking, artifacts = default_store(home)
    stores = Stores(home, f"sqlite:///{home / 'optuna.db'}", tracking, artifacts, heartbeat=15)
    sweep(study, stores, Display(study, Console(quiet=True)))
    (trial,) = frames.trials(tracking, study.name).to_dict("records")
    assert (trial["outcome"], trial["label"]) == ("complete", label), trial["message"]
    assert (trial["trainable_params"] > 0) == (label != "zero_shot")
    assert trial["adapter_bytes"] > 0
    assert trial[f"validation.{study.objective.metric}"] == trial["objective"] >= 0
