"""Equal budgets: methods take turns, each is searched by itself, and nothing is paid twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from workbench.sweep.budget import next_label, spent
from workbench.sweep.roles import About, drawn
from workbench.sweep.samplers import View, sampler
from workbench.sweep.space import METHOD
from workbench.sweep.spec import Study, load_study
from workbench.sweep.usual import usual_params

TWO = """
lora:
  r: {values: [2, 4]}
  lora_alpha: {min: 1, max: 64}
  target_modules: {values: [[query, value], [query]]}
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
ia3:
  target_modules: [key, value]
  feedforward_modules: []
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
"""
RANDOM = "search: {sampler: random, pruner: none}\n"


def about(lab: Any) -> list[About]:
    return [About.of_trial(trial) for trial in lab.study.get_trials()]


def labels(lab: Any) -> Counter[str]:
    return Counter(trial.params.get(METHOD, "") for trial in drawn(lab.study.get_trials()))


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("how", [(), ("--solo",)])
def test_every_method_gets_as_many_trials(lab: Any, how: tuple[str, ...]) -> None:
    lab.write(TWO, "{per_method: {trials: 3}}", more="search: {sampler: tpe, pruner: none}\n")
    done = lab.sweep(*how)
    assert done.code == 0, done.err
    assert "3 trials for each method" in done.out
    assert labels(lab) == {"lora": 3, "ia3": 3}
    assert (
        lab.parent.data.tags["workbench.per_method"] == '{"trials": 3.0}'
        or lab.parent.data.tags["workbench.per_method"] == '{"trials": 3}'
    )
    assert "is finished: 6 trials" in lab.sweep(*how).out
    lab.file.write_text(lab.file.read_text().replace("trials: 3", "trials: 4"))
    assert lab.sweep(*how).code == 0
    assert labels(lab) == {"lora": 4, "ia3": 4}


def test_a_method_that_is_slow_at_first_is_not_pruned_by_the_other(lab: Any) -> None:
    """All of `ia3` are worse at the first rung than all of `lora`; each loses some of its own."""
    methods = TWO.replace("min: 1e-3, max: 1e-1", "min: 1e-6, max: 2e-6", 2).replace(
        "min: 1e-6, max: 2e-6", "min: 1e-2, max: 1e-1", 1
    )
    lab.write(methods, "{per_method: {trials: 6}}", more="search: {sampler: random, pruner: successive_halving}\n")
    assert lab.sweep().code == 0
    ended = Counter((run.data.tags["workbench.label"], run.data.tags["workbench.outcome"]) for run in lab.trials)
    assert {label for label, outcome in ended if outcome == "complete"} == {"lora", "ia3"}
    assert {label for label, outcome in ended if outcome == "pruned"} == {"lora", "ia3"}


def test_the_defaults_come_first_and_are_not_pruned(lab: Any) -> None:
    lab.write(TWO, "{per_method: {trials: 5}}", more="search: {sampler: random, pruner: successive_halving}\n")
    assert lab.sweep().code == 0
    defaults = [run for run in lab.trials if run.data.tags["workbench.role"] == "default"]
    assert [run.data.tags["workbench.label"] for run in defaults] == ["lora", "ia3"]
    assert {run.data.tags["workbench.outcome"] for run in defaults} == {"complete"}
    params = defaults[0].data.params
    assert (params["lora.r"], params["lora.lora_alpha"]) == ("4", "8"), "8 is the default of both; 4 is closest to it"
    assert float(params["lora.learning_rate"]) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("unit", "amount", "trials"), [("steps", 25, 3), ("tokens", 1, 1), ("seconds", 1e-6, 1), ("seconds", 1e6, 5)]
)
def test_other_budgets(lab: Any, unit: str, amount: float, trials: int) -> None:
    """Ten steps a trial; a trial that is live counts with all its steps."""
    amount = amount if unit == "seconds" else int(amount)
    budget = f"{{per_method: {{{unit}: {amount}, trials: 5}}}}"
    lab.write(TWO, budget, more="search: {sampler: random, pruner: none, in_flight: 1}\n")
    assert lab.sweep().code == 0
    assert labels(lab) == {"lora": trials, "ia3": trials}


def test_tokens_are_counted_as_they_were_seen(lab: Any) -> None:
    lab.write(TWO, "{per_method: {trials: 1}}", more="search: {sampler: random, pruner: none, in_flight: 1}\n")
    lab.sweep()
    seen = {run.data.tags["workbench.label"]: run.data.metrics["tokens_seen"] for run in lab.trials}
    study = read(lab, f"{{per_method: {{tokens: {int(seen['lora']) + 1}}}}}")
    trials = lab.study.get_trials()
    assert not spent(study, trials, 0.0)
    assert next_label(study, trials) in ("lora", "ia3")
    assert spent(read(lab, f"{{per_method: {{tokens: {int(min(seen.values()))}}}}}"), trials, 0.0)


def read(lab: Any, budget: str) -> Study:
    lab.write(TWO, budget)
    return load_study(lab.file)


def test_a_method_with_one_configuration_is_tried_once(lab: Any) -> None:
    methods = TWO + "fixed: {method: lora, r: 2, target_modules: [query]}\n"
    lab.write(methods, "{per_method: {trials: 3}}", more=RANDOM)
    assert lab.sweep().code == 0
    assert labels(lab) == {"lora": 3, "ia3": 3, "fixed": 1}


# ---------------------------------------------------------------- samplers


def test_a_sampler_sees_one_method(lab: Any) -> None:
    study = read(lab, "{per_method: {trials: 3}}")
    store = optuna.create_study(direction="maximize")
    store.add_trials([create_trial(value=1.0), create_trial(state=TrialState.COMPLETE, value=2.0)])
    seen: list[int] = []

    class Spy(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            assert isinstance(study, View)
            seen.append(len(study.get_trials()))
            return {}

    within = sampler(study, 0, "ia3")
    within.sampler = Spy()  # type: ignore[attr-defined]
    store.sampler = within
    assert store.ask().suggest_categorical(METHOD, ["lora", "ia3"]) == "ia3", "whose turn it is"
    assert seen == [0], "the two trials there are were of the first method"


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "nsgaii", "qmc", "random"])
def test_optuna_samplers_by_name_are_seeded(new_lab: Any, tmp_path: Path, name: str) -> None:
    drawn_values = []
    for i, seed in enumerate((1, 1, 2)):
        lab = new_lab(tmp_path / str(i))
        search = f"search: {{sampler: {name}, pruner: none, seed: {seed}, in_flight: 2}}\n"
        lab.write(TWO, "{per_method: {trials: 3}}", "", search)
        lab.file.write_text(lab.file.read_text().replace("steps: 10", "steps: 1").replace("eval_every: 5, ", ""))
        done = lab.sweep("--workers", "1")
        assert done.code == 0, done.err
        drawn_values.append([trial.params for trial in lab.study.get_trials()])
        assert labels(lab) == {"lora": 3, "ia3": 3}
    assert drawn_values[0] == drawn_values[1] != drawn_values[2]


@pytest.mark.parametrize(
    "search",
    [
        "{sampler: tpe, sampler_options: {n_startup_trials: 2}, pruner: percentile, pruner_options: {percentile: 50}}",
        "{sampler: random, pruner: patient, pruner_options: {patience: 1}}",
        "{sampler: random, pruner: median, pruner_options: {n_startup_trials: 1}, in_flight: 1}",
    ],
)
def test_options_reach_optuna(lab: Any, search: str) -> None:
    lab.write(TWO, "{trials: 6}", more=f"search: {search}\n")
    assert lab.sweep().code == 0


def test_options_that_optuna_refuses_are_problems_of_the_file(lab: Any) -> None:
    lab.write(TWO, more="search: {sampler: tpe, sampler_options: {n_startup: 3}, pruner_options: {patience: 3}}\n")
    done = lab.sweep()
    assert done.code == 2
    assert "tpe refuses its options" in done.err
    assert "n_startup" in done.err
    assert "median refuses its options" in done.err
    lab.write(TWO, more="search: {sampler: random, sampler_options: {a: 1}}\n")
    assert "random takes no options" in lab.sweep().err


# ---------------------------------------------------------------- duplicates

FEW = """
lora:
  r: {values: [2, 4]}
  target_modules: [query]
