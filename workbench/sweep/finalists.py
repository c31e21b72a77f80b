"""The best of each method, trained again on other seeds."""

from __future__ import annotations

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


def missing(study: Study, trials: Sequence[FrozenTrial]) -> Iterator[tuple[FrozenTrial, Seeds]]:
    """What is still to be trained: each chosen trial on every initialisation with every order of the data."""
    if study.finalists is None:
        return
    abouts = [About.of_trial(trial) for trial in trials]
    there = {(about.of, about.init, about.order) for about in abouts if about.role == "finalist"}
    first = study.training.seed + APART
    for trial in chosen(study, trials):
        shape = study.finalists.initialisations, study.finalists.orders
        rows, columns = shape if learns(study.methods[label_of(trial, study)].method) else (1, 1)
        for i in range(rows):
            for j in range(columns):
                if (trial.number, first + i, first + j) not in there:
                    yield trial, Seeds(first + i, first + j)
