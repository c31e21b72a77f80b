"""Limits on a trial, several objectives at once, and methods of one size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from command import workbench
from optuna.trial import TrialState

from workbench.errors import ConfigError, StudyError
from workbench.sweep.domains import Tokens
from workbench.sweep.match import knob, matched, sized
from workbench.sweep.space import TrialConfig
from workbench.sweep.spec import MatchSection, load_study
from workbench.tracking.recorded import SIZE

RANKS = """
lora:
  r: {values: [1, 2, 4, 8, 16]}
  target_modules: [query, value]
"""
GRID = "search: {sampler: grid, pruner: none}\n"


def ended(lab: Any) -> dict[int, str]:
    """Outcomes by rank."""
    return {int(run.data.params["lora.r"]): run.data.tags["workbench.outcome"] for run in lab.trials}


# ---------------------------------------------------------------- constraints


@pytest.fixture(scope="module")
def unlimited(new_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A run for each rank."""
    lab = new_lab(tmp_path_factory.mktemp("unlimited"))
    assert lab.write(RANKS, "{trials: 5}", more=GRID).sweep().code == 0
    return lab.trials


@pytest.mark.parametrize("how", [(), ("--solo",)])
@pytest.mark.parametrize("limit", ["trainable_params", "adapter_bytes"])
def test_a_trial_that_is_too_large_is_not_trained(
    lab: Any, unlimited: list[Any], limit: str, how: tuple[str, ...]
) -> None:
    sizes = {int(run.data.params["lora.r"]): int(run.data.metrics[limit]) for run in unlimited}
    assert sorted(sizes.values()) == [sizes[r] for r in (1, 2, 4, 8, 16)]
    lab.write(RANKS, "{trials: 5}", more=GRID + f"constraints: {{{limit}: {sizes[4]}}}\n")
    done = lab.sweep(*how)
    assert done.code == 0, done.err
    assert ended(lab) == {1: "complete", 2: "complete", 4: "complete", 8: "infeasible", 16: "infeasible"}
    assert "of at most" in done.out
    for trial in lab.study.get_trials():
        assert trial.state == (TrialState.COMPLETE if trial.params["lora.r"] <= 4 else TrialState.PRUNED)
        assert (trial.constraints[limit] <= 0) == (trial.params["lora.r"] <= 4)


@pytest.mark.parametrize("how", [(), ("--solo",)])
def test_a_trial_that_takes_too_long_ends(lab: Any, how: tuple[str, ...]) -> None:
    lab.write(RANKS, "{trials: 5}", more=GRID + "constraints: {seconds: 1e-6}\n")
    done = lab.sweep(*how)
    assert done.code == 1
    assert set(ended(lab).values()) == {"timed_out"}
    assert "5 trials: 5 timed out" in done.out
    assert "the 1e-06 seconds that it had are over" in done.out
    assert all(trial.constraints["seconds"] > 0 for trial in lab.study.get_trials())
    lab.name = "slow"
    lab.write(RANKS, "{trials: 5}", more=GRID + "constraints: {seconds: 1e6}\n")
    assert lab.sweep(*how).code == 0
    assert all(trial.constraints["seconds"] < 0 for trial in lab.study.get_trials())


# ---------------------------------------------------------------- several objectives


@pytest.mark.parametrize("how", [(), ("--solo",)])
def test_costs_are_objectives(lab: Any, how: tuple[str, ...]) -> None:
    also = ["trainable_params", "memory", "adapter_bytes", "seconds"]
    more = f"search: {{sampler: tpe}}\nobjective: {{metric: accuracy, also: [{', '.join(also)}]}}\n"
    lab.write(RANKS, "{trials: 6}", more=more)
    done = lab.sweep(*how)
    assert done.code == 0, done.err
    assert [direction.name for direction in lab.study.directions] == ["MAXIMIZE"] + ["MINIMIZE"] * 4
    for trial, run in zip(lab.study.get_trials(), lab.trials, strict=True):
        metrics = run.data.metrics
        assert trial.values[0] == metrics["validation.accuracy"]
        assert trial.values[1] == metrics["trainable_params"]
        peaks = [metrics[f"predicted_peak_mib/{phase}"] for phase in ("load", "train", "eval")]
        assert trial.values[2] == pytest.approx(max(peaks))
        assert trial.values[3] == metrics["adapter_bytes"]
        assert trial.values[4] == pytest.approx(metrics["seconds/total"])
    smallest = min(lab.study.get_trials(), key=lambda trial: trial.values[1])
    assert any(trial.params == smallest.params for trial in lab.study.best_trials), "nobody dominates the smallest"
    assert lab.parent.data.tags["workbench.also"] == " ".join(also)


