"""What a reader of a comparison must know, a sentence each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import stats
from .budgets import budget_note, failure_note
from .leaderboard import there

if TYPE_CHECKING:
    from .comparison import Comparison, Row


def notes(found: Comparison) -> list[str]:
    """On the values, the intervals and ties, budgets and failures, of a comparison that lacks only these."""
    failed = [note] if (note := failure_note(found.trials)) else []
    if found.reference:
        return [f"Imported from {found.reference}: as published, one run each, so without intervals.", *failed]
    finalists = [row for row in found.rows if row.judged]
    return [
        *_split_notes(found),
        *_finalist_notes(found, finalists),
        *_other_notes(found, bool(finalists)),
        budget_note(found.used, found.tags),
        *failed,
    ]


def _split_notes(found: Comparison) -> Iterator[str]:
    count = f" ({found.examples:,} examples)" if found.examples else ""
    readings = json.loads(found.tags.get("workbench.test_readings", "") or "[]")
    without_test = found.tags.get("workbench.test_rows") == "0"
    if found.split == "test":
        yield f"Values are of the test split{count}, which the search has never read."
    else:
        advice = "" if without_test else f"; `workbench promote {found.study}` reads the test split once"
        yield (
            f"Values are of the validation split{count}, by which the search has chosen, so they are "
            f"optimistic{advice}."
        )
    if without_test:
        yield "The study has no test split."
    elif not readings:
        yield "The test split was never read."
    else:
        times = "once" if len(readings) == 1 else f"{len(readings)} times"
        yield f"The test split was read {times} ({'; '.join(map(_reading, readings))})."


def _reading(known: dict[str, Any]) -> str:
    count = len(known["trials"])
    why = f", because: {known['reason']}" if known["reason"] else ""
    cut = "" if known.get("ended", True) else ", cut off"
    return f"{known['time']}, {count} trial{'s' if count != 1 else ''}{why}{cut}"


def _finalist_notes(found: Comparison, finalists: list[Row]) -> Iterator[str]:
    again = found.trials[found.trials["role"] == "finalist"]
    if again.empty and found.tags.get("workbench.finalists"):
        yield "Finalists have not been trained yet; `workbench sweep` goes on with the study."
    elif again.empty:
        lack = "intervals and ties know nothing of seeds" if finalists else "there are neither intervals nor ties"
        yield (
            f"No configuration was trained again, so {lack}: `finalists: {{per_method: 1}}` in the study file asks for "
            f"them."
        )
    if not finalists:
        return
    kinds = {"initialisation": again["init_seed"].nunique(), "order": again["order_seed"].nunique()}
    seeds = " and ".join(f"{many} seed{'s' if many > 1 else ''} of {kind}" for kind, many in kinds.items())
    lost = sum(row.failed for row in finalists)
    failed = f"; {lost} of these runs did not finish" if lost else ""
    if len(again):
        yield f"Each finalist was trained again, on {seeds}{failed}."
    varied = " and ".join(kind for kind, many in kinds.items() if many > 1)
    unknown = [row.name for row in finalists if row.judged and not row.judged.estimate.seeds_known]
    alone = f", but of {', '.join(unknown)} for new examples only: one run says nothing of seeds" if unknown else ""
    new = f"new examples and new seeds of {varied}" if varied else "new examples"
    yield f"Intervals are of {100 * stats.LEVEL:g} %, for {new}{alone if varied else ', not for new seeds'}."
    pairs = len(finalists) * (len(finalists) - 1) // 2
    if pairs:
        number = "the one pair" if pairs == 1 else f"all {pairs} pairs"
        noise = ", seeds included" if varied else ""
        yield (
            f"† is not significantly worse than the best: t-tests paired by example{noise}, "
            f"Holm's correction for {number}, so that of methods that are all alike one is called worse in at most "
            f"{100 * stats.ALPHA:g} % of studies{_limits(kinds)}."
        )
    costs = ", ".join(name.replace("_", " ") for name in found.costs)
    yield (
        f"The Pareto probability is that of no other one being at least as good in {found.metric} and {costs}, "
        f"and better in one of them."
    )


def _limits(kinds: Mapping[str, int]) -> str:
    """What intervals and ties cannot promise with so many seeds of each kind (docs/compare.md)."""
    few = [kind for kind, many in kinds.items() if many == 2]
    fixed = [kind for kind, many in kinds.items() if many < 2]
    said = [f"as far as new examples go, not new seeds of {' and '.join(fixed)}"] if fixed else []
    if few:
        said.append(f"or more often if {' or '.join(few)}, with two seeds, is by far the largest noise")
    return "".join(f", {words}" for words in said)


def _other_notes(found: Comparison, finalists: bool) -> Iterator[str]:
    alone = [row for row in found.rows if row.kind == "one run" and not row.judged]
    names = ", ".join(f"{row.name} (trial {row.trial})" for row in alone)
    if alone and found.split == "test":
        yield f"Not trained again, and so not measured on the test split: {names}."
    elif alone:
        which = f"The values of {names} are" if finalists else "All values are"
        yield f"{which} of one run, chosen by this split."
    if any(there(row.default) for row in found.rows):
        yield "Defaults are those of the method, one run on validation; the gain is what tuning added to that, there."
