"""How much each hyperparameter has to do with being among the best, by PED-ANOVA (Watanabe et al. 2023,
arXiv:2304.10255), for hyperparameters that only some methods have as Optuna does it (arXiv:2601.20800)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import DataError

from .searched import Field, Logs, fields, measured
from .stats import Goal

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

LEAST = 20  # trials
TOP = 5  # trials that are to be the best ones at least: fewer have no distribution
SHARE = 0.1  # of the trials that are the best ones, where these are enough
MOST = 1000  # trials; of more, so many are drawn
SHUFFLES = 20
BY_CHANCE = 0.95  # quantile of what hyperparameters come to that have nothing to do with the metric
METHOD = "method"


@dataclass(frozen=True)
class Importance:
    """What PED-ANOVA found.

    Attributes:
        table: columns field, importance (shares of their sum), chance (what shuffled metrics reach in 95 % of cases, in
            the same unit); the most important first.
        trials: how many it was found from.
        best: how many of these are "the best".
    """

    table: pd.DataFrame
    trials: int
    best: int


def importance(trials: pd.DataFrame, logs: Logs, goal: Goal) -> Importance:
    """Importances of the hyperparameters of these trials, of one method or of several.

    Pruned trials count, as worse than those that ran to their end: what survives pruning is all good, and alone it
    would tell little. PED-ANOVA asks only who is among the best, not by how much.

    Raises:
        DataError: there are too few trials, or nothing varies among them.
    """
    found = measured(trials)
    if len(found) < LEAST:
        raise DataError(f"It takes at least {LEAST} measured trials of the search; there are {len(found)}.")
    if len(found) > MOST:
        found = found.sample(MOST, random_state=0)
    varied = _by_label(found, logs)
    if not any(varied.values()) and found["label"].nunique() == 1:
        raise DataError("No hyperparameter varies among these trials.")
    sign = 1 if goal == "maximize" else -1
    worth = found.assign(done=found["outcome"] == "complete", signed=sign * found["objective"])
    # the worst is 0
    ranks = worth.sort_values(["done", "signed"]).assign(rank=range(len(found)))["rank"].reindex(found.index)
    study = _study(found, varied, ranks)
    best = max(TOP, round(SHARE * len(found)))
    values = _divergences(study, best / len(found))
    rng, order = np.random.default_rng(0), ranks.to_numpy()
    shuffled = [_divergences(study, best / len(found), rng.permutation(order)) for _ in range(SHUFFLES)]
    chance = {name: float(np.quantile([each[name] for each in shuffled], BY_CHANCE)) for name in values}
    total = sum(values.values()) or 1.0
    rows = [(name, value / total, chance[name] / total) for name, value in values.items()]
    table = pd.DataFrame(rows, columns=["field", "importance", "chance"])
    return Importance(table.sort_values("importance", ascending=False, ignore_index=True), len(found), best)


def _by_label(trials: pd.DataFrame, logs: Logs) -> dict[str, list[Field]]:
    return {str(label): fields(own, logs) for label, own in trials.groupby("label")}


def _study(trials: pd.DataFrame, varied: Mapping[str, list[Field]], ranks: pd.Series) -> optuna.Study:
    """The trials as a study in memory, with the ranges that were tried."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    levels = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it says that it makes a study
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(levels)
    spaces = {label: {field.name: _distribution(field) for field in own} for label, own in varied.items()}
    values = {label: {field.name: field.values.to_dict() for field in own} for label, own in varied.items()}
    labels = CategoricalDistribution(sorted(varied)) if len(varied) > 1 else None
    made = []
    for index, label in trials["label"].items():
        params: dict[str, Any] = {name: known[index] for name, known in values[label].items() if index in known}
        space: dict[str, BaseDistribution] = {name: spaces[label][name] for name in params}
        if labels:
            params, space = params | {METHOD: label}, space | {METHOD: labels}
        made.append(optuna.trial.create_trial(params=params, distributions=space, value=float(ranks[index])))
    study.add_trials(made)
    return study


def _distribution(field: Field) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not field.numeric or field.values.nunique() <= TOP:  # a few values are no density
        return CategoricalDistribution(sorted(field.values.unique().tolist()))
    return FloatDistribution(float(field.values.min()), float(field.values.max()), log=field.log)


def _divergences(study: optuna.Study, share: float, values: np.ndarray | None = None) -> dict[str, float]:
    """Of each hyperparameter, as if the trials had come to these values, if any are given."""
    from optuna.importance import PedAnovaImportanceEvaluator

    target = None if values is None else (lambda trial: float(values[trial.number]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PedAnovaImportanceEvaluator(target_quantile=share).evaluate(study, target=target)
