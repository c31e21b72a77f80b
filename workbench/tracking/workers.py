"""Who works on a study, as Optuna's storage knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from .frames import optuna_storage

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

COLUMNS = ["worker", "trial", "step", "silent"]


def workers(storage_url: str, study: str) -> pd.DataFrame:
    """One row a trial that runs.

    Columns: worker (host and a number of its own; "" of a trial that nobody works on), trial (its number), step (of its
    last evaluation; 0 before the first), silent (seconds since its worker's last sign of life; NaN if none is known).

    Raises:
        StorageError: the storage does not exist, cannot be read, or holds no such study.
    """
    from optuna.trial import TrialState

    with optuna_storage(storage_url, study) as (storage, study_id):
        running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        silences = _silences(storage, [trial._trial_id for trial in running]) if running else {}
    rows = [
        (
            trial.user_attrs.get("worker", ""),
            trial.number,
            trial.user_attrs.get("progress", {}).get("step", 0),
            silences.get(trial._trial_id, float("nan")),
        )
        for trial in running
    ]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["worker", "trial"], ignore_index=True)


def seconds_spent(storage_url: str, study: str) -> float:
    """How long the sweeps of a study took so far, as noted with its last trial.

    Raises:
        StorageError: as `workers`.
    """
    with optuna_storage(storage_url, study) as (storage, study_id):
        return float(storage.get_study_user_attrs(study_id).get("seconds", 0.0))


def _silences(storage: BaseStorage, trial_ids: list[int]) -> dict[int, float]:
    """Seconds since the last heartbeat, by the clock of the database that wrote it."""
    from optuna.storages._rdb.models import TrialHeartbeatModel as Heartbeat
    from sqlalchemy import func, select

    engine: Any = getattr(getattr(storage, "_backend", storage), "engine", None)
    if engine is None:  # heartbeats are in databases only
        return {}
    query = select(Heartbeat.trial_id, Heartbeat.heartbeat, func.now()).where(Heartbeat.trial_id.in_(trial_ids))
    with engine.connect() as connection:
        beats = connection.execute(query).all()
    return {trial_id: (now.replace(tzinfo=None) - beat).total_seconds() for trial_id, beat, now in beats}
