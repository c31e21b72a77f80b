"""Workers that share a study: none draws too much, and what one leaves another goes on with. Training is made up."""

from __future__ import annotations

import contextlib
import io
import math
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from postgres import Server, needs_postgres, server
from rich.console import Console
from safetensors.torch import load_file, save_file

from workbench.errors import ConfigError, Diverged, StudyFails
from workbench.sweep import draw, run, scheduler
from workbench.sweep.display import Display
from workbench.sweep.entry import settle
from workbench.sweep.failures import Failures
from workbench.sweep.fleet import TAKEN, WORKER, Fleet
from workbench.sweep.run import work
from workbench.sweep.spec import Study, load_study
from workbench.sweep.storage import ConnectionLost, Storage, open_storage
from workbench.sweep.stores import Stores
from workbench.sweep.workshop import Job, Workshop
from workbench.tracking.runs import default_store, open_tracking
from workbench.training.bench import Report

METHODS = """
lora:
  r: {values: [2, 4]}
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
ia3:
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
"""
STEPS = 9


class Dead(BaseException):
    """Ends a worker as a signal that nobody can handle does: nothing more is written."""


@dataclass
class Trainer:
    """In place of training.

    Attributes:
        before: is called before each pass with its jobs, and may die.
        passes: of all workers, as (trial, step to begin with) of their jobs.
        fails: the error with which a trial ends at its first evaluation.
    """

    before: Callable[[Sequence[Job]], object] = lambda jobs: None
    passes: list[list[tuple[int, int]]] = field(default_factory=list)
    fails: Callable[[int], Exception | None] = lambda number: None

    def train(self, shop: Workshop, jobs: Sequence[Job], on_step: Callable[[int, int, float], None]) -> list[Report]:
        """A checkpoint holds the steps that were made."""
        begun = [load_file(job.begin)["steps"].tolist() if job.begin else [] for job in jobs]
        self.passes.append([(job.trial, len(made)) for job, made in zip(jobs, begun, strict=True)])
        self.before(jobs)
        reports = []
        for job, made in zip(jobs, begun, strict=True):
            if error := self.fails(job.trial):
                reports.append(Report(job.trial, error=error))
                continue
            new = [*range(len(made) + 1, job.until + 1)]
            for step in new:
                on_step(job.trial, step, 1 / step)
            save_file({"steps": torch.tensor(made + new)}, job.end, {"step": str(job.until), "config": "made up"})
            if job.results:
                (job.results / "adapter").mkdir(parents=True, exist_ok=True)
                (job.results / "adapter" / "adapter_model.safetensors").write_bytes(b"")
            metrics = {"loss": 1 / job.until, "accuracy": 0.5, "f1": 0.0, "mcc": 0.0}
            costs = {"seconds/train": 0.1, "seconds/eval": 0.1}
            reports.append(Report(job.trial, job.until, len(new), metrics, costs=costs, trainable=1, total=2))
        return reports


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(Workshop, "train", lambda shop, jobs, on_step: made.train(shop, jobs, on_step))
    close = run.close

    def unless_dead(*args: Any) -> None:
        if not isinstance(sys.exception(), Dead):
            close(*args)

    monkeypatch.setattr(run, "close", unless_dead)
    return made


