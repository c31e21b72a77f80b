"""The workers of a study: which trial is whose, and which of them are alive."""

from __future__ import annotations

import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import filelock
import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from workbench.errors import StudyFails

from .budget import PROGRESS
from .interrupt import let_go
from .storage import ConnectionLost, Storage, locks

WORKER = "worker"  # attribute of a trial: who works on it; "" or none: nobody
TAKEN = "taken"  # attribute of a trial that others began: {"step": where it was, "times": how often it was taken there}
ALONE = "alone"  # attribute of a trial with which workers died: who trained it alone
SUSPECT = 2  # workers that died at the same step of a trial: it then trains alone

T = TypeVar("T")


class Fleet:
    """This process as one of the workers of a study.

    A running trial belongs to one worker. It is left if that worker died: where both have the same home, its lock is
    free then, at once; elsewhere no sign of life comes from the trial any more.

    Args:
        home: the folder of the study's files. Workers that share it know of each other's end at once.
        shared: whether others are expected to join.

    Attributes:
        name: of this worker: host and a number of its own.
    """

    def __init__(self, study: optuna.Study, storage: Storage, home: Path, shared: bool):
        self._study, self._storage, self.shared = study, storage, shared
        self.name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._locks = locks(home, study.study_name)
        self._dead: set[str] = set()
        self._trials: set[int] = set()  # Optuna's ids of those that are this worker's

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of the workers, and give signs of life of one's trials."""
        self._locks.mkdir(parents=True, exist_ok=True)
        left = threading.Event()
        heart = threading.Thread(target=self._beat, args=(left,), daemon=True)
        with filelock.FileLock(self._locks / f"{self.name}.lock"):
            heart.start()
            try:
                yield
            except (KeyboardInterrupt, StudyFails) as error:
                let_go(error)
                self._leave()
                raise
            finally:
                left.set()
                heart.join()

    def in_turn(self, do: Callable[[], T]) -> T:
        """Do something while no other worker of the study does; see `Storage.in_turn`. What is taken in a try that is
        cut off nobody has."""
        held = frozenset(self._trials)

        def anew() -> T:
            self._trials = set(held)
            return do()

        return self._storage.in_turn(self._study.study_name, anew)

    # ---------------------------------------------------------------- trials

    def left(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The running ones that nobody works on. To be asked, and acted on, in turn."""
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        owners = {owner for trial in running if (owner := trial.user_attrs.get(WORKER))} - {self.name}
        known = owners and self._storage.steady
        silent = set(self._storage._get_stale_trial_ids(self._study._study_id)) if known else set()
        return [trial for trial in running if self._is_left(trial, silent)]

    def claim(self, trial: optuna.Trial) -> None:
        """Take a trial. Of one whose worker died it is noted how often that happened at the same step; of one that is
        suspected only if it was training, since others may be to blame."""
        before, times = trial.user_attrs.get(WORKER), deaths(trial)
        if before not in (None, "", self.name) and (times < SUSPECT or trial.user_attrs.get(ALONE) == before):
            trial.set_user_attr(TAKEN, {"step": step(trial), "times": times + 1})
        self._trials.add(trial._trial_id)  # before it is written: what a signal cuts off here is left, too
        self._storage.record_heartbeat(trial._trial_id)  # first, as who never gave a sign is never missed
        trial.set_user_attr(WORKER, self.name)

    def alone(self, trial: optuna.Trial) -> None:
        """Note that a trial trains now, by itself."""
        trial.set_user_attr(ALONE, self.name)

    def forget(self, trial: optuna.Trial) -> None:
        """No longer give signs of life of a trial: it has ended, or is somebody else's."""
        self._trials.discard(trial._trial_id)

    def owns(self, trial: optuna.Trial) -> bool:
        """Whether the trial runs and is still this worker's: others took it if this process stood still for long."""
        return self._owns(trial._trial_id)

    def others(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether somebody else works on some of these."""
        running = {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        own = {trial.number for trial in trials if trial.user_attrs.get(WORKER) == self.name}
        return bool(running - own - {trial.number for trial in self.left(trials)})

    def tidy(self) -> None:
        """Delete what workers left behind, when the study is over."""
        shutil.rmtree(self._locks, ignore_errors=True)

    def _owns(self, trial_id: int) -> bool:
        stored = self._storage.get_trial(trial_id)
        return stored.state == TrialState.RUNNING and stored.user_attrs.get(WORKER) == self.name

    def _leave(self) -> None:
        """Leave all trials to whoever wants them."""
        for trial_id in list(self._trials):
            if self._owns(trial_id):
                self._storage.set_trial_user_attr(trial_id, WORKER, "")
        self._trials.clear()

    # ---------------------------------------------------------------- who lives

    def _is_left(self, trial: FrozenTrial, silent: set[int]) -> bool:
        owner = trial.user_attrs.get(WORKER)
        if not owner:
            return True
        if owner == self.name:
            return trial._trial_id not in self._trials  # the reply to a first try to take it was lost
        if owner in self._dead:
            return True
        lock = self._locks / f"{owner}.lock"
        if not lock.exists():  # its home is another one
            return trial._trial_id in silent
        try:
            with filelock.FileLock(lock, timeout=0):
                self._dead.add(owner)
        except filelock.Timeout:
            return False
        return True

    def _beat(self, left: threading.Event) -> None:
        while True:
            for trial_id in list(self._trials):
                try:
                    self._storage.record_heartbeat(trial_id)
                except (ConnectionLost, StorageInternalError):
                    break  # it is tried again
            if left.wait(self._storage.heartbeat_interval):
                return


def step(trial: optuna.Trial) -> int:
    """How far a trial came."""
    return trial.user_attrs.get(PROGRESS, {}).get("step", 0)


def deaths(trial: optuna.Trial) -> int:
    """How many workers died in a trial at the step where it is."""
    known = trial.user_attrs.get(TAKEN, {})
    return known["times"] if known.get("step") == step(trial) else 0
