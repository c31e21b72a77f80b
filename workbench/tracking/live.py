"""The trials of a study that is looked at again and again: only what may have changed is read again."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from . import frames
from .runs import open_client, storage_errors
from .stored import Stored, children, deleted

if TYPE_CHECKING:
    from mlflow.entities import Run

SLACK = 60_000  # ms by which the clocks of workers may differ


@dataclass(frozen=True)
class Seen:
    """A study at one moment.

    Attributes:
        trials: as `frames.trials`.
        tags: of the study's run.
        version: of what has ended: the same number, the same ended trials.
    """

    trials: pd.DataFrame
    tags: dict[str, str]
    version: int

    @cached_property
    def ranked(self) -> pd.DataFrame:
        """The trials, best first."""
        return frames.ranked(self.trials, self.tags.get("workbench.goal", ""))


class Snapshot:
    """The trials of one study, kept from one look to the next; several threads may look.

    Everything is read when the study's run changed: that is when a sweep begins or ends, and when `workbench promote`
    or somebody else writes to it. In between only trials that run, that ran at the last look, and that ended lately.
    """

    def __init__(self, uri: str, study: str):
        self._uri, self._study = uri, study
        self._lock = threading.Lock()
        self._key: object = None
        self._rows: dict[str, dict[str, Any]] = {}
        self._running: set[str] = set()
        self._deleted: set[str] = set()
        self._newest = 0
        self._seen: Seen | None = None
        self._version = 0

    @property
    def read(self) -> bool:
        """Whether somebody has looked before, so that the next look is a quick one."""
        return self._seen is not None

    def look(self) -> Seen:
        """The study as it is now.

        Raises:
            StorageError: the store cannot be read, or holds no such study.
        """
        with self._lock:
            client = open_client(self._uri)
            with storage_errors(self._uri):
                parent = frames.study_run(client, self._uri, self._study)
                info, gone = parent.info, deleted(client, parent)
                key = (info.run_id, info.status, info.end_time, parent.data.tags)
                if key != self._key or self._deleted - gone:  # ... a run that was deleted is back
                    found = children(client, parent)
                    dropped = self._rows.keys() - {run.run_id for run in found}
                else:
                    found = children(client, parent, self._newest - SLACK, self._running)
                    dropped = self._rows.keys() & gone
            self._key, self._deleted = key, gone
            return self._take(parent, found, dropped)

    def _take(self, parent: Run, found: list[Stored], dropped: set[str]) -> Seen:
        """The study with these runs, new or read again, and without those."""
        ended_before = {run_id for run_id in self._rows if run_id not in self._running}
        changed, of_ended = bool(dropped), bool(dropped & ended_before)
        for run_id in dropped:
            del self._rows[run_id]
        for run in found:
            if not frames.is_trial(run):
                continue
            row = frames.trial_row(parent, run)
            if row != self._rows.get(run.run_id):
                self._rows[run.run_id] = row
                changed = True
                of_ended |= run.run_id in ended_before or run.status != "RUNNING"
            self._newest = max(self._newest, run.end or 0)
        self._running = {run_id for run_id, row in self._rows.items() if row["outcome"] == "running"}
        self._version += of_ended
        tags = parent.data.tags
        if changed or self._seen is None or tags != self._seen.tags:
            self._seen = Seen(frames.table(parent, list(self._rows.values())), tags, self._version)
        return self._seen
