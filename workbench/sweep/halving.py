"""Successive halving and Hyperband: at each rung the best third of the trials goes on."""

from __future__ import annotations

import math

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

ETA = 3  # a third goes on, and trains three times as long


def rungs(first: int, last: int) -> list[int]:
    """The steps at which halving decides: `first`, three times that, nine times that ... below `last`."""
    found = []
    while first < last:
        found.append(first)
        first *= ETA
    return found


class Halving(BasePruner):
    """Keeps a trial at a rung if it is among the best third of those that have come to the rung.

    Successive halving is Jamieson & Talwalkar, 2016 (arXiv:1502.07943), Hyperband Li et al., 2018 (arXiv:1603.06560).
    Optuna's own pruners keep whoever is first at a rung; this one looks at nothing but the values that were reported:
    trials that report before any of them is judged are compared with one another, in whichever order they are judged.

    Args:
        first: step of the first rung.
        last: of a trial, where nothing is left to decide.
        brackets: Hyperband: trials are dealt out to brackets, by number; bracket `b` begins with rung `b` and only its
            own trials compete.
    """

    def __init__(self, first: int, last: int, *, brackets: bool = False):
        self.rungs = rungs(first, last)
        count = len(rungs(first, last + 1)) if brackets else 1
        sizes = [math.ceil(count * ETA**s / (s + 1)) for s in reversed(range(count))]
        self._brackets = [bracket for bracket, size in enumerate(sizes) for _ in range(size)]

    def bracket(self, number: int) -> int:
        """The bracket of a trial."""
        return self._brackets[number % len(self._brackets)]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, at the step that it reported last, is to be stopped."""
        step, bracket = trial.last_step, self.bracket(trial.number)
        if step not in self.rungs[bracket:]:
            return False
        values = sorted(
            (
                other.intermediate_values[step]
                for other in study.get_trials(deepcopy=False)
                if step in other.intermediate_values and self.bracket(other.number) == bracket
            ),
            reverse=study.direction == StudyDirection.MAXIMIZE,
        )
        return trial.intermediate_values[step] not in values[: max(1, len(values) // ETA)]
