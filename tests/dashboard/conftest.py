"""A store with two studies, filled as a sweep fills it."""

from __future__ import annotations

import shutil

import optuna
import pytest

from workbench.tracking.runs import Outcome, default_store, open_tracking

TRIALS: list[tuple[str, Outcome, int, float | None, dict]] = [
    ("lora", "complete", 24_000, 0.71, {"r": 8, "learning_rate": 1e-3}),
    ("ia3", "complete", 4_600, 0.77, {"learning_rate": 1e-2}),
    ("lora", "pruned", 48_000, 0.79, {"r": 16, "learning_rate": 1e-4}),
    ("lora", "diverged", 12_000, None, {"r": 4, "learning_rate": 1.0}),
]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a store without studies."""
    uri, root = default_store(tmp_path_factory.mktemp("empty"))
    open_tracking(uri, root)
    return uri


@pytest.fixture(scope="session")
def store(empty_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of the filled store; the study "done" has four trials, "young", the newer one, has none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    home = tmp_path_factory.mktemp("home")
    storage = f"sqlite:///{home / 'optuna.db'}"
    search = optuna.create_study(study_name="done", storage=storage)
    shutil.copy(empty_store.removeprefix("sqlite:///"), home / "mlflow.db")  # quicker than a second migration
    uri, root = default_store(home)
    tracking = open_tracking(uri, root)
    tags = {"workbench.metric": "accuracy", "workbench.goal": "maximize", "workbench.optuna": storage}
    study = tracking.open_study("done", {}, tags, {})
    for number, (label, outcome, trainable, accuracy, params) in enumerate(TRIALS):
        tags = {"workbench.label": label, "workbench.method": label}
        trial = study.open_trial(number, {f"{label}.{k}": v for k, v in params.items()}, tags)
        trial.summary({"trainable_params": trainable, "all_params": 8_400_000, "seconds/train": 3.0})
        if accuracy is not None:
            trial.log(100, {"validation.accuracy": accuracy, "validation.loss": 1 - accuracy})
        trial.end(outcome)
    search.enqueue_trial({})
    study.end("FINISHED")
    tracking.open_study("young", {}, {"workbench.metric": "f1", "workbench.goal": "maximize"}, {}).end("FINISHED")
    return uri
