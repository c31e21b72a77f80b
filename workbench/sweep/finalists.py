"""The best of each method, trained again on other seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from optuna.trial import FrozenTrial, TrialState

from .baselines import learns
from .roles import About, counted, label_of, of_label
from .spec import Study
from .workshop import Seeds

APART = 10_000  # seeds of finalists are that far from those of the search, which have chosen them


def chosen(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best configurations of each method, by the first trial of each. One that was tried several times counts by
    its mean."""
    if study.finalists is None:
        return []
    best = []
    complete = [trial for trial in counted(trials) if trial.state == TrialState.COMPLETE]
    for label in study.methods:
        tried: dict[str, list[FrozenTrial]] = {}
        for trial in of_label(complete, label, study):
            tried.setdefault(About.of_trial(trial).config, []).append(trial)
        ranked = sorted(tried.values(), key=mean, reverse=study.objective.goal == "maximize")
        best += [own[0] for own in ranked[: study.finalists.per_method]]
    return best


def mean(trials: Sequence[FrozenTrial]) -> float:
    """The metric over trials of one configuration."""
    return sum(trial.values[0] for trial in trials) / len(trials)


def shape(study: Study, label: str) -> tuple[int, int]:
    """How many initialisations and orders a method's finalists are trained on: one where nothing learns."""
    assert study.finalists is not None
    if not learns(study.methods[label].method):
        return 1, 1
    return study.finalists.initialisations, study.finalists.orders


def expected(study: Study) -> dict[str, float] | None:
    """How many trials each method will have, finalists included, if methods are drawn alike; None: nobody knows."""
    budget, methods = study.budget, study.methods
    limits = [budget.trials and budget.trials / len(methods), budget.per_method and budget.per_method.trials]
    each = min((limit for limit in limits if limit), default=None)
    if each is None:
        return None
    searched = {label: min(each, spec.size or each) if budget.per_method else each for label, spec in methods.items()}
    if study.finalists is None:
        return searched
    return {label: own + study.finalists.per_method * math.prod(shape(study, label)) for label, own in searched.items()}


def missing(study: Study, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, Seeds]]:
    """What is still to be trained: each chosen trial on every initialisation with every order of the data."""
    if study.finalists is None:
        return
    abouts = [About.of_trial(trial) for trial in trials]
    there = {(about.of, about.init, about.order) for about in abouts if about.role == "finalist"}
    first = study.training.seed + APART
    for trial in chosen(study, trials):
        rows, columns = shape(study, label_of(trial, study))
        for i in range(rows):
            for j in range(columns):
                if (trial.number, first + i, first + j) not in there:
                    yield trial, Seeds(first + i, first + j)
