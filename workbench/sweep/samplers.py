"""Optuna's samplers and pruners by name, seeded, each method for itself where methods have budgets of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PatientPruner, PercentilePruner
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from .halving import Halving
from .roles import counted, of_label
from .space import METHOD
from .spec import Study

STARTUP = 10  # Optuna's own number of random trials before a model is made of them


class Exhaustive(BruteForceSampler):
    """Every combination once, also in a conditional space; after `combinations` trials it repeats itself."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Optuna's own calls `Study.stop` at the end, which raises in an ask-and-tell loop."""


def sampler(study: Study, drawn: int = 0, label: str | None = None) -> BaseSampler:
    """Optuna's sampler for the study's search, seeded.

    Args:
        drawn: trials that are there already; a study that is resumed must not draw its first values again.
        label: the method whose turn it is; None: the sampler chooses.
    """
    seed = int(np.random.SeedSequence([study.search.seed, drawn]).generate_state(1)[0])
    options = study.search.sampler_options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match study.search.sampler:
            case "tpe":
                # `group`: each method's parameters are modelled together, which a conditional space needs
                made: BaseSampler = TPESampler(
                    **{"seed": seed, "multivariate": True, "group": True, **startup(study), **options}
                )
            case "gp":
                made = GPSampler(**{"seed": seed, "warn_independent_sampling": False, **startup(study), **options})
            case "cmaes":
                made = CmaEsSampler(**{"seed": seed, "warn_independent_sampling": False, **options})
            case "nsgaii":
                made = NSGAIISampler(**{"seed": seed, **options})
            case "random":
                made = RandomSampler(seed=seed)
            case "grid":
                made = Exhaustive(seed=seed)
            case "qmc":  # it counts the stored trials itself
                made = QMCSampler(**{"seed": study.search.seed, "scramble": True, **options})
    return Within(made, study, label)


def startup(study: Study) -> dict[str, int]:
    """How many random trials come first: a third of a method's, where it has few."""
    own = study.budget.per_method and study.budget.per_method.trials
    return {"n_startup_trials": max(3, min(STARTUP, own // 3))} if own else {}


def pruner(study: Study) -> BasePruner:
    """The pruner of the study's search; a trial reports at the steps `training.eval_steps`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made = _pruner(study, study.search.pruner_options)
    return PerMethod(made, study) if study.budget.per_method else made


def _pruner(study: Study, options: dict[str, Any]) -> BasePruner:
    match study.search.pruner:
        case "median":
            return MedianPruner(**options)
        case "percentile":
            return PercentilePruner(**{"percentile": 25.0, **options})
        case "patient":
            return PatientPruner(MedianPruner(), **{"patience": 1, **options})
        case "hyperband" | "successive_halving" as name:
            return Halving(study.training.eval_steps[0], study.training.steps, brackets=name == "hyperband")
        case "none" | None:
            return NopPruner()


# ---------------------------------------------------------------- one method at a time


class View(optuna.Study):
    """A study in which there are none but some of its trials."""

    _keep: Callable[[list[FrozenTrial]], list[FrozenTrial]]

    @classmethod
    def of(cls, study: optuna.Study, keep: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> View:
        """The trials that `keep` leaves."""
        view = cls.__new__(cls)
        view.__dict__.update(study.__dict__)
        view._keep = keep
        return view

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        # Optuna's own way to the trials, for samplers and pruners alike
        return self._keep(super()._get_trials(deepcopy=deepcopy, states=states, use_cache=use_cache))


class Within(BaseSampler):
    """A sampler that learns from nothing but the search, and from nothing but one method's trials while it is that
    method's turn: finalists repeat what was found, and what is good for one method says nothing of another."""

    def __init__(self, sampler: BaseSampler, study: Study, label: str | None):
        self.sampler, self.study, self.label = sampler, study, label

    def _view(self, study: optuna.Study) -> View:
        def keep(trials: list[FrozenTrial]) -> list[FrozenTrial]:
            known = counted(trials)
            return known if self.label is None else of_label(known, self.label, self.study)

        return View.of(study, keep)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space = self.sampler.infer_relative_search_space(self._view(study), trial)
        return {name: own for name, own in space.items() if self.label is None or name != METHOD}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.sampler.sample_relative(self._view(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name == METHOD and self.label is not None:
            return self.label
        return self.sampler.sample_independent(self._view(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(self._view(study), trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.sampler.after_trial(self._view(study), trial, state, values)


class PerMethod(BasePruner):
    """A pruner that compares a trial with those of its own method only: a slow one would never come to its end."""

    def __init__(self, pruner: BasePruner, study: Study):
        self.pruner, self.study = pruner, study

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        label = trial.params.get(METHOD, next(iter(self.study.methods)))
        return self.pruner.prune(View.of(study, lambda trials: of_label(trials, label, self.study)), trial)
