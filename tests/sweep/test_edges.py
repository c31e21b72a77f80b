"""Optima at the ends of their ranges."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from workbench.sweep.edges import ENOUGH, edges, end
from workbench.sweep.spec import load_study

LOG = FloatDistribution(1e-4, 1e-2, log=True)
RANKS = CategoricalDistribution([4, 8, 16])


@pytest.mark.parametrize(
    ("value", "distribution", "words"),
    [
        (9.9e-3, LOG, "upper end of 0.0001 ... 0.01"),
        (1.01e-4, LOG, "lower end of 0.0001 ... 0.01"),
        (1e-3, LOG, ""),
        (5e-3, LOG, ""),
        (0.0, FloatDistribution(0.0, 0.3), ""),  # no dropout is less than none
        (0.3, FloatDistribution(0.0, 0.3), "upper end of 0 ... 0.3"),
        (1, IntDistribution(1, 64), ""),
        (64, IntDistribution(1, 64, log=True), "upper end of 1 ... 64"),
        (2, IntDistribution(2, 64, log=True), "lower end of 2 ... 64"),
        (16, RANKS, "upper end of 4 ... 16"),
        (4, RANKS, "lower end of 4 ... 16"),
        (8, RANKS, ""),
        (8, CategoricalDistribution([4, 8]), ""),  # of two values one always is at an end
        ("a", CategoricalDistribution(["a", "b", "c"]), ""),
        (True, CategoricalDistribution([True, False, None]), ""),
        (5, IntDistribution(5, 5), ""),
    ],
)
def test_ends(value: Any, distribution: Any, words: str) -> None:
    assert end(value, distribution) == words


def made(rate: float, value: float, state: TrialState = TrialState.COMPLETE, label: str = "lora") -> FrozenTrial:
    """A trial of a study with two methods."""
    return create_trial(
        params={"method": label, f"{label}.learning_rate": rate},
        distributions={"method": CategoricalDistribution(["lora", "ia3"]), f"{label}.learning_rate": LOG},
        value=value if state == TrialState.COMPLETE else None,
        state=state,
    )


@pytest.mark.parametrize(("goal", "rate"), [("maximize", 1e-2), ("minimize", 1e-4)])
def test_the_best_complete_trial_of_each_method_counts(lab: Any, goal: str, rate: float) -> None:
    lab.write("lora:\nia3:\n", more=f"objective: {{metric: accuracy, goal: {goal}}}\n")
    study = load_study(lab.file)
    rising = [
        made(r, value) for r, value in zip((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
    ]
    few = [made(1e-2, 0.9, label="ia3") for _ in range(ENOUGH - 1)]
    (advice,) = edges(study, rising + few)
    assert advice.startswith(f"lora.learning_rate = {rate:g} was best, at the ")
    assert edges(study, rising[1:]) == []
    middle = made(1e-3, {"maximize": 0.9, "minimize": 0.0}[goal])
    assert edges(study, [*rising, middle]) == []
    assert edges(study, [*rising, made(1e-3, 0.0, TrialState.PRUNED)]) == [advice]


def test_a_sweep_says_so(lab: Any) -> None:
    lab.write(
        "lora: {r: {values: [2, 3, 4]}, target_modules: [query], learning_rate: {min: 0.1, max: 0.2}}", "{trials: 6}"
    )
    done = lab.sweep("--workers", "1")
    assert done.code == 0
    best = max(lab.study.get_trials(), key=lambda trial: trial.value)
    said = [line for line in done.out.splitlines() if "was best, at the" in line]
    assert said == [f"note: {advice}" for advice in edges(load_study(lab.file), lab.study.get_trials())]
    assert any("lora.r" in line for line in said) == (best.params["lora.r"] != 3)
