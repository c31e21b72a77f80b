"""How far a study is, against what its budget allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from .budgets import counted

UNENDED = ("running", "interrupted")


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        share: from 0 to 1; None where its budget is not known.
        words: such as "31 of 64 trials, 4 of 27 finalists".
    """

    share: float | None
    words: str


def progress(trials: pd.DataFrame, tags: Mapping[str, str], seconds: float = 0.0) -> Progress:
    """How far a study is.

    Args:
        trials: as `frames.trials`.
        tags: of the study's run.
        seconds: that its sweeps took so far, for a budget of minutes.
    """
    search, ended = counted(trials), trials[~trials["outcome"].isin(UNENDED)]
    done, again = len(counted(ended)), int((ended["role"] == "finalist").sum())
    budget = json.loads(tags.get("workbench.budget", "") or "{}")
    labels = int(budget.get("methods") or search["label"].nunique())
    per_method = json.loads(tags.get("workbench.per_method", "") or "{}")
    asked = [limit for limit in (budget.get("trials"), per_method.get("trials", 0) * labels) if limit]
    total = min(asked) if asked else None
    # whichever comes first ends the search
    shares = [done / total] if total else []
    if steps := budget.get("steps"):
        shares.append(float(search["steps"].sum()) / steps)
    if minutes := budget.get("minutes"):
        shares.append(seconds / (60 * minutes))
    given = json.loads(tags.get("workbench.finalists", "") or "{}")
    finalists = given["per_method"] * given["initialisations"] * given["orders"] * labels if given else 0
    words = f"{done:,} of {total:,} trials" if total else f"{done:,} trials"
    if finalists:
        words += f", {again:,} of {finalists:,} finalists"
    if not shares:
        return Progress(None, words)
    share = min(max(shares), 1.0)
    if finalists:  # a finalist takes about as long as a trial that is not pruned
        size = total or max(done, 1)
        share = (share * size + min(again, finalists)) / (size + finalists)
    return Progress(share, words)
