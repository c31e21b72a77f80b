"""Many trials at once: each trains stretch by stretch, losers leave early, new ones enter.

A round brings trials to the next step at which something is decided; then whoever loses leaves, and new trials are
asked for. Nothing is decided or drawn within a round, so that what a study finds does not depend on which process was
faster, nor on how many there are. All that a round needs is in the stores: after a crash it is finished first.

Where several workers share a study each has rounds of its own, and takes the trials of those that died.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from workbench.errors import StorageError, StudyFails
from workbench.tracking.runs import Outcome
from workbench.training.bench import Report

from . import draw
from .baselines import learns
from .budget import PROGRESS, Clock
from .checkpoints import Checkpoints
from .display import Display
from .entry import Settled, enter, settle
from .failures import Failures
from .fleet import SUSPECT, Fleet, deaths
from .interrupt import Interrupt, let_go
from .planning import Planner
from .pool import Crew
from .record import INTERRUPTED, Books, Progress, Record, outcome
from .roles import ABOUT, OUTCOME, RESUMES, About
from .space import HALVING, decisions, in_flight
from .spec import Study
from .workshop import Job, Seeds, Workshop

ROUND = "round"  # attribute of a study: to which step each trial of the round trains
FINALISTS = 27  # that are live at once, where one worker has them all
SHARED = 4  # trials of a worker that are live at once, where others want some too
WAIT_SECONDS = 1.0  # how often a worker without trials looks whether there are any
POISON = 8  # workers that died at the same step of a trial: it is given up


@dataclass
class Live:
    """A trial that has not ended.

    Attributes:
        seeds: where its random numbers come from.
        searching: it is one of the search; else it takes a pruned trial up again, or is a finalist.
        spared: the pruner leaves it alone.
        suspect: workers died with it, so that nobody shares a pass with it.
        losses: by step, of the stretch that it trains now.
        goal: the step to which it trains in this round.
        begun: whether it has trained in this round.
        busy: whether it is training now.
    """

    record: Record
    seeds: Seeds
    searching: bool
    spared: bool
    suspect: bool
    losses: dict[int, float] = field(default_factory=dict)
    goal: int = 0
    begun: bool = False
    busy: bool = False

    @property
    def number(self) -> int:
        return self.record.trial.number

    @property
    def step(self) -> int:
        return self.record.progress.step


class Scheduler:
    """Runs the trials of a study until its budget is spent.

    Args:
        planner: predicts what trials need; None: nobody asks.
        failures: stops a study that only fails; None: nothing does.
    """

    def __init__(
        self,
        books: Books,
        shop: Workshop,
        crew: Crew,
        checkpoints: Checkpoints,
        clock: Clock,
        display: Display,
        interrupt: Interrupt,
        fleet: Fleet,
        planner: Planner | None = None,
        failures: Failures | None = None,
    ):
        self.books, self.study, self.optuna_study = books, books.study, books.optuna_study
        self.shop, self.crew, self.checkpoints = shop, crew, checkpoints
        self.clock, self.display, self.interrupt = clock, display, interrupt
        self.fleet, self.planner, self.failures = fleet, planner, failures
        self.live: dict[int, Live] = {}
        self._pace: dict[int | str, float] = {}  # seconds a step, of a trial and of its label

    def run(self, pruned: Sequence[int] = ()) -> None:
        """Train until the budget is spent and every trial has ended.

        Args:
            pruned: numbers of pruned trials to take up again, see `check_pruned`.
        """
        try:
            with self.crew:
                self._take_left()
                for number in pruned:
                    self._take_up(number)
                goals: dict[int, int] = {}
                if not self.fleet.shared:
                    goals = {int(n): step for n, step in self.optuna_study.user_attrs.get(ROUND, {}).items()}
                while self._take_left() or not self._over():
                    self._train(goals)
                    self._prune()
                    if goals:
                        self.clock.save()
                    self._fill()
                    goals = self._goals() if self.live else {}
                    if goals and not self.fleet.shared:
                        self.optuna_study.set_user_attr(ROUND, goals)
        except (KeyboardInterrupt, StudyFails) as error:
            let_go(error)
            for live in self.live.values():
                if self.fleet.owns(live.record.trial):
                    live.record.run.end("interrupted", INTERRUPTED)
            self.clock.save()
            raise

    def _over(self) -> bool:
        """Whether there is nothing more to do, also for others; waits while only these have something."""
        self.interrupt.check()
        if self.live:
            return False
        trials = self.optuna_study.get_trials(deepcopy=False)
        if draw.is_over(self.study, trials, self.clock.seconds):
            return True
        if any(not trial.state.is_finished() for trial in trials):
            time.sleep(WAIT_SECONDS)
        return False

    # ---------------------------------------------------------------- who takes part

    def _take_left(self) -> bool:
        """Go on with trials that nobody works on; whether there were any."""
        before = len(self.live)
        while settled := self.fleet.in_turn(lambda: self._settled(self._left())):
            self._enter(settled)
        return len(self.live) > before

    def _take_up(self, number: int) -> None:
        """Go on with a pruned trial, as a new one: Optuna's trials end once."""
        pruned = self.optuna_study.get_trials(deepcopy=False)[number]
        step = pruned.user_attrs[PROGRESS]["step"]
        attributes = {RESUMES: number, PROGRESS: {"step": step}, ABOUT: pruned.user_attrs.get(ABOUT, {})}

        def take() -> Settled | None:
            trials = self.optuna_study.get_trials(deepcopy=False)
            if not any(trial.user_attrs.get(RESUMES) == number for trial in trials):
                self.optuna_study.enqueue_trial(pruned.params, user_attrs=attributes)
            return self._settled(draw.waiting(self.optuna_study))

        if settled := self.fleet.in_turn(take):
            self._enter(settled)

    def _fill(self) -> None:
        """New trials, as many as may be live and the budget allows; when the search is over, finalists."""
        room, finalists = in_flight(self.study), FINALISTS
        if self.fleet.shared:
            room = finalists = self.study.search.in_flight or min(room, SHARED)
        while sum(live.searching for live in self.live.values()) < room:
            self.interrupt.check()
            if self.planner and (hopeless := self.planner.hopeless):
                if self.live:
                    return
                raise hopeless
            if not (settled := self.fleet.in_turn(lambda: self._settled(self._searched()))):
                break
            self._enter(settled)
        while len(self.live) < finalists and (settled := self.fleet.in_turn(lambda: self._settled(self._finalist()))):
            self._enter(settled)

    def _left(self) -> optuna.Trial | None:
        return draw.left(self.study, self.optuna_study, self.fleet)

    def _searched(self) -> optuna.Trial | None:
        return draw.searched(self.study, self.optuna_study, self.clock.seconds)

    def _finalist(self) -> optuna.Trial | None:
        return draw.finalist(self.study, self.optuna_study)

    def _settled(self, trial: optuna.Trial | None) -> Settled | None:
        """A trial that is drawn becomes this worker's."""
        if trial is None:
            return None
        self.fleet.claim(trial)
        return settle(trial, self.books, self.shop, self.planner)

    def _enter(self, settled: Settled) -> None:
        """Let a trial take part from where its checkpoint is, or from the start."""
        trial = settled.trial
        about, resumes = About.of_trial(trial), trial.user_attrs.get(RESUMES)
        progress = Progress(**trial.user_attrs.get(PROGRESS, {}))
        if "run_id" not in trial.user_attrs and resumes is not None:
            self.checkpoints.copy(resumes, trial.number, progress.step)
        lost = ""
        run_id = trial.user_attrs.get("run_id", "")
        trained = progress.step == self.study.training.steps  # its checkpoint is of no use, and may be gone
        if progress.step and not trained and not self.checkpoints.fetch(trial.number, progress.step, run_id):
            lost = f"begins anew, as its checkpoint of step {progress.step} cannot be read"
            progress = Progress()
        self.checkpoints.keep_only(trial.number, progress.step)
        entry = enter(settled, self.books, self.planner, progress)
        died = deaths(trial)
        live = self.live[trial.number] = Live(
            record=entry.record,
            seeds=entry.seeds,
            searching=resumes is None and about.role != "finalist",
            spared=resumes is not None or about.role != "search",
            suspect=died >= SUSPECT,
        )
        self.display.trial(trial.number, entry.record.config, progress.step, lost or entry.note)
        if trained:  # all but the outcome was recorded
            self._end(live, "complete")
        elif entry.refusal:
            self._end(live, *entry.refusal)
        elif died >= POISON:
            self._end(live, "crashed", f"{died} workers died in this trial, at step {progress.step}; see their logs")

    # ---------------------------------------------------------------- a round

    def _goals(self) -> dict[int, int]:
        """Who trains in this round, and until when. In halving those who are furthest behind, so that whoever waits at
        a rung is compared with all that come to it."""
        racing = [live for live in self.live.values() if not live.spared]
        if self.study.search.pruner in HALVING:
            racing = [live for live in racing if live.step == min(other.step for other in racing)]
        goals = {live.number: min(s for s in decisions(self.study) if s > live.step) for live in racing}
        rest = [live.number for live in self.live.values() if live.spared]
        return goals | dict.fromkeys(rest, self.study.training.steps)

    def _train(self, goals: dict[int, int]) -> None:
        """Bring every trial to its goal."""
        for live in self.live.values():
            live.goal, live.begun = goals.get(live.number, 0), False
        self.crew.work(len(goals), self._next_pass, self._on_step, self._on_reports)

    def _next_pass(self) -> list[Job]:
        """Who trains next, in one pass: whoever has begun, then whoever will take longest."""
        waiting = [live for live in self.live.values() if live.step < live.goal and not live.busy]
        if not waiting:
            return []
        passes = [[self._job(live)] for live in waiting if live.suspect]
        passes += self.shop.passes([self._job(live) for live in waiting if not live.suspect])
        if self.planner:
            passes = [own for jobs in passes for own in self.planner.fitting(jobs)]

        def urgency(jobs: list[Job]) -> tuple[bool, float]:
            lives = [self.live[job.trial] for job in jobs]
            return any(live.begun for live in lives), sum(self._seconds(live) for live in lives)

        jobs = max(passes, key=urgency)
        for job in jobs:
            live = self.live[job.trial]
            live.begun = live.busy = True
            if live.suspect:
                self.fleet.alone(live.record.trial)
        return jobs

    def _prune(self) -> None:
        """Losers leave. All are judged before the first one does."""
        self._check_mine(list(self.live))
        if self.study.objective.several:  # Optuna's pruners know one
            return
        racing = [live for live in self.live.values() if not live.spared]
        for live in [live for live in racing if live.record.trial.should_prune()]:
            self._end(live, "pruned", f"worse than others at step {live.step}")

    def _job(self, live: Live) -> Job:
        """A trial's next stretch: to its next evaluation, of which one is enough where nothing trains."""
        every = self.study.training.eval_steps
        ends = every if learns(live.record.config.method) else every[-1:]
        number, step, until = live.number, live.step, min(s for s in ends if s > live.step)
        return Job(
            trial=number,
            seeds=live.seeds,
            config=live.record.config,
            begin=self.checkpoints.at(number, step) if step else None,
            end=self.checkpoints.at(number, until),
            until=until,
            results=self.checkpoints.results(number) if until == self.study.training.steps else None,
            seconds=live.record.seconds_left,
        )

    def _seconds(self, live: Live) -> float:
        """How long a trial will take to its goal, as far as one can tell."""
        unknown = max(self._pace.values(), default=1.0)
        pace = self._pace.get(live.number, self._pace.get(live.record.config.label, unknown))
        return pace * (live.goal - live.step)

    def _on_step(self, number: int, step: int, loss: float) -> None:
        self.interrupt.check()
        self.live[number].losses[step] = loss
        self.display.step(number, step, loss)

    def _on_reports(self, reports: Sequence[Report]) -> None:
        """Record what came of a pass."""
        self.shop.bench.packing.observe(reports)
        if self.planner:
            self.planner.note(reports, [self.live[report.trial].record.config for report in reports])
        self._check_mine([report.trial for report in reports])
        for report in reports:
            if isinstance(report.error, StorageError):
                raise report.error
            if report.trial in self.live:
                try:
                    self._record(self.live[report.trial], report)
                except UpdateFinishedTrialError:  # this process stood still just now
                    self._lose(report.trial)

    def _record(self, live: Live, report: Report) -> None:
        """Record what came of a trial's stretch, and whether it ends."""
        at_end = report.step == self.study.training.steps
        if not report.error and not at_end:
            self.checkpoints.share(live.number, report.step, live.record.run)
        live.record.stint(report, live.losses, self.checkpoints.results(live.number) if at_end else None)
        live.losses.clear()
        live.busy = False
        if report.error:
            return self._end(live, outcome(report.error), str(report.error), report.trace)
        self.display.evaluated(live.number, live.step, report.metrics)
        if too_slow := live.record.too_slow:
            return self._end(live, "timed_out", too_slow)
        if at_end:
            return self._end(live, "complete")
        self.checkpoints.keep_only(live.number, live.step)
        self.checkpoints.discard(live.number, live.record.run, live.step)
        seconds = report.costs.get("seconds/train", 0.0) / report.made
        self._pace |= {live.number: seconds, live.record.config.label: seconds}
        return None

    # ---------------------------------------------------------------- who leaves

    def _check_mine(self, numbers: Sequence[int]) -> None:
        """Leave alone what others took, since this process stood still for long and was thought dead."""
        for number in numbers:
            if not self.fleet.owns(self.live[number].record.trial):
                self._lose(number)

    def _lose(self, number: int) -> None:
        """A trial is another worker's."""
        self.display.lost(number)
        self.fleet.forget(self.live.pop(number).record.trial)

    def _end(self, live: Live, how: Outcome, message: str = "", trace: str = "") -> None:
        """A trial ends with an outcome. Of pruned ones the checkpoint stays, so that they can be taken up again."""
        record = live.record
        self.checkpoints.discard(live.number, record.run)
        record.end(how, message, trace)
        self.fleet.forget(record.trial)
        self.checkpoints.keep_only(live.number, live.step if how == "pruned" else None)
        self.display.finished(live.number, how, message, record.objective, record.progress.seconds)
        del self.live[live.number]
        if self.failures:
            self.failures.check()


def check_pruned(study: Study, home: Path, known: optuna.Study | None, number: int) -> None:
    """Refuse to take up a trial that was not pruned, or whose checkpoint is gone.

    Args:
        known: what the store holds of the study.

    Raises:
        StorageError: says which it is.
    """
    trials = known.get_trials(deepcopy=False) if known else []
    if known is None or not 0 <= number < len(trials):
        raise StorageError(f"The study {study.name!r} has no trial {number} to take up again; it has {len(trials)}.")
    trial, refusal = trials[number], f"Trial {number} cannot be taken up again:"
    if trial.user_attrs.get(OUTCOME) != "pruned":
        raise StorageError(f"{refusal} it is {trial.user_attrs.get(OUTCOME, 'running')}, not pruned.")
    for other in trials:
        if other.user_attrs.get(RESUMES) == number:
            raise StorageError(f"{refusal} that was done, as trial {other.number}.")
    file = Checkpoints(home, known).at(number, trial.user_attrs.get(PROGRESS, {}).get("step", 0))
    if not file.exists():
        raise StorageError(f"{refusal} there is no checkpoint {file}. (Trials of `--solo` have none.)")
