"""Optuna's storage when its database is restarted, is busy or refuses, and what only one worker does at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psycopg
import pytest
from optuna.trial import TrialState
from postgres import Server, needs_postgres, server
from sqlalchemy import event

from workbench.errors import StorageAway, StorageError
from workbench.sweep import storage as module
from workbench.sweep.storage import ConnectionLost, Storage, open_storage
from workbench.sweep.stores import Stores

ROOT = Path(__file__).parents[2]
NAME = "tiny"

# a worker in a process of its own that takes its turn and never comes back
HOLDING = """
import sys
from pathlib import Path
from workbench.sweep.storage import Storage

url, turn = sys.argv[1:]
def hold():
    print("in turn", flush=True)
    sys.stdin.read()
Storage(url, 1, Path(turn)).in_turn("tiny", hold)
"""

Open = Callable[[], Storage]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("postgres")) as made:
        yield made


@pytest.fixture
def postgres_url(postgres: Server) -> Iterator[str]:
    """Of a database without studies."""
    yield postgres.url()
    postgres.psql("TRUNCATE studies, trials CASCADE")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'optuna.db'}"
    return request.getfixturevalue("postgres_url")


def opened(url: str, home: Path, name: str = NAME) -> Storage:
    return open_storage(Stores(home, url, "", None, heartbeat=1), name)


def begun(storage: Storage, name: str = NAME) -> optuna.Study:
    return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)


def stored(url: str) -> list[optuna.trial.FrozenTrial]:
    """The trials as somebody else sees them."""
    return optuna.load_study(study_name=NAME, storage=url).trials


def pauses(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> list[float]:
    """Instead of waiting something happens; how long the pauses would have been."""
    found: list[float] = []

    def sleep(seconds: float) -> None:
        found.append(seconds)
        then()

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=module.time.monotonic, sleep=sleep))
    return found


def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("it waits for what will not come")

    pauses(monkeypatch, fail)


def lose(storage: Storage, monkeypatch: pytest.MonkeyPatch, done: bool, after: int = 0) -> None:
    """Let one transaction's connection be lost, the `after`th from now: when all was done but the reply, or before."""
    dialect, count = storage.engine.dialect, iter(range(1000))
    commit = dialect.do_commit

    def lost(connection: Any) -> None:
        mine = next(count) == after
        if done or not mine:
            commit(connection)
        if mine and isinstance(connection.driver_connection, sqlite3.Connection):
            raise sqlite3.OperationalError("database is locked")
        if mine:
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", lost)


# -------------------------------------------------------------------- restarts


OPERATIONS: dict[str, Callable[[optuna.Study, optuna.Trial], object]] = {
    "reading a trial": lambda study, trial: study._storage.get_trial(trial._trial_id),
    "reading the trials": lambda study, trial: study.trials,
    "reading attributes": lambda study, trial: study.user_attrs,
    "noting of a trial": lambda study, trial: trial.set_user_attr("key", 1),
    "noting of a study": lambda study, trial: study.set_user_attr("key", 1),
    "a parameter": lambda study, trial: trial.suggest_float("x", 0, 1),
    "a constraint": lambda study, trial: trial.set_constraint("memory", 1.0),
    "a report": lambda study, trial: trial.report(0.5, 1),
    "pruning": lambda study, trial: trial.should_prune(),
    "telling": lambda study, trial: study.tell(trial, 0.5),
    "telling of a failure": lambda study, trial: study.tell(trial, state=TrialState.FAIL),
    "who is silent": lambda study, trial: study._storage._get_stale_trial_ids(study._study_id),
}


