"""What each example contributes to a metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from workbench.training.adapted import adapted
from workbench.training.config import TrainingSection
from workbench.training.examples import macro_f1, matthews, pseudo_values, share, statistics, table
from workbench.training.loop import Measured, evaluate

from .places import Place, config_of

Places = Callable[[str], Place]
KINDS = ["classifying", "tagging", "continuing", "answering", "translating"]


def measured_at(place: Place) -> tuple[Place, Measured]:
    with adapted(place.base, config_of("lora", place.base), 0) as model:
        return place, evaluate(model, place.base, place.data.validation, TrainingSection(steps=1))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_what_examples_count_give_the_metrics(kind: str, places: Places) -> None:
    place, measured = measured_at(places(kind))
    split = place.data.validation
    found = statistics(place.base.task, place.base.labels, split, measured)
    for name, value in measured.metrics.items():
        stats, metric = found[name]
        assert stats.shape[0] == len(split)
        assert float(metric(stats.sum(0))) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_table(kind: str, places: Places) -> None:
    place, measured = measured_at(places(kind))
    split = place.data.validation
    columns = table(place.base, split, measured).to_pydict()
    assert columns["row"] == list(range(len(split)))
    assert set(columns) == {"row", "actual", "predicted", "loss", *(f"score.{name}" for name in measured.metrics)}
    if kind == "classifying":
        right = [float(a == p) for a, p in zip(columns["actual"], columns["predicted"], strict=True)]
        assert columns["score.accuracy"] == right
        assert columns["score.loss"] == pytest.approx(columns["loss"])
    if kind == "tagging":
        assert [len(json.loads(tags)) for tags in columns["actual"]] == [len(row.labels) for row in measured.rows]
    if kind == "continuing":
        assert columns["actual"] == columns["predicted"] == [None] * len(split)


def test_pseudo_values_are_what_leaving_one_out_says() -> None:
    draw = np.random.default_rng(0)
    labels, guesses = draw.integers(0, 4, 60), draw.integers(0, 4, 60)
    confusion = np.eye(16)[labels * 4 + guesses]

    def sklearn(score: Any, kept: np.ndarray) -> float:
        return float(score(labels[kept], guesses[kept]))

    everything = np.arange(60)
    scores = {
        macro_f1: lambda a, b: f1_score(a, b, average="macro", zero_division=0),
        matthews: matthews_corrcoef,
    }
    for metric, score in scores.items():
        whole = sklearn(score, everything)
        left = [sklearn(score, np.delete(everything, i)) for i in everything]
        expected = 60 * whole - 59 * np.array(left)
        assert pseudo_values(confusion, metric) == pytest.approx(expected, abs=1e-9)  # they are rounded there
        assert float(np.mean(pseudo_values(confusion, metric))) == pytest.approx(whole, abs=0.02)


def test_a_class_that_is_not_there_does_not_count() -> None:
    confusion = np.zeros((3, 3))
    confusion[0, 0], confusion[1, 0] = 2, 1
    assert float(macro_f1(confusion.ravel())) == pytest.approx(f1_score([0, 0, 1], [0, 0, 0], average="macro"))
    assert float(matthews(confusion.ravel())) == matthews_corrcoef([0, 0, 1], [0, 0, 0]) == 0


def test_pseudo_values_of_a_ratio_give_its_known_variance() -> None:
    """Of a mean over words the jackknife's variance is that of the ratio estimator (Cochran 1977)."""
    draw = np.random.default_rng(1)
    words = draw.integers(1, 20, 400).astype(float)
    right = draw.binomial(words.astype(int), 0.7).astype(float)
    values = pseudo_values(*share(right, words))
    ratio = right.sum() / words.sum()
    cochran = ((right - ratio * words) ** 2).sum() / 399 / 400 / words.mean() ** 2
    assert values.var(ddof=1) / 400 == pytest.approx(cochran, rel=0.02)


def test_one_example_is_its_own_metric() -> None:
    assert pseudo_values(*share(np.array([3.0]), np.array([4.0]))) == pytest.approx([0.75])
