"""Studies and trials as MLflow holds them, with all that it takes to go on from there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import StorageError

from .frames import history, study_run, trials, whole
from .runs import REFERENCE, open_client, storage_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAMS = "workbench.params"  # tag: Optuna's parameters of a trial, JSON
SIZE = "workbench.size"  # tag: what was solved for, so that a trial has as many parameters as others
METRICS = "validation."


@dataclass(frozen=True)
class RecordedStudy:
    """A study that was run.

    Attributes:
        run_id: of its run.
        file: the study file's path, as it was.
        text: what it held.
        fingerprints: of the model and the data.
        tags: of its run.
    """

    run_id: str
    file: str
    text: str
    fingerprints: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class Configuration:
    """The hyperparameters of a trial.

    Attributes:
        params: Optuna's parameters.
        size: what was solved for (`match`), if anything was.
    """

    params: dict[str, Any]
    size: int | None


@dataclass(frozen=True)
class Recorded:
    """A trial that was recorded.

    Attributes:
        seeds: of its first values, and of the order of its data.
        step: of its last evaluation.
        metrics: of the validation split at that step.
    """

    study: RecordedStudy
    configuration: Configuration
    seeds: tuple[int, int]
    step: int
    metrics: dict[str, float]


def recorded_study(tracking_uri: str, name: str) -> RecordedStudy:
    """Look a study up.

    Raises:
        StorageError: the store cannot be read, or holds no such study, or one that was imported.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        run = study_run(client, tracking_uri, name)
        if REFERENCE in run.data.tags:
            raise StorageError(f"The study {name!r} holds imported results; there is nothing to train again.")
        artifact = client.download_artifacts(run.info.run_id, "study.yaml")
    with open(artifact) as file:
        text = file.read()
    fingerprints = {kind: run.data.params[f"{kind}.fingerprint"] for kind in ("model", "data")}
    return RecordedStudy(run.info.run_id, run.data.tags["workbench.file"], text, fingerprints, run.data.tags)


def configuration(client: MlflowClient, run_id: str) -> Configuration:
    """The hyperparameters of a trial's run.

    Raises:
        StorageError: they were not recorded.
    """
    with storage_errors(client.tracking_uri):
        tags = client.get_run(run_id).data.tags
    if PARAMS not in tags or "workbench.init_seed" not in tags:
        number = tags.get("workbench.trial")
        raise StorageError(f"Trial {number} was recorded without its parameters or seeds, by an earlier workbench.")
    return Configuration(json.loads(tags[PARAMS]), whole(tags.get(SIZE)))


def recorded(tracking_uri: str, study: str, number: int) -> Recorded:
    """Look a trial up.

    Raises:
        StorageError: the store cannot be read, or holds no such trial, or one that was never measured or was
            imported.
    """
    table = trials(tracking_uri, study).set_index("number")
    if number not in table.index:
        raise StorageError(f"The study {study!r} has no trial {number}; it has {len(table)}.")
    row = table.loc[number]
    points = history(tracking_uri, row["run_id"])
    points = points[points["metric"].str.startswith(METRICS)]
    if points.empty:
        raise StorageError(f"Trial {number} of {study!r} was never measured: it is {row['outcome']}. {row['message']}")
    last = points[points["step"] == points["step"].max()]
    return Recorded(
        study=recorded_study(tracking_uri, study),
        configuration=configuration(open_client(tracking_uri), row["run_id"]),
        seeds=(int(row["init_seed"]), int(row["order_seed"])),
        step=int(points["step"].max()),
        metrics=dict(zip(last["metric"].str.removeprefix(METRICS), last["value"], strict=True)),
    )