@pytest.fixture(autouse=True)
def one_loads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of a base's first values are the process's."""
    load, lock = Workshop.open, threading.Lock()

    def alone(study: Study, home: Path) -> Workshop:
        with lock:
            return load(study, home)

    monkeypatch.setattr(Workshop, "open", alone)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("postgres")) as made:
        yield made


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def url(request: pytest.FixtureRequest, lab: Any) -> str:
    """Of an Optuna storage."""
    if request.param == "sqlite":
        return f"sqlite:///{lab.home / 'optuna.db'}"
    return request.getfixturevalue("postgres").create(lab.folder.name)


def write(lab: Any, trials: int = 4, search: str = "", methods: str = METHODS, budget: str = "", more: str = "") -> Any:
    """The study: nine steps a trial, measured after three, six and nine."""
    search = search or f"sampler: random, pruner: none, in_flight: {trials}"
    budget = budget or f"{{trials: {trials}}}"
    text = lab.write(methods, budget=budget, more=f"search: {{{search}}}\n{more}").file.read_text()
    lab.file.write_text(
        text.replace("steps: 10, batch_size: 8, eval_every: 5", "steps: 9, batch_size: 8, eval_every: 3")
    )
    return lab


@dataclass
class Worker:
    """One of a lab's workers.

    Attributes:
        home: its folder; the stores are the lab's.
    """

    lab: Any
    home: Path
    heartbeat: int = 1
    elsewhere: bool = False
    max_failures: int | None = None
    out: io.StringIO = field(default_factory=io.StringIO)
    error: BaseException | None = None

    @property
    def stores(self) -> Stores:
        tracking, artifacts = default_store(self.lab.home)
        optuna_url = f"sqlite:///{self.lab.home / 'optuna.db'}"
        return Stores(self.home, optuna_url, tracking, None if self.elsewhere else artifacts, self.heartbeat)

    def work(self) -> Worker:
        """To the end, whichever that is."""
        study = load_study(self.lab.file)
        display = Display(study, Console(file=self.out, width=200))
        try:
            work(study, self.stores, display, 1, self.max_failures)
        except (Dead, KeyboardInterrupt, StudyFails) as error:
            self.error = error
        return self


def here(lab: Any, **options: Any) -> Worker:
    return Worker(lab, lab.home, **options)


def elsewhere(lab: Any, name: str, **options: Any) -> Worker:
    return Worker(lab, lab.folder / name, elsewhere=True, **options)


def age(lab: Any) -> None:
    """Let all signs of life be a minute old."""
    with sqlite3.connect(lab.home / "optuna.db") as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-60 seconds')")
    connection.close()


def checkpoints(home: Path) -> set[str]:
    return {path.name for path in (home / "checkpoints").rglob("*") if path.is_file()}


def check_complete(lab: Any, trials: int) -> None:
    """Each trial once, in both stores, every step once, and nothing is left behind."""
    assert [(trial.number, trial.state) for trial in lab.study.trials] == [
        (n, TrialState.COMPLETE) for n in range(trials)
    ]
    assert [run.data.tags["workbench.trial"] for run in lab.trials] == [*map(str, range(trials))]
    assert {run.data.tags["workbench.outcome"] for run in lab.trials} == {"complete"}
    assert {run.info.status for run in lab.runs} == {"FINISHED"}
    assert len(lab.runs) == trials + 1
    for child, trial in zip(lab.trials, lab.study.trials, strict=True):
        assert trial.user_attrs["run_id"] == child.info.run_id
        assert "workbench.message" not in child.data.tags
        assert [*lab.curve(child, "train.loss")] == [*range(1, STEPS + 1)]
        assert [*lab.curve(child, "validation.loss")] == [3, 6, 9]
        assert not lab.client.list_artifacts(child.info.run_id, "checkpoints")


# -------------------------------------------------------------------- the budget


@dataclass
class Drawer:
    """A worker that trains nothing."""

    study: Study
    storage: Storage
    home: Path
    errors: list[BaseException] = field(default_factory=list)

    def __call__(self) -> None:
        try:
            self.draw()
        except BaseException as error:
            self.errors.append(error)

    def draw(self) -> None:
        known = optuna.create_study(
            study_name=self.study.name, storage=self.storage, direction="maximize", load_if_exists=True
        )
        fleet, shop = Fleet(known, self.storage, self.home, True), Workshop(self.study, None, None, self.home)
        books = SimpleNamespace(study=self.study, optuna_study=known)

        def settled() -> Any:
            trial = draw.left(self.study, known, fleet) or draw.searched(self.study, known, 0.0)
            trial = trial or draw.finalist(self.study, known)
            if trial is None:
                return None
            fleet.claim(trial)
            return settle(trial, books, shop, None)

        with fleet.joined():
            while True:
                if found := fleet.in_turn(settled):
                    twin = found.twin is not None and self.study.search.duplicates == "skip"
                    found.trial.set_user_attr("outcome", "duplicate" if twin else "complete")
                    known.tell(found.trial, **({"state": TrialState.FAIL} if twin else {"values": found.trial.number}))
                    fleet.forget(found.trial)
                elif draw.is_over(self.study, known.get_trials(deepcopy=False), 0.0):
                    return


def drawn_by_four(lab: Any, url: str, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
    study = load_study(lab.file)
    drawers = [
        Drawer(study, open_storage(Stores(lab.home, url, "", None, heartbeat=1), study.name), lab.home)
        for _ in range(4)
    ]
    threads = [threading.Thread(target=drawer) for drawer in drawers]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join()
    assert [error for drawer in drawers for error in drawer.errors] == []
    trials = optuna.load_study(study_name=study.name, storage=url).trials
    assert [trial.number for trial in trials] == [*range(len(trials))]
    assert {*(trial.state for trial in trials)} <= {TrialState.COMPLETE, TrialState.FAIL}
    return trials


GRID = "lora:\n  r: {values: [1, 2, 3, 4, 5]}\n  lora_alpha: {values: [1, 2, 4, 8]}\n"


def test_four_workers_draw_as_many_trials_as_the_budget_has(lab, url: str):
    write(lab, 50)
    assert len(drawn_by_four(lab, url)) == 50


def test_four_workers_draw_as_many_of_each_method(lab, url: str):
    write(lab, search="sampler: random, pruner: none", budget="{per_method: {trials: 8}}")
    trials = drawn_by_four(lab, url)
    assert Counter(trial.params["method"] for trial in trials) == {"lora": 8, "ia3": 8}
    roles = Counter((trial.params["method"], trial.user_attrs["about"]["role"]) for trial in trials)
    assert roles == {("lora", "default"): 1, ("ia3", "default"): 1, ("lora", "search"): 7, ("ia3", "search"): 7}


def test_four_workers_draw_a_grid_once(lab, url: str):
    write(lab, search="sampler: grid, pruner: none", methods=GRID, budget="{trials: 100}")
    trials = drawn_by_four(lab, url)
    assert len(trials) == len({trial.user_attrs["about"]["config"] for trial in trials}) == 20


def test_four_workers_know_of_each_others_configurations(lab, url: str):
    write(lab, search="sampler: random, pruner: none, duplicates: skip", methods=GRID, budget="{trials: 15}")
    trials = drawn_by_four(lab, url)
    tried = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(tried) == len({trial.user_attrs["about"]["config"] for trial in tried}) == 15


def test_four_workers_draw_the_same_finalists(lab, url: str):
    finalists = "finalists: {per_method: 1, initialisations: 2, orders: 3}\n"
    write(lab, search="sampler: random, pruner: none", budget="{per_method: {trials: 4}}", more=finalists)
    trials = drawn_by_four(lab, url)
    repeats = [t.user_attrs["about"] for t in trials if t.user_attrs["about"]["role"] == "finalist"]
    assert len(trials) == 8 + 12
    assert len({(about["of"], about["init"], about["order"]) for about in repeats}) == 12


@needs_postgres
def test_the_budget_is_exact_though_the_server_is_restarted(lab, postgres: Server):
    write(lab, 50)
    url = postgres.create("restarted")

    def restart() -> None:
        study = open_storage(Stores(lab.home, url, "", None, heartbeat=1), lab.name)
        for trials in (5, 20):
            while int(postgres.psql("SELECT count(*) FROM trials", "restarted")) < trials:
                pass
            postgres.stop("immediate")
            postgres.start()
        study.engine.dispose()

    trials = drawn_by_four(lab, url, restart)
    assert len(trials) == 50
    assert all("config" in trial.user_attrs["about"] for trial in trials)


# -------------------------------------------------------------------- who lives


@pytest.fixture
def fleets(lab) -> Callable[[str], Fleet]:
    """Makes a worker whose home has this name."""
    write(lab)
    url = f"sqlite:///{lab.home / 'optuna.db'}"

    def make(home: str) -> Fleet:
        storage = open_storage(Stores(lab.folder / home, url, "", None, heartbeat=1), lab.name)
        known = optuna.create_study(study_name=lab.name, storage=storage, direction="maximize", load_if_exists=True)
        return Fleet(known, storage, lab.folder / home, True)

    return make


def left(fleet: Fleet) -> list[int]:
    return [trial.number for trial in fleet.in_turn(lambda: fleet.left(fleet._study.trials))]


def test_a_worker_of_the_same_home_is_known_to_be_dead_at_once_and_others_when_they_are_silent(lab, fleets):
    first, second, far = fleets("home"), fleets("home"), fleets("far")
    with first.joined(), second.joined(), far.joined():
        trial = first._study.ask()
        assert (left(first), left(second)) == ([0], [0])  # nobody's yet
        first.claim(trial)
        assert (left(first), left(second), left(far)) == ([], [], [])
        assert not first.others(first._study.trials)
        assert second.others(second._study.trials)
        age(lab)
        assert left(second) == []  # it holds its lock, though it may be slow
        first._leave()
        assert (left(second), left(far)) == ([0], [0])
        first.claim(trial)
    with second.joined(), far.joined():
        assert left(far) == []
        assert left(second) == [0]
        assert not second.others(second._study.trials)
        age(lab)
        far._storage._lost = time.monotonic()  # when the database is back, nobody could give a sign for a while
        assert left(far) == []
        far._storage._lost = -math.inf
        assert left(far) == [0]


def test_a_trial_whose_worker_died_as_it_took_it_is_no_ones(lab, fleets, monkeypatch: pytest.MonkeyPatch):
    """Between the two writes that this takes, in either order."""
    for method in ("set_trial_user_attr", "record_heartbeat"):
        first, far = fleets("home"), fleets("far")
        trial = first._study.ask()

        def die(*_: Any, **options: Any) -> None:
            raise Dead

        with monkeypatch.context() as patch:
            patch.setattr(Storage, method, die)
            with pytest.raises(Dead):
                first.claim(trial)
        age(lab)
        assert trial.number in left(far)


def test_a_turn_that_is_done_again_loses_no_trial(fleets, monkeypatch: pytest.MonkeyPatch):
    """A first try took one, and asks for another now: the first is still to be found."""
    fleet = fleets("home")
    calls: list[int] = []

    def do() -> int:
        trial = fleet._study.ask()
        fleet.claim(trial)
        calls.append(trial.number)
        if len(calls) == 1:
            raise ConnectionLost("database is locked")
        return trial.number

    with fleet.joined():
        assert fleet.in_turn(do) == 1
        assert calls == [0, 1]
        assert left(fleet) == [0]


def test_a_heart_beats_on_after_any_error_of_the_store(fleets, monkeypatch: pytest.MonkeyPatch):
    fleet = fleets("home")
    beaten, failed = threading.Event(), threading.Event()
    record = Storage.record_heartbeat

    def once(self: Storage, trial_id: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            if not failed.is_set():
                failed.set()
                raise optuna.exceptions.StorageInternalError("disk I/O error")
            beaten.set()
        record(self, trial_id)

    fleet.claim(fleet._study.ask())
    monkeypatch.setattr(Storage, "record_heartbeat", once)
    with fleet.joined():
        assert beaten.wait(30)


# -------------------------------------------------------------------- a worker that dies


@pytest.mark.parametrize("far", [False, True], ids=["here", "elsewhere"])
def test_a_dead_workers_trials_go_on_where_they_were(lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, far: bool):
    """All of a bank, with the same parameters and runs, and no step twice."""
    monkeypatch.chdir(lab.folder)
    write(lab, 4)

    def die(jobs: Sequence[Job]) -> None:
        if sum(len(jobs) for jobs in trainer.passes) > 4:
            raise Dead

    trainer.before = die
    first = (elsewhere(lab, "one") if far else here(lab)).work()
    assert isinstance(first.error, Dead)
    before = [(trial.params, trial.user_attrs["run_id"]) for trial in lab.study.trials]
    assert {trial.state for trial in lab.study.trials} == {TrialState.RUNNING}
    steps = {trial.number: trial.user_attrs.get("progress", {}).get("step", 0) for trial in lab.study.trials}
    assert max(map(len, trainer.passes)) > 1  # they shared a pass
    assert {run.info.status for run in lab.runs} == {"RUNNING"}
    if far:
        age(lab)
    trainer.before, trainer.passes = lambda jobs: None, []
    second = (elsewhere(lab, "two") if far else here(lab)).work()
    assert second.error is None
    trained = sorted(job for jobs in trainer.passes for job in jobs)
    assert trained == [(n, step) for n in range(4) for step in range(steps[n], STEPS, 3)]
    for trial, (params, run_id) in zip(lab.study.trials, before, strict=True):
        assert trial.params == params
        assert trial.user_attrs["run_id"] == run_id or not steps[trial.number]  # nothing was in it
    assert any(steps.values())
    check_complete(lab, 4)
    assert checkpoints(second.home) == set()
    again = first.work()  # whoever comes back clears its own home
    assert "is finished: 4 trials" in again.out.getvalue()
    assert checkpoints(first.home) == set()


def test_a_worker_that_died_when_all_but_the_outcome_was_recorded(
    lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is trained again, though the last checkpoint was never shared."""
    monkeypatch.chdir(lab.folder)
    write(lab, 1)
    with monkeypatch.context() as patch:

        def die(*_: Any) -> None:
            raise Dead

        patch.setattr(run.Scheduler, "_end", die)
        assert isinstance(elsewhere(lab, "one").work().error, Dead)
    age(lab)
    trainer.passes = []
    elsewhere(lab, "two").work()
    assert trainer.passes == []
    check_complete(lab, 1)


