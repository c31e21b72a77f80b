"""Which trial comes next: one that was left, a method's defaults, one that the sampler draws, a finalist.

All of these look at what there is and then add to it: to be called in turn, see `Fleet.in_turn`.
"""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from .budget import next_label, spent
from .finalists import missing
from .fleet import Fleet
from .roles import About, drawn, of_label
from .samplers import sampler
from .space import METHOD
from .spec import Study
from .usual import usual_params


def left(study: Study, optuna_study: optuna.Study, fleet: Fleet) -> optuna.Trial | None:
    """A running trial that nobody works on, since its worker died or was stopped; None if there is none. What was not
    yet drawn of it is drawn as it would have been."""
    trials = optuna_study.get_trials(deepcopy=False)
    found = next(iter(fleet.left(trials)), None)
    if found is None:
        return None
    optuna_study.sampler = next_sampler(study, trials[: found.number], found.params.get(METHOD))
    return optuna.Trial(optuna_study, found._trial_id)


def searched(study: Study, optuna_study: optuna.Study, seconds: float) -> optuna.Trial | None:
    """The next trial of the search; None if its budget is spent."""
    if (trial := waiting(optuna_study)) is not None:  # a crash came between two writes
        return trial
    trials = optuna_study.get_trials(deepcopy=False)
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


def waiting(optuna_study: optuna.Study) -> optuna.Trial | None:
    """A trial that was added and that nobody has begun."""
    states = {trial.state for trial in optuna_study.get_trials(deepcopy=False)}
    return optuna_study.ask() if TrialState.WAITING in states else None


def next_sampler(study: Study, trials: list[FrozenTrial], label: str | None = None) -> optuna.samplers.BaseSampler:
    """The sampler after these trials, of the method whose turn it is."""
    if study.budget.per_method and label is None:
        label = next_label(study, trials)
    return sampler(study, len(drawn(trials)), label if study.budget.per_method else None)


def finalist(study: Study, optuna_study: optuna.Study) -> optuna.Trial | None:
    """The next finalist; None if all are there, or the search is not over."""
    trials = optuna_study.get_trials(deepcopy=False)
    if any(not trial.state.is_finished() for trial in drawn(trials)):
        return None
    found = next(missing(study, trials), None)
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
