"""How trials ended, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .runs import STATUS


def spelt(outcome: str) -> str:
    """Such as "out of memory"."""
    return outcome.replace("_", " ")


def tally(outcomes: Iterable[str]) -> str:
    """Such as "12 complete, 3 pruned, 1 out of memory, 1 crashed": the most frequent first."""
    counts, order = Counter(outcomes), [*STATUS]
    known = sorted(counts, key=lambda outcome: order.index(outcome) if outcome in order else len(order))
    return ", ".join(f"{counts[outcome]} {spelt(outcome)}" for outcome in sorted(known, key=lambda o: -counts[o]))
