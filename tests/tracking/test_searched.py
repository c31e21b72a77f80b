from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import DataError
from workbench.tracking import importance as ped_anova
from workbench.tracking.searched import fields, logarithmic, measured, paid, rank_by_scale, rates, searches

FILE = """
study: s
methods:
  lora:
    r: {values: [4, 8]}
    learning_rate: {min: 1e-4, max: 1e-1, distribution: log_uniform_values}
    lora_dropout: {min: 0, max: 0.3}
    trainable_token_indices: {most_informative: {min: 16, max: 512, distribution: q_log_uniform_values, q: 8}}
  plain: lora
  bare:
"""


def table(rows: list[dict]) -> pd.DataFrame:
    """Trials as `frames.trials` has them, with the columns that matter here."""
    usual = {"label": "lora", "outcome": "complete", "role": "search", "resumes": "", "objective": 0.5}
    return pd.DataFrame([{"number": number} | usual | row for number, row in enumerate(rows)])


def test_what_was_searched_on_a_logarithmic_scale():
    assert logarithmic(FILE.replace("  plain: lora\n", "")) == {
        ("lora", "learning_rate"),
        ("lora", "trainable_token_indices"),
    }


@pytest.mark.parametrize("text", ["", "a: [", "methods: 3", FILE, "study: s\nmodel: {path: m}\n"])
def test_a_file_that_cannot_be_read_says_nothing(text):
    assert logarithmic(text) == set()


def test_repeats_and_trials_without_a_value_do_not_count():
    trials = table(
        [
            {},
            {"role": "finalist"},
            {"outcome": "duplicate"},
            {"resumes": "0"},
            {"outcome": "pruned"},
            {"outcome": "pruned", "objective": None},
            {"outcome": "diverged", "objective": 0.1},
        ]
    )
    assert searches(trials)["number"].tolist() == [0, 4, 5, 6]
    assert measured(trials)["number"].tolist() == [0, 4]


def test_fields_are_numbers_or_words_and_constants_are_none():
    trials = table(
        [
            {
                "hp.r": "8",
                "hp.target_modules": "query",
                "hp.tokens": "most_informative=64",
                "hp.steps": 5,
                "hp.rate": 0.1,
            },
            {"hp.r": "16", "hp.target_modules": "all-linear", "hp.tokens": "most_informative=256", "hp.steps": 5},
            {"hp.rate": 0.001},
        ]
    )
    found = {field.name: field for field in fields(trials, {("lora", "r")})}
    assert set(found) == {"r", "target_modules", "tokens", "rate"}
    assert (found["r"].numeric, found["r"].log) == (True, True)
    assert found["r"].values.to_dict() == {0: 8.0, 1: 16.0}
    assert not found["target_modules"].numeric
    assert (found["tokens"].numeric, found["tokens"].unit) == (True, "most_informative")
    assert not found["rate"].log, "the file knows of other logarithms, but not of this one"
    assert {field.name: field.log for field in fields(trials, set())}["rate"], "no file: the values span two decades"


def test_tokens_of_two_kinds_are_words():
    trials = table([{"hp.tokens": "most_informative=64"}, {"hp.tokens": "most_frequent=64"}])
    assert [field.numeric for field in fields(trials, set())] == [False]


def test_what_paid_has_means_intervals_and_the_best():
    wide = [0.7, 0.8, 0.9]
    trials = table(
        [{"hp.target_modules": "all", "objective": value} for value in wide]
        + [{"hp.target_modules": "query", "objective": 0.6}]
        + [{"hp.target_modules": "query", "objective": 0.95, "outcome": "pruned"}]
        + [{"hp.target_modules": "query", "objective": 0.99, "role": "finalist"}]
        + [{"hp.target_modules": "key", "objective": 0.3, "outcome": "pruned"}]
    )
    found = paid(trials, set(), "maximize").set_index("value")
    assert found.index.tolist() == ["all", "query", "key"]
    assert found["tried"].tolist() == [3, 2, 1]
    assert found["complete"].tolist() == [3, 1, 0]
    assert found.loc["all", "mean"] == pytest.approx(0.8)
    # Student's t of two degrees of freedom: 4.3027 * 0.1 / sqrt(3)
    assert found.loc["all", "high"] - 0.8 == pytest.approx(0.24841, abs=1e-5)
    assert found["trial"].tolist()[:2] == [2, 3]
    assert np.isnan(found.loc["query", "low"]), "one trial has no interval"
    assert np.isnan(found.loc["key", "best"])
    assert paid(trials, set(), "minimize").set_index("value").loc["all", "trial"] == 0


def test_only_words_and_tokens_are_choices():
    trials = table([{"hp.r": 4, "hp.tokens": "most_frequent=8"}, {"hp.r": 8, "hp.tokens": "most_frequent=16"}])
    assert paid(trials, set(), "maximize")["field"].unique().tolist() == ["tokens"]


