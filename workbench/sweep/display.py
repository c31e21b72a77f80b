"""What a sweep shows while it runs: bars on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from workbench.tracking.outcomes import spelt, tally

from . import budget
from .finalists import expected
from .roles import OUTCOME, label_of
from .space import TrialConfig, combinations
from .spec import Study


class Display:
    """Shows one study's progress on a console."""

    def __init__(self, study: Study, console: Console | None = None):
        self.study = study
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._study_bar: TaskID | None = None
        self._bars: dict[int, TaskID] = {}
        self._names: dict[int, str] = {}
        self._ended: Counter[str] = Counter()

    @contextmanager
    def open(self) -> Iterator[Display]:
        """Keep bars on a terminal while the sweep runs."""
        if not self.console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._progress:
            yield self
        self._progress = None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is being waited for."""
        self.say(f"{what} ...")
        yield

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, earlier: Sequence[FrozenTrial], notes: Sequence[str]) -> None:
        """The study is open; trials follow."""
        for note in notes:
            self.say(f"note: {note}")
        done = sum(trial.state.is_finished() for trial in earlier)
        cut_off = sum(trial.state == TrialState.RUNNING for trial in earlier)
        if earlier:
            again = f", {cut_off} {'goes' if cut_off == 1 else 'go'} on" if cut_off else ""
            self.say(f"resuming study {self.study.name}: {done} trials are done{again}")
        else:
            self.say(
                f"study {self.study.name}: {budget.words(self.study)}, {self.study.objective.goal} "
                f"{self.study.objective.metric}"
            )
        if self._progress:
            every = expected(self.study)
            total = round(sum(every.values())) if every else None
            self._study_bar = self._progress.add_task(f"study {self.study.name}", total=total, completed=done, note="")

    def trial(self, number: int, config: TrialConfig, step: int = 0, note: str = "") -> None:
        """A trial takes part, from a step on.

        Args:
            note: what is special about it.
        """
        varied = ", ".join(f"{key}={value}" for key, value in config.describe().items())
        name = self._names[number] = f"trial {number} {config.label}"
        if not self._progress:
            words = [varied, note, f"from step {step}" if step else ""]
            told = ", ".join(filter(None, words))
            self.say(f"{name}: {told}" if told else name)

    def step(self, number: int, step: int, loss: float) -> None:
        """A trial made a step. Only trials that train have bars, so that many live ones do not fill the screen."""
        if self._progress:
            if number not in self._bars:
                steps = self.study.training.steps
                self._bars[number] = self._progress.add_task(self._names[number], total=steps, note="")
            self._progress.update(self._bars[number], completed=step, note=f"loss {loss:.4f}", visible=True)

    def evaluated(self, number: int, step: int, metrics: Mapping[str, float]) -> None:
        """A trial was measured on the validation split, which ends a stretch of training."""
        if self._progress:
            self._progress.update(self._bars[number], visible=False)
        else:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.say(f"{self._names[number]}: step {step}: {shown}")

    def finished(self, number: int, outcome: str, message: str, value: float | None, seconds: float) -> None:
        """A trial ended."""
        result = f"{self.study.objective.metric} {value:.4f}" if value is not None else ""
        parts = [
            spelt(outcome),
            result,
            f"{seconds:.1f} s",
            message.splitlines()[0] if message and outcome != "complete" else "",
        ]
        self.say(f"{self._names[number]}: {', '.join(filter(None, parts))}")
        if self._progress and number in self._bars:
            self._progress.remove_task(self._bars.pop(number))
        self._ended[outcome] += 1
        if self._progress and self._study_bar is not None:
            self._progress.advance(self._study_bar)

    def elsewhere(self, trial: FrozenTrial) -> None:
        """A trial ended with a worker that has a display of its own."""
        progress = trial.user_attrs.get(budget.PROGRESS, {})
        self._names[trial.number] = f"trial {trial.number} {label_of(trial, self.study)}"
        value = progress.get("metrics", {}).get(self.study.objective.metric)
        outcome = trial.user_attrs.get(OUTCOME, trial.state.name.lower())
        self.finished(trial.number, outcome, "", value, budget.cost(trial, "seconds"))

    def lost(self, number: int) -> None:
        """Another worker took a trial."""
        self.say(f"{self._names[number]}: this process stood still for so long that another worker goes on with it")
        if self._progress and number in self._bars:
            self._progress.remove_task(self._bars.pop(number))

    def ended(self, seconds: float) -> None:
        """This sweep is over."""
        self.say(f"{self._ended.total()} trials in {seconds:.1f} s: {tally(self._ended.elements())}")

    def finished_before(self, trials: Sequence[FrozenTrial]) -> None:
        """There is nothing left to do."""
        tried = f"study {self.study.name} is finished: {len(trials)} trials"
        if self.study.search.sampler == "grid" and len(trials) >= (combinations(self.study) or 0):
            self.say(f"{tried}, every combination of its grid.")
        else:
            self.say(f"{tried} have used its budget ({budget.words(self.study)}). Raise the budget to go on with it.")
