"""Which trial comes next: one that was cut off, a method's defaults, one that the sampler draws, a finalist."""

from __future__ import annotations

from collections.abc import Iterator

import optuna
from optuna.trial import FrozenTrial, TrialState

from .budget import next_label, spent
from .finalists import missing
from .roles import About, drawn, of_label
from .samplers import sampler
from .space import METHOD
from .spec import Study
from .usual import usual_params


def cut_off(study: Study, optuna_study: optuna.Study) -> Iterator[optuna.Trial]:
    """Trials that a dead process left running. What was not yet drawn of them is drawn as it would have been."""
    trials = optuna_study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            optuna_study.sampler = next_sampler(study, trials[: trial.number], trial.params.get(METHOD))
            yield optuna.Trial(optuna_study, trial._trial_id)


def searched(study: Study, optuna_study: optuna.Study, seconds: float) -> optuna.Trial | None:
    """The next trial of the search; None if its budget is spent."""
    trials = optuna_study.get_trials(deepcopy=False)
    if any(trial.state == TrialState.WAITING for trial in trials):  # a crash came between two writes
        return optuna_study.ask()
    if spent(study, trials, seconds):
        return None
    if study.budget.per_method:
        label = next_label(study, trials)
        assert label is not None  # else it is spent
        if not drawn(of_label(trials, label, study)):
            optuna_study.enqueue_trial(usual_params(study, label), user_attrs=About(role="default").plain)
    # the sampler starts anew for each, so that what is drawn depends on the trials before, not on restarts
    optuna_study.sampler = next_sampler(study, trials)
    return optuna_study.ask()


def next_sampler(study: Study, trials: list[FrozenTrial], label: str | None = None) -> optuna.samplers.BaseSampler:
    """The sampler after these trials, of the method whose turn it is."""
    if study.budget.per_method and label is None:
        label = next_label(study, trials)
    return sampler(study, len(drawn(trials)), label if study.budget.per_method else None)


def finalist(study: Study, optuna_study: optuna.Study) -> optuna.Trial | None:
    """The next finalist; None if all are there. It is asked for when the search is over."""
    found = next(missing(study, optuna_study.get_trials(deepcopy=False)), None)
    if found is None:
        return None
    trial, seeds = found
    about = About(role="finalist", of=trial.number, init=seeds.init, order=seeds.order)
    optuna_study.enqueue_trial(trial.params, user_attrs=about.plain)
    return optuna_study.ask()


def is_over(study: Study, trials: list[FrozenTrial], seconds: float) -> bool:
    """Whether there is nothing left to do."""
    ended = all(trial.state.is_finished() for trial in trials)
    return ended and spent(study, trials, seconds) and next(missing(study, trials), None) is None