def test_rank_and_alpha_of_the_methods_that_search_both():
    trials = table(
        [
            {"hp.r": 4, "hp.lora_alpha": 8, "objective": 0.5},
            {"hp.r": 4, "hp.lora_alpha": 8, "objective": 0.7},
            {"hp.r": 4, "hp.lora_alpha": 8, "objective": 0.9, "outcome": "pruned"},
            {"hp.r": 16, "hp.lora_alpha": 32, "objective": 0.9, "outcome": "pruned"},
            {"label": "loha", "hp.r": 4, "hp.alpha": 8},
            {"label": "loha", "hp.r": 8, "hp.alpha": 8},
        ]
    )
    cells = rank_by_scale(trials, set(), "maximize")
    assert cells["label"].unique().tolist() == ["lora"], "loha has one alpha"
    assert cells[["r", "scale", "tried", "complete"]].values.tolist() == [["16", "32", 1, 0], ["4", "8", 3, 2]]
    assert cells["best"].tolist()[1] == 0.7
    assert cells["mean"].tolist()[1] == pytest.approx(0.6)
    assert rank_by_scale(trials, set(), "minimize")["best"].tolist()[1] == 0.5


def test_many_ranks_become_ranges_that_hold_every_trial():
    rng = np.random.default_rng(0)
    rows = [{"hp.r": int(r), "hp.lora_alpha": a} for r, a in zip(range(1, 65), rng.choice([8, 16], 64), strict=True)]
    cells = rank_by_scale(table(rows), {("lora", "r")}, "maximize")
    assert cells["r"].nunique() == 6
    assert cells["tried"].sum() == 64
    assert cells.sort_values("r_order")["r"].iloc[0] == "1 to 2"


def test_rates_of_methods_with_two_of_them():
    trials = table(
        [{"hp.learning_rate": rate, "objective": value} for rate, value in ((1e-3, 0.6), (1e-2, 0.9), (1e-1, 0.899))]
        + [{"hp.learning_rate": 1.0, "objective": 0.99, "outcome": "pruned"}]
        + [{"label": "head", "hp.learning_rate": 1e-3}]
    )
    found = rates(trials, "maximize")
    assert list(found) == ["lora"]
    assert (found["lora"].best, found["lora"].low, found["lora"].high) == (1e-2, 1e-2, 1e-1)
    assert rates(trials.drop(columns="hp.learning_rate"), "maximize") == {}


# -------------------------------------------------------------------- importance


def searched(count: int, **more) -> pd.DataFrame:
    """Trials whose metric is all the learning rate's; dropout and modules have no part in it."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        rate = 10 ** rng.uniform(-4, -1)
        value = -((np.log10(rate) + 2.5) ** 2)
        words = {"hp.target_modules": str(rng.choice(["query", "key"])), "hp.lora_dropout": rng.uniform(0, 0.3)}
        rows.append({"hp.learning_rate": rate, "objective": value} | words | more)
    return table(rows)


LOGS = {("lora", "learning_rate")}


def test_what_sets_the_metric_is_important_beyond_chance():
    found = ped_anova.importance(searched(100), LOGS, "maximize")
    assert found.table["field"].iloc[0] == "learning_rate"
    assert found.table["importance"].sum() == pytest.approx(1)
    assert found.table["importance"].iloc[0] > 0.9
    beyond = found.table[found.table["importance"] > found.table["chance"]]["field"].tolist()
    assert beyond == ["learning_rate"]
    assert (found.trials, found.best) == (100, 10)


def test_of_a_loss_the_lowest_are_the_best():
    trials = searched(100)
    up = ped_anova.importance(trials, LOGS, "maximize")
    down = ped_anova.importance(trials.assign(objective=-trials["objective"]), LOGS, "minimize")
    pd.testing.assert_frame_equal(up.table, down.table)


def test_pruned_trials_are_worse_than_complete_ones():
    """All trials with a high rate were pruned, with the highest values of all: what the best share is a low rate."""
    trials = searched(100)
    high = trials["hp.learning_rate"] > 1e-3
    trials = trials.assign(
        outcome=np.where(high, "pruned", "complete"), objective=np.where(high, 9.0, trials["objective"])
    )
    found = ped_anova.importance(trials, LOGS, "maximize").table.set_index("field")
    assert found.loc["learning_rate", "importance"] > found.loc["learning_rate", "chance"]
    alike = ped_anova.importance(trials.assign(objective=trials["objective"] - 8.0 * high), LOGS, "maximize")
    assert alike.table.set_index("field").loc["learning_rate", "importance"] == found.loc["learning_rate", "importance"]


def test_the_method_counts_among_several():
    good, bad = searched(40), searched(40, label="ia3")
    trials = pd.concat([good, bad.assign(objective=bad["objective"] - 9)], ignore_index=True).assign(number=range(80))
    found = ped_anova.importance(trials, LOGS | {("ia3", "learning_rate")}, "maximize").table.set_index("field")
    assert found.loc["method", "importance"] > found.loc["method", "chance"]


def test_too_few_trials_are_said():
    with pytest.raises(DataError, match="at least 20 measured trials of the search; there are 19"):
        ped_anova.importance(searched(19), LOGS, "maximize")


def test_without_anything_that_varies_there_is_no_importance():
    with pytest.raises(DataError, match="No hyperparameter varies"):
        ped_anova.importance(table([{"hp.r": 8}] * 30), set(), "maximize")


def test_of_very_many_trials_a_sample_is_enough(monkeypatch):
    monkeypatch.setattr(ped_anova, "MOST", 50)
    assert ped_anova.importance(searched(100), LOGS, "maximize").trials == 50
