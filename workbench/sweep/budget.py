"""When a search ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from .space import combinations
from .spec import Study

PROGRESS = "progress"  # attribute of a trial: how far it came, as of the last evaluation that was recorded
RESUMES = "resumes"  # attribute of a trial that takes a pruned one up again, which the budget has paid for
SECONDS = "seconds"  # attribute of a study: how long its sweeps took


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that the budget counts: all but those that take pruned ones up again."""
    return [trial for trial in trials if RESUMES not in trial.user_attrs]


def spent(study: Study, trials: Sequence[FrozenTrial], seconds: float) -> bool:
    """Whether the budget is used up, so that no further trial starts. A trial that is live counts with all its steps.

    Args:
        seconds: of all the sweeps of the study.
    """
    budget, found = study.budget, counted(trials)
    every = combinations(study) if study.search.sampler == "grid" else None
    return (
        (budget.trials is not None and len(found) >= budget.trials)
        or (every is not None and len(found) >= every)
        or (budget.steps is not None and sum(steps(study, trial) for trial in found) >= budget.steps)
        or (budget.minutes is not None and seconds >= 60 * budget.minutes)
    )


def steps(study: Study, trial: FrozenTrial) -> int:
    """The steps that a trial made, or will make."""
    return trial.user_attrs.get(PROGRESS, {}).get("step", 0) if trial.state.is_finished() else study.training.steps


def words(study: Study) -> str:
    """The study's budget in words."""
    given = study.budget.model_dump(exclude_none=True)
    return ", ".join(f"{amount:g} {unit}" for unit, amount in given.items())


class Clock:
    """Wall-clock time of a study's sweeps, this one included; `save` keeps it with the study."""

    def __init__(self, optuna_study: optuna.Study):
        self._study = optuna_study
        self._earlier = optuna_study.user_attrs.get(SECONDS, 0.0)
        self._started = time.monotonic()

    @property
    def session(self) -> float:
        """Seconds of this sweep."""
        return time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        """Seconds of all of them."""
        return self._earlier + self.session

    def save(self) -> None:
        """Keep the time for the next sweep of the study."""
        self._study.set_user_attr(SECONDS, self.seconds)
