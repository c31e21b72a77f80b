"""One trial as MLflow holds it, with all that it takes to train it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from workbench.errors import StorageError

from .frames import history, study_run, trials
from .runs import open_client, storage_errors

PARAMS = "workbench.params"  # tag: Optuna's parameters of a trial, JSON
METRICS = "validation."


@dataclass(frozen=True)
class Recorded:
    """A trial that was recorded.

    Attributes:
        file: the study file's path, as it was.
        text: what it held.
        fingerprints: of the model and the data.
        params: Optuna's parameters.
        order: the number of the trial whose order of the data it has.
        step: of its last evaluation.
        metrics: of the validation split at that step.
    """

    file: str
    text: str
    fingerprints: dict[str, str]
    params: dict[str, Any]
    order: int
    step: int
    metrics: dict[str, float]


def recorded(tracking_uri: str, study: str, number: int) -> Recorded:
    """Look a trial up.

    Raises:
        StorageError: the store cannot be read, or holds no such trial, or one that was never measured.
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
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        parent = study_run(client, tracking_uri, study)
        tags = client.get_run(row["run_id"]).data.tags
        artifact = client.download_artifacts(parent.info.run_id, "study.yaml")
    if PARAMS not in tags:
        raise StorageError(f"Trial {number} of {study!r} was recorded without its parameters, by an earlier workbench.")
    with open(artifact) as file:
        text = file.read()
    return Recorded(
        file=parent.data.tags["workbench.file"],
        text=text,
        fingerprints={kind: parent.data.params[f"{kind}.fingerprint"] for kind in ("model", "data")},
        params=json.loads(tags[PARAMS]),
        order=int(row["resumes"] or number),
        step=int(points["step"].max()),
        metrics=dict(zip(last["metric"].str.removeprefix(METRICS), last["value"], strict=True)),
    )