# -------------------------------------------------------------------- a worker that stands still


@pytest.mark.parametrize(
    ("others", "then"), [("have ended", "goes on"), ("have ended", "is stopped"), ("are at work", "is stopped")]
)
def test_a_worker_that_stood_still_leaves_alone_what_others_took(
    lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, then: str, others: str
):
    monkeypatch.chdir(lab.folder)
    write(lab, 2)

    def stand_still(jobs: Sequence[Job]) -> None:
        if not any(job.begin for job in jobs):
            return
        trainer.before = lambda jobs: None
        age(lab)
        if others == "are at work":
            trainer.before = die_later
        elsewhere(lab, "two").work()
        trainer.before = lambda jobs: None
        if then == "is stopped":
            raise KeyboardInterrupt

    def die_later(jobs: Sequence[Job]) -> None:
        if jobs[0].until == 9:
            raise Dead

    trainer.before = stand_still
    first = elsewhere(lab, "one", heartbeat=1000)
    first.work()
    if others == "are at work":
        assert {run.info.status for run in lab.runs} == {"RUNNING"}
        assert {run.data.tags.get("workbench.outcome") for run in lab.trials} == {None}
        elsewhere(lab, "two").work()  # finds that the one before is dead
    assert ("stood still for so long" in first.out.getvalue()) == (then == "goes on")
    check_complete(lab, 2)