def test_several_objectives_go_on_after_a_stop(lab: Any) -> None:
    more = "search: {sampler: random}\nobjective: {also: [trainable_params]}\n"
    lab.write(RANKS, "{trials: 2}", more=more)
    assert lab.sweep().code == 0
    assert lab.sweep("--trials", "4").code == 0
    assert Counter(len(trial.values) for trial in lab.study.get_trials()) == {2: 4}


def test_what_several_objectives_cannot_have(lab: Any) -> None:
    lab.write(RANKS, more="search: {sampler: cmaes, pruner: median}\nobjective: {also: [seconds]}\n")
    with pytest.raises(StudyError) as caught:
        load_study(lab.file)
    assert "several objectives cannot be pruned by one" in str(caught.value)
    assert "cmaes knows one objective" in str(caught.value)


# ---------------------------------------------------------------- one size for all

SIZES = """
lora:
  target_modules: {values: [[query, value], [query]]}
loha: {target_modules: [query, value]}
tokens: {method: trainable_tokens, token_indices: {most_informative: 4}}
prompt_tuning:
ia3: {target_modules: [key, value], feedforward_modules: []}
"""


@pytest.mark.parametrize("how", [(), ("--solo",)])
def test_sizes_are_solved_for(lab: Any, how: tuple[str, ...]) -> None:
    more = "search: {sampler: random, pruner: none}\nmatch: {trainable_params: 400, within: 0.3}\n"
    lab.write(SIZES, "{per_method: {trials: 2}}", more=more)
    done = lab.sweep(*how)
    assert done.code == 0, done.err
    solved = {}
    for run in lab.trials:
        label, trained = run.data.tags["workbench.label"], run.data.metrics["trainable_params"]
        assert run.data.tags["workbench.outcome"] == "complete", run.data.tags
        if label == "ia3":  # it comes in one size
            assert SIZE not in run.data.tags
        else:
            assert trained == pytest.approx(400, rel=0.3)
            solved[label] = int(run.data.tags[SIZE])
    assert set(solved) == {"lora", "loha", "tokens", "prompt_tuning"}
    (tokens,) = {
        run.data.params["tokens.token_indices"] for run in lab.trials if "tokens.token_indices" in run.data.params
    }
    assert tokens == f"most_informative={solved['tokens']}"
    again = workbench("reproduce", lab.name, "--trial", 0, "--home", lab.home, "--tolerance", "1e-3")
    assert again.code == 0, again.err


def test_a_number_that_cannot_be_met_is_infeasible(lab: Any) -> None:
    more = "search: {sampler: random, pruner: none}\nmatch: {trainable_params: 10}\n"
    lab.write("lora: {target_modules: [query]}", "{trials: 1}", more=more)
    done = lab.sweep()
    assert done.code == 1
    assert "the closest to 10 trainable parameters is 1 with" in done.out
    assert workbench("plan", lab.file, "--home", lab.home).code == 1


def test_what_is_solved_for_cannot_be_given(lab: Any) -> None:
    lab.write("lora: {r: 8}\nprompt_tuning: {num_virtual_tokens: 4}", more="match: {trainable_params: 10}\n")
    with pytest.raises(StudyError) as caught:
        load_study(lab.file)
    assert "r is solved for" in str(caught.value)
    assert "num_virtual_tokens is solved for" in str(caught.value)


def config(method: str = "lora", **adapter: Any) -> TrialConfig:
    return TrialConfig("label", method, adapter, {}, ())


@pytest.mark.parametrize("wanted", [1, 50, 51, 54, 55, 5000, 12345])
def test_the_closest_size_is_found(wanted: int) -> None:
    def count(own: TrialConfig) -> int:
        return 7 + 10 * own.adapter["r"]

    best = min(range(1, 2000), key=lambda r: abs(7 + 10 * r - wanted))
    found = matched(config(), MatchSection(trainable_params=max(wanted, 20), within=1.0), count)
    assert found.size == found.adapter["r"]
    if wanted >= 20:
        assert abs(count(found) - wanted) == abs(7 + 10 * best - wanted)


def test_a_method_that_stops_growing_has_its_smallest_size() -> None:
    """As LoKr, which is a whole matrix at some rank."""
    found = matched(config("lokr"), MatchSection(trainable_params=100), lambda own: min(95, 5 * own.adapter["r"]))
    assert found.size == 19
    with pytest.raises(ConfigError, match="the closest to 200 trainable parameters is 19 with 95"):
        matched(config("lokr"), MatchSection(trainable_params=200), lambda own: min(95, 5 * own.adapter["r"]))


def test_what_sets_the_size() -> None:
    assert knob(config("ia3")) is None
    assert knob(config("full")) is None
    tokens = config("trainable_tokens", token_indices=Tokens(most_frequent=8))
    assert knob(tokens) == "token_indices"
    assert sized(tokens, 3).adapter["token_indices"] == Tokens(most_frequent=3)
    assert knob(config("trainable_tokens", token_indices=Tokens(ids=(1, 2)))) is None
