"""Read stores back as pandas tables. Nothing here writes, and a store that does not exist is never made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import StorageError

from .runs import REFERENCE, open_client, public_url, sqlite_file, storage_errors
from .stored import PAGE, Stored, children

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from optuna.storages import BaseStorage

STUDY_COLUMNS = ["study", "status", "metric", "goal", "optuna", "file", "reference", "split", "started", "ended"]
STUDY_COLUMNS += ["run_id"]
STUDY_TAGS = ("study", "metric", "goal", "optuna", "file", "reference")
COUNTS = ["trainable_params", "all_params", "adapter_bytes"]  # whole numbers, which MLflow keeps as floats
TRIAL_COLUMNS = ["number", "label", "method", "outcome", "objective", *COUNTS, "trainable_percent"]
TRIAL_COLUMNS += ["searched", "message", "resumes", "role", "finalist_of", "init_seed", "order_seed", "config"]
TRIAL_COLUMNS += ["steps", "started", "ended", "run_id"]
WHOLE = [*COUNTS, "finalist_of", "init_seed", "order_seed", "steps"]


def studies(tracking_uri: str) -> pd.DataFrame:
    """One row a study, newest first.

    Columns: study, status (MLflow's: RUNNING, FINISHED, KILLED, FAILED), metric, goal, optuna (storage URL), file,
    reference (of imported results: where they are from), split (that the objective is measured on: validation, of
    imported results test), started and ended (UTC), run_id. Text that was not recorded is "".

    Raises:
        StorageError: the store does not exist or cannot be read.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = _study_runs(client, experiments)
    rows = [
        {name: run.data.tags.get(f"workbench.{name}", "") for name in STUDY_TAGS}
        | {"split": _split(run), "status": run.info.status, "run_id": run.info.run_id}
        | {"started": run.info.start_time, "ended": run.info.end_time if run.info.status != "RUNNING" else None}
        for run in runs
    ]
    frame = _with_times(pd.DataFrame(rows, columns=STUDY_COLUMNS))
    return frame.sort_values("started", ascending=False, ignore_index=True)


def trials(tracking_uri: str, study: str) -> pd.DataFrame:
    """One row a trial, by number.

    Columns: those of `TRIAL_COLUMNS`, always; `objective` is the study's metric at the last evaluation, of imported
    results the one published, which is of the test split. `outcome` is "running" until the trial has ended; `resumes`
    is the number of the pruned trial that it takes up again, or "". `role` is search, default (a method's defaults) or
    finalist, which repeats the configuration of the trial `finalist_of` with other seeds; `config` is a hash of label
    and hyperparameters; `steps` those up to the last evaluation; `started` and `ended` are UTC. Then every metric
    under its own name, with its last value (`seconds/train`, `validation.accuracy`), and the hyperparameters as
    `hp.<field>`, numeric where all values are.

    Raises:
        StorageError: the store cannot be read, or holds no such study.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        parent = study_run(client, tracking_uri, study)
        runs = children(client, parent)
    return table(parent, [trial_row(parent, run) for run in runs if is_trial(run)])


def table(parent: Run, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table of `trials` from its rows.

    Args:
        parent: the study's run.
    """
    rows = sorted(rows, key=lambda row: row["number"])  # a database tells them in any order, and they that of columns
    frame = pd.DataFrame(rows)
    frame["objective"] = frame.get(f"{_split(parent)}.{parent.data.tags.get('workbench.metric')}")
    searched = " ".join(dict.fromkeys(row["searched"] for row in rows)).split()
    fields = dict.fromkeys(name for name in (f"hp.{field}" for field in searched) if name in frame)
    known = dict.fromkeys([*TRIAL_COLUMNS, *fields])  # hyperparameters as the study's methods have them
    frame = frame.reindex(columns=[*known, *(name for name in frame.columns if name not in known)])
    frame = _with_times(frame).astype({"number": "int64", "objective": "float64"} | dict.fromkeys(WHOLE, "Int64"))
    for column in frame.columns[frame.columns.str.startswith("hp.")]:
        frame[column] = _numeric(frame[column])
    return frame


def ranked(trials: pd.DataFrame, goal: str) -> pd.DataFrame:
    """The table of `trials`: complete ones by objective, then the others by objective, then those that have none.
    Finalists, which repeat others, come last.

    A column `rank` counts the complete ones from 1; it is 0 for the others.
    """
    counts = (trials["outcome"] == "complete") & (trials["role"] != "finalist")
    keys = trials.assign(repeats=trials["role"] == "finalist", nothing=trials["objective"].isna(), counts=counts)
    by, ascending = ["repeats", "nothing", "counts", "objective"], [True, True, False, goal == "minimize"]
    rows = trials.loc[keys.sort_values(by, ascending=ascending).index]
    own = counts[rows.index]
    return rows.assign(rank=own.cumsum().where(own, 0)).reset_index(drop=True)


def history(tracking_uri: str, run_id: str) -> pd.DataFrame:
    """Every logged value of a run: columns step, metric, value, in this order of sorting after metric.

    Raises:
        StorageError: the store cannot be read, or holds no such run.
    """
    client = open_client(tracking_uri)
    with storage_errors(tracking_uri):
        names = client.get_run(run_id).data.metrics
        rows = [(m.step, name, m.value) for name in names for m in client.get_metric_history(run_id, name)]
    frame = pd.DataFrame(rows, columns=["step", "metric", "value"])
    return frame.sort_values(["metric", "step"], ignore_index=True)


def optuna_state(storage_url: str, study: str) -> dict[str, int]:
    """How many trials of an Optuna study are running, waiting, complete, pruned and failed ("fail").

    Raises:
        StorageError: the storage does not exist, cannot be read, or holds no such study.
    """
    from optuna.trial import TrialState

    with optuna_storage(storage_url, study) as (storage, study_id):
        found = storage.get_all_trials(study_id, deepcopy=False)
    counts = dict.fromkeys((state.name.lower() for state in TrialState), 0)
    for trial in found:
        counts[trial.state.name.lower()] += 1
    return counts


@contextmanager
def optuna_storage(storage_url: str, study: str) -> Iterator[tuple[BaseStorage, int]]:
    """Optuna's storage, and its id of a study.

    Raises:
        StorageError: the storage does not exist, cannot be read, or holds no such study.
    """
    from sqlalchemy.exc import SQLAlchemyError

    file = sqlite_file(storage_url)
    if file is not None and not file.exists():
        raise StorageError(f"There is no {file}; Optuna's state cannot be shown.")
    try:
        storage = _optuna_storage(storage_url, file.stat().st_ino if file else 0)
        yield storage, storage.get_study_id_from_name(study)
    except KeyError as error:
        raise StorageError(f"{public_url(storage_url)} holds no study {study!r}.") from error
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise StorageError(f"Optuna's storage {public_url(storage_url)} cannot be read: {reason}") from error


@cache
def _optuna_storage(url: str, inode: int) -> BaseStorage:
    """Kept open, so that a refresh reads only the trials that had not ended at the last one.

    The inode tells a file that was deleted and made anew from the first one.
    """
    from optuna.storages import get_storage

    return get_storage(url)


def _study_runs(client: MlflowClient, experiments: list[str]) -> list[Run]:
    found: list[Run] = []
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, "tags.`workbench.kind` = 'study'", max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return found


def study_run(client: MlflowClient, uri: str, study: str) -> Run:
    """The run of a study.

    Raises:
        StorageError: there is none.
    """
    experiment = client.get_experiment_by_name(study)
    query = "tags.`workbench.kind` = 'study'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1) if experiment else []
    if not found:
        raise StorageError(f"{public_url(uri)} holds no study {study!r}.")
    return found[0]


def _split(study: Run) -> str:
    """Which split the objective of a study is measured on."""
    return "test" if REFERENCE in study.data.tags else "validation"


def is_trial(run: Stored) -> bool:
    """Whether a run below a study's is one of its trials."""
    return "workbench.trial" in run.tags


def trial_row(parent: Run, run: Stored) -> dict[str, Any]:
    """A row of `trials`, but for the objective."""
    tags = run.tags
    label = tags.get("workbench.label", "")
    running = run.status == "RUNNING"
    return {
        "number": int(tags["workbench.trial"]),
        "label": label,
        "method": tags.get("workbench.method", ""),
        "searched": tags.get("workbench.searched", ""),
        "outcome": "running" if running else tags.get("workbench.outcome", run.status.lower()),
        "message": tags.get("workbench.message", ""),
        "resumes": tags.get("workbench.resumes", ""),
        "role": tags.get("workbench.role", "search"),
        "config": tags.get("workbench.config", ""),
        **{name: whole(tags.get(f"workbench.{name}")) for name in ("finalist_of", "init_seed", "order_seed")},
        "steps": run.steps.get(f"validation.{parent.data.tags.get('workbench.metric')}"),
        "started": run.start,
        "ended": None if running else run.end,
        "run_id": run.run_id,
        **run.metrics,
        **{f"hp.{key.removeprefix(f'{label}.')}": value for key, value in run.params.items()},
    }


def whole(text: str | None) -> int | None:
    """A tag that is a whole number, if it is there."""
    return None if text is None else int(text)


def _with_times(frame: pd.DataFrame) -> pd.DataFrame:
    times = [name for name in ("started", "ended") if name in frame]
    return frame.assign(**{name: pd.to_datetime(frame[name], unit="ms", utc=True) for name in times})


def _numeric(column: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column
