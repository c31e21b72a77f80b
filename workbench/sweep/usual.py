"""A method's own defaults as a trial of a study: what somebody would get who tunes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from optuna.trial import BaseTrial

from .baselines import CHOICES
from .domains import Scalar, encode
from .space import METHOD, suggest
from .spec import Study


def usual_params(study: Study, label: str) -> dict[str, Any]:
    """Optuna's parameters of a method's defaults: of its configuration class, and of the study's training section.

    Where the search space leaves a default out it is what is closest: the nearest number, else the first of the values.
    """
    trial = Usual(study, label)
    suggest(cast(BaseTrial, trial), study)
    return trial.params


class Usual:
    """Stands for Optuna's trial when a configuration is drawn, and takes what is usual.

    Attributes:
        params: what was taken.
    """

    def __init__(self, study: Study, label: str):
        self.params: dict[str, Any] = {}
        config = CHOICES[study.methods[label].method].config
        own = {field.name: field.default for field in dataclasses.fields(config)}
        values = study.training.model_dump() | own
        self._usual = {METHOD: label} | {f"{label}.{key}": value for key, value in values.items()}

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Scalar:
        """One of several values."""
        usual = self._usual.get(name)
        if is_number(usual) and all(map(is_number, choices)):
            chosen = min(choices, key=lambda choice: abs(choice - usual))  # type: ignore[operator]
        else:
            usual = None if usual is dataclasses.MISSING else encode(usual)
            chosen = usual if usual in choices else choices[0]
        self.params[name] = chosen
        return chosen

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number of a range."""
        self.params[name] = round(self._nearest(name, low, high, step))
        return self.params[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number of a range."""
        self.params[name] = self._nearest(name, low, high, step)
        return self.params[name]

    def _nearest(self, name: str, low: float, high: float, step: float | None) -> float:
        usual: Any = self._usual.get(name)
        nearest = min(max(usual, low), high) if is_number(usual) else low
        return low + round((nearest - low) / step) * step if step else nearest


def is_number(value: Any) -> bool:
    """Whether there are values nearer to it than others."""
    return isinstance(value, int | float) and not isinstance(value, bool)
