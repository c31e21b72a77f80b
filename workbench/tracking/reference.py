"""peft's published results as a study of their own, to stand beside one's own in every table.

docs/reference-results.md says what is imported and what these numbers are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench.errors import DataError

from .frames import studies, study_run
from .peft_results import GOALS, TRAINING, Result, read
from .runs import REFERENCE, StudyRun, Tracking, storage_errors

SOURCE = "peft method_comparison"
MANY = 50_000  # the most runs that MLflow answers at once


@dataclass(frozen=True)
class Imported:
    """What an import found.

    Attributes:
        outcomes: how many of the results ended how.
        known: how many of them the study held already.
    """

    outcomes: Counter[str]
    known: int


def import_results(tracking: Tracking, name: str, paths: Sequence[Path]) -> Imported:
    """Write result files to one study, a trial each. What the study holds already is left as it is.

    Args:
        name: the study, new or of an earlier import.
        paths: folders, of which every `.json` file is read, and files.

    Raises:
        DataError: there are no files, some are no results, or they do not belong together; nothing is written.
        StorageError: the store cannot be used, or the name is that of a study of one's own.
    """
    results = read(_files(paths))
    metric, model = _in_common(results.values())
    _check_study(tracking, name, metric, model)
    tags = {
        REFERENCE: _source(next(iter(results))),
        "workbench.metric": metric,
        "workbench.goal": GOALS[metric],
        "workbench.model": model,
    }
    study = tracking.open_study(name, {"model": model}, tags, {})
    ended: Literal["FINISHED", "KILLED"] = "KILLED"
    try:
        numbers, known = _held(tracking, study)
        found = {result.key: file for file, result in results.items()}
        for key in sorted(found.keys() - known, key=lambda key: (results[found[key]].run_info.created_at, key)):
            number = numbers.setdefault(key, max(numbers.values(), default=-1) + 1)
            _write(tracking, study, number, results[found[key]], found[key])
        ended = "FINISHED"
    finally:
        study.end(ended)
    return Imported(Counter(results[file].outcome for file in found.values()), len(found.keys() & known))


def _files(paths: Iterable[Path]) -> list[Path]:
    """The files, and those of the folders, by name."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} holds no .json file; name a folder such as method_comparison/MetaMathQA/results.")
        files += found
    return files


def _in_common(results: Collection[Result]) -> tuple[str, str]:
    """The metric and the base model, of which a study has one each."""
    metrics = {metric for result in results for metric in result.tested() & GOALS.keys()}
    models = {result.model for result in results}
    if not metrics:
        raise DataError("No result has a test metric; add one of a run that was a success.")
    for what, found in (("metric", metrics), ("base model", models)):
        if len(found) > 1:
            several = ", ".join(sorted(found))
            raise DataError(f"The results have more than one {what} ({several}); import each into its own study.")
    return metrics.pop(), models.pop()


def _check_study(tracking: Tracking, name: str, metric: str, model: str) -> None:
    """Refuse results that do not belong to the reference study of this name."""
    if name not in set(studies(tracking.uri)["study"]):
        return
    tags = study_run(tracking.client, tracking.uri, name).data.tags
    for what, value in (("metric", metric), ("model", model)):
        before = tags.get(f"workbench.{what}")
        if REFERENCE in tags and before != value:
            raise DataError(
                f"The study {name!r} is of {what} {before}, the results are of {value}; take another --name."
            )


def _source(file: Path) -> str:
    """Where a result is from: the suite too, where the folders have their names."""
    parts = file.resolve().parts
    suite = parts[parts.index("method_comparison") + 1] if "method_comparison" in parts[:-2] else ""
    return f"{SOURCE}, {suite}" if suite else SOURCE


def _held(tracking: Tracking, study: StudyRun) -> tuple[dict[str, int], set[str]]:
    """The trials' numbers by result, and the results that are there completely."""
    with storage_errors(tracking.uri):
        experiment = study_run(tracking.client, tracking.uri, study.name).info.experiment_id
        query = f"tags.`mlflow.parentRunId` = '{study.run_id}'"
        runs = tracking.client.search_runs([experiment], query, max_results=MANY)
    numbers = {run.data.tags["workbench.result"]: int(run.data.tags["workbench.trial"]) for run in runs}
    return numbers, {run.data.tags["workbench.result"] for run in runs if run.info.status != "RUNNING"}


def _write(tracking: Tracking, study: StudyRun, number: int, result: Result, file: Path) -> None:
    label, values = result.run_info.experiment_name, result.hyperparameters()
    config = json.dumps([label, result.method, values], sort_keys=True)
    searched = [name for name, value in values.items() if type(value) in (int, float) and name not in TRAINING.values()]
    tags = {
        "workbench.label": label,
        "workbench.method": result.method,
        "workbench.seed": str(result.run_info.train_config.seed),
        "workbench.searched": " ".join(searched),
        "workbench.config": hashlib.sha256(config.encode()).hexdigest()[:16],
        "workbench.result": result.key,
    }
    # without the label before each name: every experiment has one of its own, and MLflow would make columns of all
    run = study.open_trial(number, values, tags)
    run.log(0, result.summary())
    for step, metrics in result.history().items():
        run.log(step, metrics)
    with storage_errors(tracking.uri):
        tracking.client.log_artifact(run.run_id, str(file))
    run.end(result.outcome, result.message)
