"""What was predicted of each example, and what each contributes to a metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .base import Base
from .config import Task
from .data import Split
from .loop import Measured
from .metrics import entities

Statistics = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]  # of each example, and the metric of their sums


def table(base: Base, split: Split, measured: Measured) -> pa.Table:
    """One row an example, in the order of the split.

    Columns: `row`, `actual` and `predicted` as text (lists as JSON, None where the task has no such thing), `loss`
    (mean over what is scored, nats), and for each metric `score.<metric>`: the jackknife's pseudo-values (Tukey 1958),
    whose mean is the metric, or estimates it where it is no mean itself. Of accuracy they are 1 and 0.
    """
    rows = measured.rows
    columns: dict[str, Any] = {
        "row": range(len(rows)),
        "actual": [spelt(value) for value in actual(base, split, measured)],
        "predicted": [spelt(value) for value in measured.predicted],
        "loss": [float(np.mean(row.losses)) for row in rows],
    }
    found = statistics(base.task, base.labels, split, measured)
    columns |= {f"score.{metric}": pseudo_values(*found[metric]) for metric in measured.metrics}
    return pa.table(columns)


def actual(base: Base, split: Split, measured: Measured) -> list[Any]:
    """What would have been right."""
    if base.task == "SEQ_CLS":
        return [base.labels[row.labels[0]] for row in measured.rows]
    if base.task == "TOKEN_CLS":
        return [[base.labels[i] for i in row.labels] for row in measured.rows]
    if "target" in split.features.column_names:
        return list(split.features["target"][:])
    return [None] * len(measured.rows)


def spelt(value: Any) -> str | None:
    """An answer as text; numbers are no answers."""
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value if isinstance(value, str) else None
    )


def pseudo_values(stats: np.ndarray, metric: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`n θ - (n - 1) θ₋ₑ` for each of `n` examples, where `θ₋ₑ` is the metric without it, `(n,)`.

    Args:
        stats: what each example counts, `(n, d)`.
        metric: of sums `(..., d)` of such counts.
    """
    count, total = len(stats), stats.sum(0)
    if count == 1:
        return metric(total[None])
    values = count * metric(total) - (count - 1) * metric(total - stats)
    return np.round(values, 9)  # the difference of two large numbers has no more digits than that


def statistics(task: Task, labels: Sequence[str], split: Split, measured: Measured) -> dict[str, Statistics]:
    """For each metric of a task what each example counts, and the metric as a function of the sums."""
    rows, predicted = measured.rows, measured.predicted
    ones = np.ones(len(rows))
    losses = np.array([sum(row.losses) for row in rows])
    if task == "SEQ_CLS":
        places = np.array([row.labels[0] * len(labels) + row.guesses[0] for row in rows])
        confusion = np.eye(len(labels) ** 2)[places]
        right = np.array([float(row.labels == row.guesses) for row in rows])
        return {
            "loss": share(losses, ones),
            "accuracy": share(right, ones),
            "f1": (confusion, macro_f1),
            "mcc": (confusion, matthews),
        }
    counts = np.array([float(len(row.losses)) for row in rows])
    right = np.array([float(np.sum(np.equal(row.labels, row.guesses))) for row in rows])
    found = {"loss": share(losses, counts), "accuracy": share(right, counts)}
    if task == "TOKEN_CLS":
        there = [entities([labels[i] for i in row.labels]) for row in rows]
        guessed = [entities(tags) for tags in predicted]
        both = np.array([2.0 * len(a & b) for a, b in zip(there, guessed, strict=True)])
        either = np.array([float(len(a) + len(b)) for a, b in zip(there, guessed, strict=True)])
        return found | {"f1": share(both, either)}
    found["perplexity"] = (found["loss"][0], lambda sums: np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700.0)))
    if "target" in split.features.column_names:
        target = split.features["target"][:]
        same = [float(p.split() == t.split()) for p, t in zip(predicted, target, strict=True)]
        found |= {"exact_match": share(np.array(same), ones), "chrf": chrf(predicted, target)}
    return found


def share(parts: np.ndarray, wholes: np.ndarray) -> Statistics:
    """The metric that is one sum over another; 0 where there is nothing."""

    def ratio(sums: np.ndarray) -> np.ndarray:
        return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)

    return np.stack([parts, wholes], 1), ratio


def square(sums: np.ndarray) -> np.ndarray:
    """Confusion matrices `(..., actual, predicted)` from flat ones."""
    size = round(sums.shape[-1] ** 0.5)
    return sums.reshape(*sums.shape[:-1], size, size)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """F1 averaged over the classes that there are, as scikit-learn's, of flat confusion matrices."""
    matrix = square(sums)
    right, either = matrix.diagonal(axis1=-2, axis2=-1), matrix.sum(-1) + matrix.sum(-2)
    there = either > 0
    f1 = np.divide(2 * right, either, out=np.zeros_like(either), where=there)
    return f1.sum(-1) / np.maximum(there.sum(-1), 1)


def matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation coefficient for many classes (Gorodkin 2004) of flat confusion matrices."""
    matrix = square(sums)
    total, actual, guessed = matrix.sum((-2, -1)), matrix.sum(-1), matrix.sum(-2)
    above = matrix.diagonal(axis1=-2, axis2=-1).sum(-1) * total - (actual * guessed).sum(-1)
    below = np.sqrt((total**2 - (guessed**2).sum(-1)) * (total**2 - (actual**2).sum(-1)))
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def chrf(predicted: Sequence[str], target: Sequence[str]) -> Statistics:
    """chrF (Popović 2015) from the counts of n-grams of each text."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    stats = np.array(metric._extract_corpus_statistics(predicted, [target]), dtype=float)

    def score(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        found = [metric._compute_score_from_stats([round(count) for count in row]).score for row in flat]
        return np.array(found).reshape(sums.shape[:-1])

    return stats, score
