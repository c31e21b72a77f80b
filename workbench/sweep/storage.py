"""Optuna's storage for workers that outlive its restarts, and one at a time of them where that matters."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, InternalError, OperationalError

from workbench.errors import StorageAway, StorageError
from workbench.tracking.runs import public_url

from .stores import Stores

PATIENCE = 300.0  # seconds for which a store may be away
LONGEST_PAUSE = 5.0  # seconds between two tries
REFUSALS = ("authentication failed", "no password supplied", "does not exist", "permission denied", "no pg_hba.conf")
PASSING = ("08", "25P03", "40", "53300", "55P03", "57")  # SQLSTATEs, or how they begin, of what does not last
MAKERS = 10  # workers that may make the same tables at once
LONGEST_TURN = 300  # seconds after which the server takes a turn from a worker that went silent in it

# What can be done twice with the outcome of once. To make a trial is not: a reply that was lost would make two.
REPEATABLE = (
    "get_all_studies",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_trial",
    "get_trial_user_attrs",
    "get_trial_system_attrs",
    "get_trial_id_from_study_id_trial_number",
    "_get_trials",
    "_get_stale_trial_ids",
    "set_study_user_attr",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_intermediate_value",
    "_set_trial_param",
)

T = TypeVar("T")


class ConnectionLost(Exception):
    """The database went away, or is busy for another process. What was asked for was done or not, but not in part."""


class Storage(RDBStorage):
    """Optuna's storage in a database that may be restarted: what was cut off is done again.

    Args:
        heartbeat: seconds between two signs of life of a trial that runs; after `SILENT` of them without any it is
            counted as left.
        turn: a lock file for all workers of the study, where the database has no locks of its own.
    """

    SILENT = 4

    def __init__(self, url: str, heartbeat: int, turn: Path):
        super().__init__(url)
        self.heartbeat_interval, self.grace_period = heartbeat, self.SILENT * heartbeat
        self._turn, self._in_turn, self._lost = turn, False, -math.inf
        event.listen(self.engine, "handle_error", self._lose)

    @property
    def steady(self) -> bool:
        """Whether the database has been there for so long that all who live could give a sign."""
        return time.monotonic() - self._lost > (self.grace_period or 0)

    def _lose(self, context: ExceptionContext) -> None:
        """Let what was lost come out as `ConnectionLost`, which Optuna does not take for one of its own."""
        if reason := away(context.sqlalchemy_exception):
            self._lost = time.monotonic()
            raise ConnectionLost(reason) from context.original_exception

    def get_heartbeat_interval(self) -> None:
        """None: `Study.optimize`, which would send signs of life if there was a number, is not used here."""

    def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
        """As Optuna's, also where the reply to a first try was lost."""

        def once() -> bool:
            return RDBStorage.set_trial_state_values(self, trial_id, state, values)

        try:
            return once()
        except ConnectionLost:
            if self._in_turn:
                raise
            return patiently(lambda: self.get_trial(trial_id).state == state or once())

    def in_turn(self, study: str, do: Callable[[], T]) -> T:
        """Do something while no other worker of the study does such a thing. If the connection is lost it is done from
        the beginning, so it begins by looking at what there is.

        Raises:
            StorageAway: the database was away for too long.
        """

        def once() -> T:
            with self._lock(study):
                self._in_turn = True
                try:
                    return do()
                finally:
                    self._in_turn = False

        return patiently(once)

    def _lock(self, study: str) -> AbstractContextManager[Any]:
        if self.engine.dialect.name == "postgresql":
            return advisory_lock(self.engine, study)
        self._turn.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self._turn)


def repeatable(method: Callable[..., T]) -> Callable[..., T]:
    """A method that is done again when the connection was lost, unless in a turn: that begins anew as a whole."""

    @functools.wraps(method)
    def again(self: Storage, *args: Any, **kwargs: Any) -> T:
        if self._in_turn:
            return method(self, *args, **kwargs)
        return patiently(lambda: method(self, *args, **kwargs))

    return again


for name in REPEATABLE:
    setattr(Storage, name, repeatable(getattr(RDBStorage, name)))


def patiently(do: Callable[[], T]) -> T:
    """Do it, again and again while a store is away.

    Raises:
        StorageAway: it was for too long.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            return do()
        except (ConnectionLost, StorageAway) as error:
            if time.monotonic() > deadline:
                raise StorageAway(f"A store was away for {PATIENCE:.0f} seconds: {error}") from error
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def away(error: BaseException | None) -> str:
    """Why a database is away, or at work for somebody else; "" of one that refuses, or whose disk is full."""
    if not isinstance(error, OperationalError | InterfaceError | InternalError):
        return ""
    reason = str(error.orig).strip().replace("\n", " ")
    if type(error.orig).__module__.startswith("sqlite3"):
        return reason if "locked" in reason else ""
    if state := getattr(error.orig, "sqlstate", None):  # none where there is no connection
        return reason if state.startswith(PASSING) else ""
    return "" if any(words in reason for words in REFUSALS) else reason


@contextmanager
def advisory_lock(engine: Engine, study: str) -> Iterator[None]:
    """PostgreSQL's lock of that name. It goes with the connection, and the connection with a process that died; one
    that is silent in it for too long is cut off by the server, and finds out at the end."""
    key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], signed=True)
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{LONGEST_TURN}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


def open_storage(stores: Stores, study: str) -> Storage:
    """Optuna's storage, made if it is an embedded one.

    Raises:
        StorageError: it cannot be used.
        StorageAway: nobody answers.
    """
    home = stores.home
    if stores.optuna.startswith("sqlite:///"):
        home = Path(stores.optuna.removeprefix("sqlite:///")).parent
        home.mkdir(parents=True, exist_ok=True)
    turn, tries = home / "locks" / f"{study}.turn.lock", MAKERS
    while True:
        tries -= 1
        try:
            return Storage(stores.optuna, stores.heartbeat, turn)
        except Exception as error:  # SQLAlchemy's, its drivers' and Optuna's own have no common base
            if not (tries and made_meanwhile(error)):
                raise unusable(stores.optuna, error) from error


def made_meanwhile(error: Exception) -> bool:
    """Whether another worker was making the same tables."""
    return isinstance(error, IntegrityError) or (isinstance(error, DBAPIError) and "already exists" in str(error))


def locks(home: Path, study: str) -> Path:
    """The folder of the locks of a study's workers."""
    return home / "locks" / f"{study}.workers"


def unusable(url: str, error: Exception) -> StorageError:
    """What to say of a storage of Optuna's that fails."""
    reason = str(error.__cause__ or error).splitlines()[0]  # the driver's own words
    kind = StorageAway if away(error) or away(error.__cause__) else StorageError
    return kind(f"Optuna's storage {public_url(url)} cannot be used: {public_url(reason)}")