# -------------------------------------------------------------------- a trial that kills


def test_a_trial_that_kills_its_workers_is_given_up_and_nobody_else_is_blamed(
    lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scheduler, "POISON", 4)
    write(lab, 4)

    def kill(jobs: Sequence[Job]) -> None:
        if any((job.trial, job.until) == (0, 6) for job in jobs):
            raise Dead

    trainer.before = kill
    deaths: list[list[int]] = []
    while isinstance(here(lab).work().error, Dead):
        deaths.append([number for number, _ in trainer.passes[-1]])
        assert len(deaths) < 9
    assert len(deaths[0]) > 1
    assert deaths[2:] == [[0], [0]]
    outcomes = [run.data.tags["workbench.outcome"] for run in lab.trials]
    assert outcomes == ["crashed", "complete", "complete", "complete"]
    assert lab.trials[0].data.tags["workbench.message"] == "4 workers died in this trial, at step 3; see their logs"
    assert [trial.state.name for trial in lab.study.trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    for child in lab.trials[1:]:
        assert [*lab.curve(child, "train.loss")] == [*range(1, STEPS + 1)]


def test_ctrl_c_is_no_death(fleets, lab):
    for _ in range(3):
        fleet = fleets("home")
        trial = fleet._study.ask() if not fleet._study.trials else optuna.Trial(fleet._study, 1)
        with contextlib.suppress(KeyboardInterrupt), fleet.joined():
            fleet.claim(trial)
            raise KeyboardInterrupt
    (trial,) = lab.study.trials
    assert TAKEN not in trial.user_attrs
    assert trial.user_attrs[WORKER] == ""


# -------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_in_the_middle_of_a_query(fleets, lab, monkeypatch: pytest.MonkeyPatch):
    """It locks the database as long as anybody holds its cursor."""
    monkeypatch.setattr("workbench.sweep.storage.PATIENCE", 1.0)
    fleet = fleets("home")
    trial = fleet._study.ask()

    def cut_off() -> None:
        fleet.claim(trial)
        connection = fleet._storage.engine.raw_connection()
        rows = connection.cursor()
        rows.execute("select 1 from alembic_version union all select 2 from alembic_version")
        rows.fetchone()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), fleet.joined():
        cut_off()
    assert lab.study.trials[0].user_attrs[WORKER] == ""


