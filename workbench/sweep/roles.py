"""Why a trial is there, and what it repeats: kept with Optuna's trial, as the attribute `about`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from .space import METHOD
from .spec import Study

ABOUT = "about"  # attribute of a trial
OUTCOME = "outcome"  # attribute of a trial that has ended
RESUMES = "resumes"  # attribute of a trial that takes a pruned one up again, which the budget has paid for
DUPLICATE: Literal["duplicate"] = "duplicate"  # outcome of a trial that was not trained, since there is one like it

Role = Literal["search", "default", "finalist"]


@dataclass(frozen=True)
class About:
    """What is known of a trial beside its hyperparameters.

    Attributes:
        role: search: drawn by the sampler; default: a method's own defaults; finalist: trained again on other seeds.
        of: of a finalist the trial that it repeats.
        init, order: seeds that it has been given; None: those that follow from the study and its number.
        config: hash of the configuration, "" until the trial takes part.
    """

    role: Role = "search"
    of: int | None = None
    init: int | None = None
    order: int | None = None
    config: str = ""

    @classmethod
    def of_trial(cls, trial: FrozenTrial | optuna.Trial) -> About:
        """What was noted of a trial."""
        return cls(**trial.user_attrs.get(ABOUT, {}))

    @property
    def plain(self) -> dict[str, Any]:
        """As an attribute of Optuna's trial."""
        return {ABOUT: asdict(self)}


def drawn(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of the search itself: neither finalists nor those that take pruned ones up again."""
    return [trial for trial in trials if RESUMES not in trial.user_attrs and About.of_trial(trial).role != "finalist"]


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those of them that the budget counts: all but those that were skipped."""
    return [trial for trial in drawn(trials) if trial.user_attrs.get(OUTCOME) != DUPLICATE]


def label_of(trial: FrozenTrial, study: Study) -> str:
    """The entry of the study's `methods` that a trial is of."""
    return trial.params.get(METHOD, next(iter(study.methods)))


def of_label(trials: Sequence[FrozenTrial], label: str, study: Study) -> list[FrozenTrial]:
    """The trials of one entry of `methods`."""
    return [trial for trial in trials if label_of(trial, study) == label]
