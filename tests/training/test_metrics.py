"""Metrics against values worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from workbench.training.config import Task
from workbench.training.metrics import METRICS, entities, score_classes, score_tags, score_texts


def test_every_task_has_metrics_with_a_goal() -> None:
    assert set(METRICS) == set(get_args(Task))
    assert {goal for metrics in METRICS.values() for goal in metrics.values()} == {"maximize", "minimize"}


def test_metrics_are_known_without_torch() -> None:
    code = "import sys, workbench.training.metrics; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_classes() -> None:
    scores = score_classes(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores["mcc"] == pytest.approx(
        (1 * 2 - 1 * 0) / (2 * 1 * 3 * 2) ** 0.5
    )  # a positive: tp 1, tn 2, fp 1, fn 0


def test_entities_are_runs_of_equal_tags() -> None:
    assert entities(["street", "street", "O", "city", "street"]) == {(0, 2, "street"), (3, 4, "city"), (4, 5, "street")}


def test_entities_of_bio_tags() -> None:
    tags = ["B-per", "I-per", "B-per", "O", "I-loc", "I-loc", "I-per"]
    assert entities(tags) == {(0, 2, "per"), (2, 3, "per"), (4, 6, "loc"), (6, 7, "per")}
    assert entities(["O", "O"]) == set()


def test_tags() -> None:
    actual = [["n", "s", "s", "c"], ["O", "c"]]
    predicted = [["n", "s", "n", "c"], ["O", "c"]]
    scores = score_tags(predicted, actual)
    assert scores["accuracy"] == 5 / 6
    # there: n, ss, c, c; found: n, s, n, c, c; right: n, c, c
    assert scores["f1"] == pytest.approx(2 * 3 / (4 + 5))
    assert score_tags([["O"]], [["O"]]) == {"accuracy": 1.0, "f1": 0.0}


def test_texts() -> None:
    assert score_texts([" K  AE1 P"], ["K AE1 P"]) == {"exact_match": 1.0, "chrf": pytest.approx(100)}
    half = score_texts(["K AE1 P", "T"], ["K AE1 P", "D AO1 G"])
    assert half["exact_match"] == 0.5
    assert 0 < half["chrf"] < 100
