"""From a study's search space to one trial's settings, by Optuna's define-by-run interface."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial, FixedTrial

from workbench.errors import StorageError

from .domains import Choice, Constant, Domain, Number, Range, TokenRange, Tokens, encode, size, total
from .halving import rungs
from .spec import Study

METHOD = "method"
HALVING = ("successive_halving", "hyperband")


@dataclass(frozen=True)
class TrialConfig:
    """What one trial trains.

    Attributes:
        label: the entry of the study's `methods`.
        method: the registered method.
        adapter: keyword arguments of its configuration class; tokens as `Tokens`, to be resolved.
        training: settings that replace those of the training section.
        varied: the keys of both that the study searches.
        size: what was solved for, so that it has as many parameters as others (`match`).
    """

    label: str
    method: str
    adapter: dict[str, Any]
    training: dict[str, float | str]
    varied: tuple[str, ...]
    size: int | None = None

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """The texts that the trial adds to the vocabulary."""
        wanted = [value for value in self.adapter.values() if isinstance(value, Tokens)]
        return tuple(dict.fromkeys(token for tokens in wanted for token in tokens.new_tokens))

    @property
    def key(self) -> str:
        """Hash of label and hyperparameters: the same for whatever trains the same, but for seeds."""
        values = sorted((self.adapter | self.training).items())
        return hashlib.sha256(repr((self.label, self.method, values)).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, str]:
        """The searched hyperparameters in a short form for people, e.g. {"r": "8", "learning_rate": "0.00123"}."""
        values = self.adapter | self.training
        return {key: brief(values[key]) for key in self.varied}


def suggest(trial: BaseTrial, study: Study) -> TrialConfig:
    """Draw one trial's settings. Optuna's parameters are `method` (where there are several) and `<label>.<field>`."""
    labels = list(study.methods)
    label = trial.suggest_categorical(METHOD, labels) if len(labels) > 1 else labels[0]
    spec = study.methods[label]
    adapter = {key: _draw(trial, f"{label}.{key}", domain) for key, domain in spec.adapter.items()}
    training = {key: _draw(trial, f"{label}.{key}", domain) for key, domain in spec.training.items()}
    varied = tuple(key for key, domain in spec.domains.items() if size(domain) != 1)
    return TrialConfig(label, spec.method, adapter, training, varied)


def from_params(params: dict[str, Any], study: Study) -> TrialConfig:
    """The settings of a stored trial.

    Raises:
        StorageError: the parameters do not fit the study, whose file was changed.
    """
    try:
        return suggest(FixedTrial(params), study)
    except (ValueError, KeyError) as error:
        raise StorageError(
            f"A stored trial does not fit {study.path}: {error} The search space was changed; "
            "give the changed study another name, or restore the file."
        ) from error


def combinations(study: Study) -> int | None:
    """How many different trials there are; None: a range is continuous."""
    return total(spec.size for spec in study.methods.values())


def decisions(study: Study) -> list[int]:
    """The steps at which a trial may be stopped; the last one ends it."""
    steps = study.training.eval_steps
    match study.search.pruner:
        case "median" | "percentile" | "patient":
            return steps
        case "hyperband" | "successive_halving":
            return [*rungs(steps[0], steps[-1]), steps[-1]]
        case "none" | None:
            return steps[-1:]


def in_flight(study: Study) -> int:
    """How many trials are live at once. It does not depend on the machine, so that the trials do not either.

    Who learns from trials (TPE), compares with those that are complete (the median) or may have to stop (minutes)
    should not have many out at once; halving needs enough to choose from; else there may be as many as there are.
    Where methods have budgets of their own, each is compared with itself: there are some of each.
    """
    search, budget = study.search, study.budget
    if search.in_flight:
        return search.in_flight
    halves = search.pruner in HALVING
    careful = search.sampler not in ("random", "grid", "qmc") or budget.minutes is not None
    one_by_one = not halves and (search.pruner != "none" or careful)
    few = 6 if one_by_one else 9 if careful else min(27, budget.trials or 27)
    return max(few, (3 if halves else 2) * len(study.methods)) if budget.per_method else few


def _draw(trial: BaseTrial, name: str, domain: Domain) -> Any:
    match domain:
        case Constant(value):
            return copy.deepcopy(value)  # a configuration may change its list
        case Choice(values):
            by_code = {encode(value): value for value in values}
            chosen = by_code[trial.suggest_categorical(name, list(by_code))]
            return _draw(trial, name, chosen) if isinstance(chosen, TokenRange) else copy.deepcopy(chosen)
        case TokenRange(kind, count):
            return domain.at(_draw(trial, f"{name}.{kind}", count))
        case Range(low, high, log, q):
            # Optuna has no steps on a logarithmic range
            step = None if log else q
            number: Number
            if isinstance(low, int) and isinstance(high, int):
                number = trial.suggest_int(name, low, high, step=int(step or 1), log=log)
            else:
                number = trial.suggest_float(name, low, high, step=step, log=log)
            return low + round((number - low) / q) * q if log and q else number


def brief(value: Any) -> str:
    """A hyperparameter in a few characters."""
    match value:
        case Tokens():
            return value.describe()
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case float():
            return f"{value:.3g}"
        case list():
            return ", ".join(map(str, value)) or "none"
        case _:
            return str(value)
