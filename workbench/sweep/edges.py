"""Whether a search ended where its range does: the best value may lie beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from .roles import drawn, of_label
from .space import METHOD
from .spec import Study

MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)
ENOUGH = 5  # measured trials of a method, from which on its best one says something
NEAR = 0.02  # share of a range


def edges(study: Study, trials: Sequence[FrozenTrial]) -> list[str]:
    """What to widen: a sentence for each hyperparameter whose best value, over a method's complete trials, is at the
    end of what was searched."""
    found = []
    best = max if study.objective.goal == "maximize" else min
    for label in study.methods:
        own = of_label(drawn(trials), label, study)
        complete = [trial for trial in own if trial.state == TrialState.COMPLETE]
        if not complete or sum(trial.state in MEASURED for trial in own) < ENOUGH:
            continue
        top = best(complete, key=lambda trial: trial.values[0])
        for name, distribution in top.distributions.items():
            if name != METHOD and (words := end(top.params[name], distribution)):
                found.append(f"{name} = {top.params[name]:.3g} was best, at the {words}; widen it to be sure")
    return found


def end(value: Any, distribution: BaseDistribution) -> str:
    """Which end of a range a value is at, in words; "" if it is at none, or at one that is a limit by nature."""
    match distribution:
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high) if low < high:
            scale = math.log if distribution.log else float
            place = (scale(value) - scale(low)) / (scale(high) - scale(low))
        case CategoricalDistribution(choices=choices) if len(choices) > 2 and all(map(is_number, choices)):
            low, high = min(choices), max(choices)  # type: ignore[type-var,assignment]
            place = {low: 0.0, high: 1.0}.get(value, 0.5)
        case _:
            return ""
    if place >= 1 - NEAR:
        return f"upper end of {low:g} ... {high:g}"
    least = low == 0 or (low == 1 and isinstance(value, int))
    return f"lower end of {low:g} ... {high:g}" if place <= NEAR and not least else ""


def is_number(value: Any) -> bool:
    """Whether a choice has neighbours."""
    return isinstance(value, int | float) and not isinstance(value, bool)
