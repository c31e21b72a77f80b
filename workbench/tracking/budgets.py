"""What each method of a study was given, and what came to nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .outcomes import spelt

if TYPE_CHECKING:
    import pandas as pd

FAILURES = ("out_of_memory", "diverged", "infeasible", "timed_out", "crashed")
REASONS = 6  # the most that are told apart


@dataclass(frozen=True)
class Spent:
    """What the search of one method took: trials, optimiser steps up to their last evaluations, seconds."""

    trials: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        trials = f"{self.trials} trial{'s' if self.trials != 1 else ''}"
        return f"{trials}, {self.steps:,} steps, {self.seconds:,.0f} s"


def spent(trials: pd.DataFrame) -> dict[str, Spent]:
    """What the search of each method took, by label."""
    found = {}
    for label, own in counted(trials).groupby("label"):
        seconds = float(own["seconds/total"].sum()) if "seconds/total" in own else 0.0
        found[str(label)] = Spent(len(own), int(own["steps"].sum()), seconds)
    return found


def budget_note(found: Mapping[str, Spent], tags: Mapping[str, str]) -> str:
    """Whether the methods had the same, and what each had.

    Args:
        found: what they had, by label.
        tags: of the study's run.
    """
    stated = json.loads(tags.get("workbench.per_method", "") or "{}")
    details = "; ".join(f"{label} {own}" for label, own in found.items()) or "nothing"
    if stated:
        given = " or ".join(f"{limit:g} {unit}" for unit, limit in stated.items())
        return f"Equal budgets were stated, {given} for each method; used in the search: {details}."
    alike = len({(own.trials, own.steps) for own in found.values()}) <= 1
    verdict = "Methods had equal budgets" if alike else "Methods shared one budget and did not get equal parts of it"
    return f"{verdict}: {details}."


def counted(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that a budget pays for: no finalists, none that was taken up again, no duplicates."""
    return trials[(trials["role"] != "finalist") & (trials["resumes"] == "") & (trials["outcome"] != "duplicate")]


def failures(trials: pd.DataFrame) -> Counter[tuple[str, str]]:
    """How many trials came to nothing, by outcome and the first line of the message."""
    failed = trials[trials["outcome"].isin(FAILURES)]
    pairs = zip(failed["outcome"], failed["message"], strict=True)
    return Counter((spelt(outcome), (message or "no message").splitlines()[0]) for outcome, message in pairs)


def failure_note(trials: pd.DataFrame) -> str:
    """How many trials came to nothing and why, by outcome and the first line of the message; "" if all went well."""
    counts = Counter(trials["outcome"])
    aside = [f"{counts[kind]} {kind}" for kind in ("pruned", "duplicate", "interrupted", "running") if counts[kind]]
    reasons = failures(trials)
    told = [f"{count} {outcome} ({why})" for (outcome, why), count in reasons.most_common(REASONS)]
    if left := reasons.total() - sum(count for _, count in reasons.most_common(REASONS)):
        told.append(f"{left} for other reasons")
    if not told and not aside:
        return ""
    first = f"{reasons.total()} of {len(trials)} trials failed" + (f": {'; '.join(told)}" if told else "")
    return first + (f" (besides, {', '.join(aside)})" if aside else "") + "."