def test_ctrl_c_gives_trials_back_and_the_study_is_closed_by_the_last(lab, trainer: Trainer):
    write(lab, 4, search="sampler: random, pruner: none, in_flight: 2")
    both, go_on = threading.Barrier(2), threading.Event()
    seen: set[str] = set()

    def wait(jobs: Sequence[Job]) -> None:
        name = threading.current_thread().name
        if name in seen:
            return
        seen.add(name)
        both.wait(60)
        if name == "stopped":
            raise KeyboardInterrupt
        go_on.wait(60)

    trainer.before = wait
    stays, stopped = here(lab), here(lab)
    threads = {name: threading.Thread(target=w.work, name=name) for name, w in (("stays", stays), ("stopped", stopped))}
    for thread in threads.values():
        thread.start()
    threads["stopped"].join()
    try:
        assert isinstance(stopped.error, KeyboardInterrupt)
        owners = Counter(trial.user_attrs[WORKER] for trial in lab.study.trials)
        assert sorted(owners.values()) == [2, 2]
        assert owners[""] == 2
        given = [run for run, t in zip(lab.trials, lab.study.trials, strict=True) if not t.user_attrs[WORKER]]
        assert [(run.info.status, run.data.tags["workbench.outcome"]) for run in given] == [
            ("KILLED", "interrupted")
        ] * 2
        assert lab.parent.info.status == "RUNNING"
    finally:
        go_on.set()
        threads["stays"].join()
    assert stays.error is None
    check_complete(lab, 4)
    assert TAKEN not in {key for trial in lab.study.trials for key in trial.user_attrs}