"""


def test_duplicates_are_trained_on_other_seeds(lab: Any) -> None:
    lab.write(FEW, "{trials: 6}", more="search: {sampler: random, pruner: none, in_flight: 2}\n")
    assert lab.sweep().code == 0
    found: dict[str, list[Any]] = {}
    for run in lab.trials:
        found.setdefault(run.data.tags["workbench.config"], []).append(run)
    assert len(found) == 2
    for runs in found.values():
        seeds = [(run.data.tags["workbench.init_seed"], run.data.tags["workbench.order_seed"]) for run in runs]
        assert seeds == [(str(i), str(i)) for i in range(len(runs))]
        assert len({run.data.metrics["validation.loss"] for run in runs}) == len(runs)
    assert "on another seed" in lab.sweep("--trials", "9").out


@pytest.mark.parametrize("how", [(), ("--solo",)])
def test_duplicates_are_skipped_and_cost_nothing(lab: Any, how: tuple[str, ...]) -> None:
    search = "search: {sampler: random, pruner: none, duplicates: skip, in_flight: 1}\n"
    lab.write(FEW + "ia3: {target_modules: [key, value], feedforward_modules: []}\n", "{trials: 3}", more=search)
    done = lab.sweep(*how)
    assert done.code == 0
    outcomes = Counter(run.data.tags["workbench.outcome"] for run in lab.trials)
    assert outcomes["complete"] == 3
    assert outcomes["duplicate"] == len(lab.trials) - 3 > 0
    assert "its configuration is that of trial" in done.out


def test_a_search_that_finds_nothing_new_ends(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.sweep.budget.STUCK", 4)
    search = "search: {sampler: random, pruner: none, duplicates: skip, in_flight: 1}\n"
    lab.write(FEW, "{trials: 50}", more=search)
    assert lab.sweep("--workers", "1").code == 0
    outcomes = [run.data.tags["workbench.outcome"] for run in lab.trials]
    assert outcomes[-4:] == ["duplicate"] * 4
    assert outcomes.count("complete") <= 2


# ---------------------------------------------------------------- defaults


def test_defaults_are_the_closest_of_the_space(lab: Any) -> None:
    lab.write(
        """
lora:
  r: {min: 16, max: 64, q: 16}
  lora_dropout: {min: 0.1, max: 0.3}
  use_rslora: {values: [true, false]}
  target_modules: {values: [[query], [value]]}
  learning_rate: {min: 5e-3, max: 1e-1, distribution: log_uniform_values}
  schedule: {values: [cosine, linear]}
tokens: {method: trainable_tokens, token_indices: {most_frequent: {min: 4, max: 8}}}
""",
        "{per_method: {trials: 1}}",
    )
    study = load_study(lab.file)
    assert usual_params(study, "lora") == {
        METHOD: "lora",
        "lora.r": 16,
        "lora.lora_dropout": 0.1,
        "lora.use_rslora": False,
        "lora.target_modules": '["query"]',
        "lora.learning_rate": 5e-3,
        "lora.schedule": "linear",
    }
    assert usual_params(study, "tokens") == {METHOD: "tokens", "tokens.token_indices.most_frequent": 4}
