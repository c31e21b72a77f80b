"""A study that only fails is stopped: what is wrong is wrong with all of its trials."""

from __future__ import annotations

import optuna

from workbench.errors import StudyFails
from workbench.tracking.outcomes import tally

from .roles import OUTCOME

FAILED = {"crashed", "out_of_memory", "diverged", "timed_out"}
UNTRAINED = {"infeasible", "duplicate"}  # say nothing, neither for nor against the study


class Failures:
    """Counts failures in a row, of all workers, since this one began.

    Args:
        limit: how many in a row are too many.
    """

    def __init__(self, study: optuna.Study, limit: int):
        self._study, self._limit = study, limit
        self._before = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}

    def check(self) -> None:
        """To be called when a trial has ended.

        Raises:
            StudyFails: the last ones have all failed.
        """
        trials = [t for t in self._study.get_trials(deepcopy=False) if t.number not in self._before]
        ended = sorted((t.datetime_complete, t.user_attrs.get(OUTCOME, "")) for t in trials if t.datetime_complete)
        last = [outcome for _, outcome in ended if outcome not in UNTRAINED][-self._limit :]
        if len(last) == self._limit and FAILED.issuperset(last):
            raise StudyFails(
                f"The last {len(last)} trials of {self._study.study_name} failed ({tally(last)}), so the study was "
                f"stopped. Their messages are above, tracebacks are artifacts of their runs. Mend the cause, then run "
                f"the same command to go on; --max-failures sets the limit."
            )
