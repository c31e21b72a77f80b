"""A store with a study in which trials end in every way, and with imported results."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.tracking.runs import REFERENCE, StudyRun, TrialRun, default_store, open_tracking

STUDY = """
study: rich
data: {path: assets/reviews}
methods:
  lora:
    r: {values: [4, 8]}
    lora_alpha: {values: [8, 16]}
    target_modules: {values: [[query], all-linear]}
    learning_rate: {min: 1e-4, max: 1e-1, distribution: log_uniform_values}
  head:
    learning_rate: {min: 1e-4, max: 1e-1, distribution: log_uniform_values}
"""
PARAMS = {"training.steps": 90, "training.eval_every": 30, "search.pruner": "median", "search.prune_by": "loss"}
SEARCHED = 24  # complete trials of lora
PRUNED, CRASHED, RUNNING, INFEASIBLE, BARE, TEXTS, HEAD = range(SEARCHED, SEARCHED + 7)
LABELS = ["bad", "good"]
EXAMPLES = 40


def make(home: Path) -> str:
    """Fill the store under a folder whose `mlflow.db` is there: studies `rich` and `theirs`. Its tracking URI."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    uri, root = default_store(home)
    tracking = open_tracking(uri, root)
    storage = f"sqlite:///{home / 'optuna.db'}"
    search = optuna.create_study(study_name="rich", storage=storage, direction="maximize")
    tags = {"metric": "accuracy", "goal": "maximize", "optuna": storage, "file": "studies/rich.yaml"}
    study = tracking.open_study("rich", PARAMS, {f"workbench.{k}": v for k, v in tags.items()}, {"study.yaml": STUDY})
    study.summary({"seconds/load": 0.5, "process_peak_growth_mib/load": 90.0})
    rng = np.random.default_rng(0)
    for number in range(SEARCHED):
        rate = float(10 ** rng.uniform(-4, -1))
        value = round(0.9 - 0.1 * (np.log10(rate) + 2.5) ** 2, 4)
        run = _trial(study, number, "lora", rate, r=int(rng.choice([4, 8])), alpha=int(rng.choice([8, 16])))
        report = search.ask()
        for step in (30, 60, 90):
            run.log(step, {"validation.accuracy": value * step / 90, "validation.loss": 2 - value * step / 90})
            report.report(-(2 - value * step / 90), step)
        run.summary({"adapter_bytes": 4096, "seconds/train": 2.0, "seconds/total": 3.0, "tensor_peak_mib/train": 80.0})
        run.summary(
            {"predicted_peak_mib/train": 81.0, "predicted_mib/weights": 60.0, "prediction_error_percent/train": 1.2}
        )
        _results(run, home / "made" / str(number), number)
        run.end("complete")
    run = _trial(study, PRUNED, "lora", 0.5)
    run.log(30, {"validation.accuracy": 0.2, "validation.loss": 1.8})
    run.end("pruned")
    _trial(study, CRASHED, "lora", 0.1).end("crashed", "it broke", 'Traceback\n  File "x.py"\nValueError: broken')
    run = _trial(study, RUNNING, "lora", 0.01)
    run.log(30, {"validation.accuracy": 0.3, "validation.loss": 1.5})
    run.flush()
    _trial(study, INFEASIBLE, "lora", 0.02, metrics=False).end("infeasible", "64 of 32 parameters")
    run = _trial(study, BARE, "lora", 0.03)
    run.log(90, {"validation.accuracy": 0.25})
    run.end("complete")
    run = _trial(study, TEXTS, "lora", 0.03)
    run.log(90, {"validation.accuracy": 0.1})
    run.artifacts(_folder(home / "made" / "broken", {"adapter_model.safetensors": b"no tensors"}), "adapter")
    _predictions(home / "made" / "texts" / "validation.parquet", [None] * EXAMPLES, [None] * EXAMPLES)
    run.artifacts(home / "made" / "texts", "predictions")
    run.end("complete")
    run = _trial(study, HEAD, "head", 0.01, r=None)
    run.log(90, {"validation.accuracy": 0.4})
    run.end("complete")
    study.end("FINISHED")
    theirs = tracking.open_study(
        "theirs", {}, {"workbench.metric": "accuracy", "workbench.goal": "maximize", REFERENCE: "there"}, {}
    )
    run = theirs.open_trial(0, {"lora.r": 8}, {"workbench.label": "lora", "workbench.method": "lora"})
    run.summary({"test.accuracy": 0.5})
    run.end("complete")
    theirs.end("FINISHED")
    return uri


def _trial(
    study: StudyRun, number: int, label: str, rate: float, r: int | None = 8, alpha: int = 8, metrics=True
) -> TrialRun:
    modules = "query" if number % 2 else "all-linear"
    params = {"learning_rate": rate} | ({"r": r, "lora_alpha": alpha, "target_modules": modules} if r else {})
    tags = {"label": label, "method": label, "role": "search", "init_seed": "0", "order_seed": "0"}
    run = study.open_trial(
        number, {f"{label}.{k}": v for k, v in params.items()}, {f"workbench.{k}": v for k, v in tags.items()}
    )
    if metrics:
        run.summary({"trainable_params": 1000 * (r or 1), "all_params": 90_000, "trainable_percent": 1.0})
    return run


def _results(run: TrialRun, folder: Path, seed: int) -> None:
    shapes = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.query.lora_{side}.weight": shape
        for layer in (0, 1)
        for side, shape in (("A", [8, 16]), ("B", [16, 8]))
    } | {"base_model.model.classifier.weight": [2, 16]}
    header = json.dumps(
        {key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for key, shape in shapes.items()}
    )
    content = struct.pack("<Q", len(header)) + header.encode()
    run.artifacts(_folder(folder / "adapter", {"adapter_model.safetensors": content}), "adapter")
    actual = [LABELS[row % 2] for row in range(EXAMPLES)]
    # wrong are as many as the trial's number, the last of them first
    predicted = [LABELS[(row + (row < seed)) % 2] for row in range(EXAMPLES)]
    _predictions(folder / "predictions" / "validation.parquet", actual, predicted)
    run.artifacts(folder / "predictions", "predictions")


def _folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _predictions(file: Path, actual: list, predicted: list) -> None:
    file.parent.mkdir(parents=True)
    loss = [0.1 * row for row in range(EXAMPLES)]
    pq.write_table(pa.table({"row": range(EXAMPLES), "actual": actual, "predicted": predicted, "loss": loss}), file)
