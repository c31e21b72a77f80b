"""When a search ends, and whose turn it is."""

from __future__ import annotations

import time
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from .roles import About, counted, drawn, of_label
from .space import combinations
from .spec import Study

PROGRESS = "progress"  # attribute of a trial: how far it came, as of the last evaluation that was recorded
SECONDS = "seconds"  # attribute of a study: how long its sweeps took
STUCK = 30  # skipped trials in a row after which a sampler has nothing new to say


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
        or (next_label(study, trials) is None if budget.per_method else stuck(trials))
    )


def next_label(study: Study, trials: Sequence[FrozenTrial]) -> str | None:
    """The method that has used the least of its own budget; None if all have used theirs, or have nothing new."""
    shares = {}
    for label, spec in study.methods.items():
        own = of_label(trials, label, study)
        tried = {About.of_trial(trial).config for trial in drawn(own)} - {""}
        everything = spec.size is not None and len(tried) >= spec.size
        if (used := share(study, counted(own))) < 1 and not everything and not stuck(own):
            shares[label] = used
    return min(shares, key=shares.__getitem__, default=None)


def stuck(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the last trials were all skipped."""
    last = drawn(trials)[-STUCK:]
    return len(last) == STUCK and not counted(last)


def share(study: Study, trials: Sequence[FrozenTrial]) -> float:
    """How much of a method's budget its trials have used: of what is given, that which ends first."""
    assert study.budget.per_method is not None
    used = {
        "trials": float(len(trials)),
        "steps": float(sum(steps(study, trial) for trial in trials)),
        "tokens": use(trials, "tokens"),
        "seconds": use(trials, "seconds"),
    }
    return max(used[unit] / limit for unit, limit in study.budget.per_method.given.items())


def use(trials: Sequence[FrozenTrial], unit: str) -> float:
    """Tokens or seconds that trials took. A trial that is live will take as much as the longest one did."""
    taken = {trial.number: cost(trial, unit) for trial in trials}
    longest = max((taken[trial.number] for trial in trials if trial.state == TrialState.COMPLETE), default=0.0)
    return sum(
        own if trial.state.is_finished() else max(own, longest)
        for trial, own in zip(trials, taken.values(), strict=True)
    )


def cost(trial: FrozenTrial, unit: str) -> float:
    """Tokens that a trial was trained on, or seconds that it took, so far."""
    progress = trial.user_attrs.get(PROGRESS, {})
    if unit == "tokens":
        return float(progress.get("tokens", 0))
    return sum(value for key, value in progress.get("costs", {}).items() if key.startswith("seconds/"))


def steps(study: Study, trial: FrozenTrial) -> int:
    """The steps that a trial made, or will make."""
    return trial.user_attrs.get(PROGRESS, {}).get("step", 0) if trial.state.is_finished() else study.training.steps


def words(study: Study) -> str:
    """The study's budget in words."""
    given = study.budget.model_dump(exclude_none=True, exclude={"per_method"})
    parts = [f"{amount:g} {unit}" for unit, amount in given.items()]
    if study.budget.per_method:
        parts += [f"{amount:g} {unit} for each method" for unit, amount in study.budget.per_method.given.items()]
    return ", ".join(parts)


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