@needs_postgres
@pytest.mark.parametrize("done", [False, True], ids=["the request", "the reply"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_lost_is_asked_for_again(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, done: bool
):
    study = begun(opened(postgres_url, tmp_path))
    plain = begun(opened(postgres_url, tmp_path), "undisturbed")
    answers = []
    for each in (plain, study):
        trial = each.ask()
        if each is study:
            lose(study._storage._backend, monkeypatch, done)
            waited = pauses(monkeypatch, lambda: None)
        OPERATIONS[operation](each, trial)
        (found,) = each.trials
        answers.append((found.state, found.values, found.user_attrs, found.constraints, found.intermediate_values))
        assert len(found.params) == (operation == "a parameter")
    assert answers[0] == answers[1]
    assert len(waited) == 1
    (seen,) = stored(postgres_url)
    assert (seen.state, seen.values, seen.params) == (found.state, found.values, found.params)


@needs_postgres
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_between_any_two_operations(
    postgres: Server, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
):
    study = begun(opened(postgres_url, tmp_path))
    waited = pauses(monkeypatch, lambda: postgres.start() if postgres.process.poll() is not None else None)

    def restarted(do: Callable[[], Any]) -> Any:
        postgres.stop(mode)
        before = len(waited)
        result = do()
        assert len(waited) > before
        return result

    storage = study._storage._backend
    assert restarted(lambda: study.trials) == []
    trial = restarted(lambda: storage.in_turn(NAME, study.ask))
    x = restarted(lambda: trial.suggest_float("x", 0, 1))
    restarted(lambda: trial.set_user_attr("key", {"step": 5}))
    restarted(lambda: trial.report(0.25, 5))
    restarted(lambda: study.set_user_attr("seconds", 1.5))
    restarted(lambda: study.tell(trial, 0.5))
    (seen,) = stored(postgres_url)
    assert (seen.number, seen.state, seen.value, seen.params) == (0, TrialState.COMPLETE, 0.5, {"x": x})
    assert (seen.user_attrs, seen.intermediate_values) == ({"key": {"step": 5}}, {5: 0.25})
    assert study.user_attrs["seconds"] == 1.5


def test_a_store_that_stays_away_is_an_error_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = begun(opened(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path))
    clock = [0.0]
    monkeypatch.setattr(
        module,
        "time",
        SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)),
    )

    def locked(*_: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(study._storage._backend.engine.dialect, "do_execute", locked)
    with pytest.raises(StorageAway, match="A store was away for 300 seconds: database is locked"):
        _ = study.trials
    assert 300 < clock[0] < 310


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("done", [False, True], ids=["the request", "the reply"])
def test_a_turn_in_which_the_connection_is_lost_makes_no_trial_twice(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool, after: int
):
    """At each of its transactions, the last of which is the lock's on PostgreSQL."""
    study = begun(opened(url, tmp_path))
    storage = study._storage._backend

    def draw() -> int:
        trials = study.trials
        trial = optuna.Trial(study, trials[0]._trial_id) if trials else study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("whose", "mine")
        return trial.number

    lose(storage, monkeypatch, done, after)
    pauses(monkeypatch, lambda: None)
    assert storage.in_turn(NAME, draw) == 0
    (seen,) = stored(url)
    assert (seen.number, seen.state, seen.user_attrs) == (0, TrialState.RUNNING, {"whose": "mine"})
    assert [*seen.params] == ["x"]


# -------------------------------------------------------------------- one at a time


def counted(storages: list[Storage], file: Path, times: int) -> int:
    """What a count comes to if each adds to it by reading and writing, in turn."""
    file.write_text("0")
    errors: list[BaseException] = []

    def add() -> None:
        before = int(file.read_text())
        threading.Event().wait(0.002)
        file.write_text(str(before + 1))

    def work(storage: Storage) -> None:
        try:
            for _ in range(times):
                storage.in_turn(NAME, add)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return int(file.read_text())


def test_turns_exclude_each_other(url: str, tmp_path: Path):
    """Whichever home a worker has."""
    storages = [opened(url, tmp_path / f"home-{i % 2}") for i in range(4)]
    assert counted(storages, tmp_path / "count", 10) == 40


def test_a_turn_ends_with_its_process(url: str, tmp_path: Path):
    storage = opened(url, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, url, str(tmp_path / "locks" / f"{NAME}.turn.lock")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    came: list[str] = []
    thread = threading.Thread(target=storage.in_turn, args=(NAME, lambda: came.append("in")))
    try:
        assert process.stdout.readline() == "in turn\n"
        thread.start()
        thread.join(0.5)
        assert came == []
        process.kill()
        thread.join()
    finally:
        process.kill()
        process.communicate()
    assert came == ["in"]


def test_studies_do_not_wait_for_each_other(url: str, tmp_path: Path):
    first, second = opened(url, tmp_path), opened(url, tmp_path, "other")
    assert first.in_turn(NAME, lambda: second.in_turn("other", lambda: 7)) == 7


@needs_postgres
@pytest.mark.parametrize("how", ["terminated", "too long"])
def test_a_turn_that_was_taken_away_is_done_again(
    postgres: Server, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    storage = opened(postgres_url, tmp_path)
    monkeypatch.setattr(module, "LONGEST_TURN", 1)
    calls: list[int] = []

    def do() -> str:
        calls.append(len(calls))
        if len(calls) == 1 and how == "terminated":
            postgres.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
        elif len(calls) == 1:
            threading.Event().wait(1.5)
        return "done"

    assert storage.in_turn(NAME, do) == "done"
    assert calls == [0, 1]


# -------------------------------------------------------------------- refusals


@needs_postgres
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("password", "password authentication failed"),
        ("user", "password authentication failed|does not exist"),
        ("database", 'database "nowhere" does not exist'),
    ],
)
def test_what_a_server_refuses_is_no_matter_of_patience(
    postgres: Server, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, reason: str
):
    bad = {
        "password": postgres_url.replace(postgres.password, "a-wrong-one"),
        "user": postgres_url.replace("workbench:", "nobody-here:"),
        "database": postgres.url("nowhere"),
    }[wrong]
    no_patience(monkeypatch)
    with pytest.raises(StorageError, match=reason) as caught:
        module.patiently(lambda: opened(bad, tmp_path))
    assert not isinstance(caught.value, StorageAway)
    assert postgres.password not in str(caught.value)
    assert "a-wrong-one" not in str(caught.value)


@needs_postgres
def test_a_server_that_is_not_there_may_come(
    postgres: Server, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    postgres.stop()
    try:
        with pytest.raises(StorageAway, match="cannot be used"):
            opened(postgres_url, tmp_path)
        pauses(monkeypatch, lambda: postgres.start() if postgres.process.poll() is not None else None)
        assert module.patiently(lambda: opened(postgres_url, tmp_path)).get_all_studies() == []
    finally:
        if postgres.process.poll() is not None:
            postgres.start()


def test_a_file_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "optuna.db").write_text("a shopping list\n" * 100)
    no_patience(monkeypatch)
    with pytest.raises(StorageError, match="file is not a database") as caught:
        module.patiently(lambda: opened(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path))
    assert not isinstance(caught.value, StorageAway)


def test_a_full_disk_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = begun(opened(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path))
    trial, storage = study.ask(), study._storage._backend
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count = 1"))
    storage.engine.dispose()
    no_patience(monkeypatch)
    with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
        storage.in_turn(NAME, lambda: trial.set_user_attr("long", "x" * 100_000))
    assert "disk is full" in str(module.unusable(storage.url, caught.value))
    assert not isinstance(module.unusable(storage.url, caught.value), StorageAway)


@needs_postgres
@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (psycopg.errors.DiskFull("could not extend file: No space left on device"), False),
        (psycopg.errors.OutOfMemory("out of memory"), False),
        (psycopg.errors.TooManyConnections("sorry, too many clients already"), True),
        (psycopg.errors.AdminShutdown("terminating connection due to administrator command"), True),
        (psycopg.errors.CannotConnectNow("the database system is starting up"), True),
        (psycopg.errors.DeadlockDetected("deadlock detected"), True),
        (psycopg.OperationalError("consuming input failed: server closed the connection unexpectedly"), True),
        (psycopg.OperationalError('connection failed: FATAL: no pg_hba.conf entry for host "1.2.3.4"'), False),
        (psycopg.OperationalError("connection failed: Connection refused"), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_which_errors_of_postgresql_pass(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: psycopg.Error, waits: bool
):
    study = begun(opened(postgres_url, tmp_path))
    dialect = study._storage._backend.engine.dialect
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise error

        patch.setattr(dialect, "do_execute", refuse)
        waited = pauses(monkeypatch, patch.undo)
        if waits:
            study.set_user_attr("key", 1)
        else:
            with pytest.raises(optuna.exceptions.StorageInternalError):
                study.set_user_attr("key", 1)
    assert len(waited) == waits
    assert study.user_attrs == ({"key": 1} if waits else {})


def test_a_database_that_is_locked_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = begun(opened(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path))
    engine = study._storage._backend.engine
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 1"))
    engine.dispose()
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    waited = pauses(monkeypatch, lambda: other.execute("COMMIT") if len(waited) == 3 else None)
    study.set_user_attr("key", 1)
    assert len(waited) == 3
    assert study.user_attrs == {"key": 1}
    other.close()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def test_many_workers_make_one_storage(request: pytest.FixtureRequest, tmp_path: Path, kind: str):
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").create("empty")
    errors: list[BaseException] = []
    names: list[str] = []
    ready = threading.Barrier(6)

    def join() -> None:
        try:
            ready.wait()
            names.append(begun(opened(url, tmp_path)).study_name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=join) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, names) == ([], [NAME] * 6)
    assert len(opened(url, tmp_path).get_all_studies()) == 1


def test_a_lost_connection_outside_of_what_can_be_repeated_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever makes a trial does it in turn."""
    study = begun(opened(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path))
    lose(study._storage._backend, monkeypatch, done=True, after=1)
    with pytest.raises(ConnectionLost, match="database is locked"):
        study.ask()