def test_ctrl_c_in_the_last_worker_closes_the_study(lab, trainer: Trainer):
    write(lab, 2)

    def stop(jobs: Sequence[Job]) -> None:
        raise KeyboardInterrupt

    trainer.before = stop
    assert isinstance(here(lab).work().error, KeyboardInterrupt)
    assert {run.info.status for run in lab.runs} == {"KILLED"}
    assert {trial.user_attrs[WORKER] for trial in lab.study.trials} == {""}
    trainer.before = lambda jobs: None
    here(lab).work()
    check_complete(lab, 2)


def test_ctrl_c_while_a_trial_enters_gives_it_back_too(lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    write(lab, 1)
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(scheduler, "enter", stop)
        assert isinstance(here(lab).work().error, KeyboardInterrupt)
    (trial,) = lab.study.trials
    assert trial.user_attrs[WORKER] == ""
    here(lab).work()
    check_complete(lab, 1)


# -------------------------------------------------------------------- runs that a server made twice


def test_runs_that_were_made_twice_are_dropped_at_the_end(lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    """All of them, however many pages the server's answer has."""
    write(lab, 5)
    client = type(lab.client)
    search = client.search_runs

    def by_twos(self: Any, *args: Any, **options: Any) -> Any:
        return search(self, *args, **(options | {"max_results": 2}))

    create, doubled = client.create_run, []

    def twice(self: Any, experiment_id: str, **options: Any) -> Any:
        made = create(self, experiment_id, **options)
        if "workbench.trial" in options["tags"] and options["tags"]["workbench.trial"] not in doubled:
            doubled.append(options["tags"]["workbench.trial"])
            return create(self, experiment_id, **options)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(client, "search_runs", by_twos)
        patch.setattr(client, "create_run", twice)
        here(lab).work()
    assert doubled == ["0", "1", "2", "3", "4"]
    check_complete(lab, 5)


def test_runs_of_other_studies_are_no_strays(tmp_path: Path):
    tracking = open_tracking(*default_store(tmp_path))
    study, other = (tracking.open_study(name, {}, {}, {}) for name in ("one", "two"))
    kept = [study.open_trial(number, {}, {}) for number in range(2)]
    foreign = other.open_trial(0, {}, {})
    lost = tracking.client.create_run(
        study._experiment_id,
        tags={"mlflow.parentRunId": study.run_id, "workbench.study": "one", "workbench.trial": "1"},
    )
    study.drop_strays({child.run_id for child in kept})
    assert tracking.client.get_run(lost.info.run_id).info.lifecycle_stage == "deleted"
    for run_id in (study.run_id, other.run_id, foreign.run_id, *(child.run_id for child in kept)):
        assert tracking.client.get_run(run_id).info.lifecycle_stage == "active"


# -------------------------------------------------------------------- checkpoints


def test_checkpoints_of_pruned_trials_stay_and_no_others(lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(lab.folder)
    write(lab, 6, search="sampler: random, pruner: successive_halving, in_flight: 6")
    worker = elsewhere(lab, "one").work()
    trials = lab.study.trials
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert checkpoints(worker.home) == {f"{trial.number}-{trial.last_step}.safetensors" for trial in pruned}
    for child in lab.trials:
        assert not lab.client.list_artifacts(child.info.run_id, "checkpoints")


def test_a_checkpoint_that_is_nowhere_begins_the_trial_anew(lab, trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    """It was too large for the server, and its worker's home is another one."""
    from workbench.sweep import checkpoints as module

    monkeypatch.chdir(lab.folder)
    monkeypatch.setattr(module, "LARGEST", 0)
    write(lab, 1)

    def die(jobs: Sequence[Job]) -> None:
        if jobs[0].until == 6:
            raise Dead

    trainer.before = die
    elsewhere(lab, "one").work()
    age(lab)
    trainer.before, trainer.passes = lambda jobs: None, []
    elsewhere(lab, "two").work()
    assert trainer.passes == [[(0, 0)], [(0, 3)], [(0, 6)]]
    check_complete(lab, 1)


# -------------------------------------------------------------------- a study that only fails


def test_a_study_that_only_fails_is_stopped_and_the_same_command_goes_on(lab, trainer: Trainer):
    write(lab, 12, search="sampler: random, pruner: none, in_flight: 2")
    trainer.fails = lambda number: Diverged("the loss is NaN")
    for start in (1, 2):
        done = lab.sweep("--workers", 1, "--max-failures", 3)
        assert done.code == 2
        assert "The last 3 trials of tiny failed (3 diverged), so the study was stopped." in done.err
        assert len(done.err.splitlines()) == 1
        assert sum(trial.state == TrialState.FAIL for trial in lab.study.trials) == 3 * start
        assert all(not t.user_attrs[WORKER] for t in lab.study.trials if t.state == TrialState.RUNNING)
        assert lab.parent.info.status == "FAILED"
    trainer.fails = lambda number: None
    assert lab.sweep("--workers", 1, "--max-failures", 3).code == 0
    assert len(lab.study.trials) == 12
    assert {run.info.status for run in lab.trials} == {"FAILED", "FINISHED"}
    assert lab.parent.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("outcomes", "stops"),
    [
        ("ddd", True),
        ("dcd", True),
        ("ddok", False),
        ("okdd", False),
        ("idddi", True),
        ("didid", True),
        ("dddd before", False),
        ("dd before d", False),
        ("dpdd", False),
        ("iiii", False),
    ],
)
def test_what_counts_as_a_failure(outcomes: str, stops: bool):
    """Trials that were not trained say nothing."""
    words = {"d": "diverged", "c": "crashed", "i": "infeasible", "p": "pruned", "o": "complete"}
    earlier, _, later = outcomes.rpartition(" before")
    study = optuna.create_study()

    def end(letters: str) -> None:
        for letter in letters:
            if letter in words:
                trial = study.ask()
                trial.set_user_attr("outcome", words[letter])
                study.tell(trial, state=TrialState.FAIL)

    end(earlier)
    failures = Failures(study, 3)
    end(later)
    if stops:
        with pytest.raises(StudyFails, match="The last 3 trials"):
            failures.check()
    else:
        failures.check()


def test_others_are_given_back_when_a_study_only_fails(lab, trainer: Trainer):
    write(lab, 6)
    trainer.fails = lambda number: Diverged("NaN") if number < 2 else ConfigError("not so") if number == 2 else None
    worker = here(lab, max_failures=2).work()
    assert isinstance(worker.error, StudyFails)
    states = Counter(trial.state for trial in lab.study.trials)
    assert states[TrialState.FAIL] >= 2
    running = [trial for trial in lab.study.trials if trial.state == TrialState.RUNNING]
    assert running
    assert {trial.user_attrs[WORKER] for trial in running} == {""}
    here(lab).work()
    assert [run.data.tags["workbench.outcome"] for run in lab.trials] == ["diverged"] * 2 + ["infeasible"] + [
        "complete"
    ] * 3
