"""A study's trials as they lie in the store. MLflow's client takes 2 ms a run, so that of a database, whose tables it
reads a row at a time, they are read directly: ten thousand in two seconds."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, Engine, Select, column, create_engine, or_, select, table
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000  # runs a request
MANY = 500  # values of a query
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PARENT = "mlflow.parentRunId"

RUNS = table("runs", *map(column, ("run_uuid", "status", "start_time", "end_time", "lifecycle_stage")))
TAGS, PARAMS = (table(name, column("run_uuid"), column("key"), column("value")) for name in ("tags", "params"))
METRICS = table("latest_metrics", *map(column, ("run_uuid", "key", "value", "step", "is_nan")))


@dataclass(frozen=True)
class Stored:
    """A run. Times are milliseconds since the epoch, `steps` those of the metrics' last values."""

    run_id: str
    status: str
    start: int
    end: int | None
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    steps: dict[str, int]


def children(client: MlflowClient, parent: Run, since: int | None = None, also: Collection[str] = ()) -> list[Stored]:
    """The runs of a study's trials that were not deleted.

    Args:
        since: only those that run, ended at this time (ms) or later, or are among `also` (run ids).
    """
    if urlsplit(client.tracking_uri).scheme.partition("+")[0] in DATABASES:
        with _engine(client.tracking_uri).connect() as connection, _no_collection():
            return list(_from_tables(connection, parent.info.run_id, since, also))
    if since is None:
        return [_as_stored(run) for run in search(client, parent)]
    wanted = ("attributes.status = 'RUNNING'", f"attributes.end_time >= {since}")
    found = {run.info.run_id: run for condition in wanted for run in search(client, parent, condition)}
    others = [client.get_run(run_id) for run_id in also if run_id not in found]
    active = [run for run in others if run.info.lifecycle_stage == "active"]
    return [_as_stored(run) for run in [*found.values(), *active]]


def deleted(client: MlflowClient, parent: Run) -> set[str]:
    """The ids of a study's runs that were deleted, which MLflow sets aside."""
    from mlflow.entities import ViewType

    return {run.info.run_id for run in search(client, parent, view=ViewType.DELETED_ONLY)}


def search(client: MlflowClient, parent: Run, condition: str = "", view: int = 1) -> Iterator[Run]:
    """The runs below another one, page by page."""
    query = f"tags.`{PARENT}` = '{parent.info.run_id}'" + (f" and {condition}" if condition else "")
    token: str | None = None
    while True:
        found = client.search_runs([parent.info.experiment_id], query, view, PAGE, page_token=token)
        yield from found
        if not (token := found.token):
            return


def _as_stored(run: Run) -> Stored:
    info, data = run.info, run.data
    steps = {metric.key: metric.step for metric in data._metric_objs}  # nothing public but `to_proto` has them
    return Stored(info.run_id, info.status, info.start_time, info.end_time, data.tags, data.params, data.metrics, steps)


# -------------------------------------------------------------------- a database


@cache
def _engine(uri: str) -> Engine:
    return create_engine(uri, poolclass=NullPool)  # a pool would go on showing a file that was deleted and made anew


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would look again and again at what was just read, to no avail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _from_tables(connection: Connection, parent: str, since: int | None, also: Collection[str]) -> Iterator[Stored]:
    below = select(TAGS.c.run_uuid).where(TAGS.c.key == PARENT, TAGS.c.value == parent)
    wanted = select(*RUNS.c).where(RUNS.c.run_uuid.in_(below), RUNS.c.lifecycle_stage == "active")
    if since is not None:
        few = list(also)[:MANY]  # those that run are found without; so many do not end between two looks
        wanted = wanted.where(or_(RUNS.c.status == "RUNNING", RUNS.c.end_time >= since, RUNS.c.run_uuid.in_(few)))
    runs = connection.execute(wanted).all()
    ids = None if since is None else [run.run_uuid for run in runs]
    tags, params, metrics, steps = (defaultdict[str, dict[str, Any]](dict) for _ in range(4))
    for rows, into in ((TAGS, tags), (PARAMS, params)):
        for run_id, key, value in _all(connection, select(*rows.c), rows.c.run_uuid, below, ids):
            into[run_id][key] = value
    for run_id, key, value, step, is_nan in _all(connection, select(*METRICS.c), METRICS.c.run_uuid, below, ids):
        metrics[run_id][key] = float("nan") if is_nan else value
        steps[run_id][key] = step
    for run_id, status, start, end, _ in runs:
        yield Stored(run_id, status, start, end, tags[run_id], params[run_id], metrics[run_id], steps[run_id])


def _all(connection: Connection, query: Select, of: Any, below: Select, ids: list[str] | None) -> Iterator[Any]:
    """The rows of all runs, or of these."""
    if ids is None:
        yield from connection.execute(query.where(of.in_(below))).all()
        return
    for start in range(0, len(ids), MANY):
        yield from connection.execute(query.where(of.in_(ids[start : start + MANY]))).all()
