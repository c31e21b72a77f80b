"""At which steps a study measures its trials and decides, and what the others had come to there."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from workbench.errors import StorageError

from .runs import public_url, sqlite_file

ETA = 3  # of halving, as in workbench/sweep/halving.py
HALVING = ("successive_halving", "hyperband")
LOW_IS_GOOD = ("loss", "perplexity")
# Optuna's own reading of 10,000 trials takes ten seconds and more, and all of it but this is thrown away
REPORTED = """
    select trials.number, reported.step, reported.intermediate_value as value
    from trial_intermediate_values as reported
    join trials on trials.trial_id = reported.trial_id
    join studies on studies.study_id = trials.study_id
    where studies.study_name = :study and reported.intermediate_value_type = 'FINITE'
"""


def evaluations(params: Mapping[str, str]) -> list[int]:
    """The steps after which validation is measured; none where the study does not say.

    Args:
        params: of the study's run.
    """
    steps, every = _whole(params.get("training.steps")), _whole(params.get("training.eval_every"))
    if not steps:
        return []
    every = every or max(1, -(-steps // 3))
    return sorted({*range(every, steps + 1, every), steps})


def decisions(params: Mapping[str, str]) -> list[int]:
    """Those of them at which a trial may be stopped; the last one ends it and is none."""
    measured, pruner = evaluations(params), params.get("search.pruner")
    if not measured or pruner in ("none", None):
        return []
    if pruner not in HALVING:
        return measured[:-1]
    found, step = [], measured[0]
    while step < measured[-1]:
        found.append(step)
        step *= ETA
    return found


def compared(params: Mapping[str, str], metric: str, goal: str) -> tuple[str, int]:
    """Which metric the pruner compares, and the sign with which Optuna holds it: the direction is the objective's."""
    named = params.get("search.prune_by", "objective")
    if named in ("objective", metric):
        return metric, 1
    return named, 1 if (goal == "minimize") == (named in LOW_IS_GOOD) else -1


def reported(storage_url: str, study: str) -> pd.DataFrame:
    """What all trials of a study have reported to the pruner: columns number, step, value, as Optuna holds it.

    Raises:
        StorageError: Optuna's storage does not exist or cannot be read.
    """
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    file = sqlite_file(storage_url)
    if file is not None and not file.exists():
        raise StorageError(f"There is no {file}.")
    try:
        with create_engine(storage_url, poolclass=NullPool).connect() as connection:
            rows = connection.execute(text(REPORTED), {"study": study}).all()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = public_url(str(error).strip().split("\n")[0])
        raise StorageError(f"Optuna's storage {public_url(storage_url)} cannot be read: {reason}") from error
    return pd.DataFrame(rows, columns=["number", "step", "value"])


def at_rungs(found: pd.DataFrame, but: int) -> pd.DataFrame:
    """Of the trials other than `but`, at each step: columns step, median, low and high (quartiles), trials."""
    others = found[found["number"] != but].groupby("step")["value"]
    table = others.agg(median="median", low=lambda v: v.quantile(0.25), high=lambda v: v.quantile(0.75), trials="size")
    return table.reset_index()


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
