"""How trials of a whole sweep end, and that those after one that ran out of memory do not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from allocator import Limited
from command import workbench
from optuna.trial import TrialState

from workbench.adapters.methods.ia3 import IA3
from workbench.sweep.display import Display
from workbench.sweep.record import Progress
from workbench.tracking.outcomes import tally

LARGE = 3000
RANKS = """
lora:
  r: {{values: {ranks}}}
  target_modules: [query, value]
  lora_dropout: 0.2
  learning_rate: 3e-2
"""
ONE_BY_ONE = "search: {sampler: grid, pruner: none, in_flight: 1}\n"
ALL = "search: {sampler: grid, pruner: none}\n"


def traceback_of(lab: Any, run: Any) -> str:
    """The artifact, "" if there is none."""
    if "traceback.txt" not in [file.path for file in lab.client.list_artifacts(run.info.run_id)]:
        return ""
    return Path(lab.client.download_artifacts(run.info.run_id, "traceback.txt")).read_text()


# -------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("how", ["--workers=1", "--solo"])
def test_trials_after_one_out_of_memory_are_as_if_it_had_not_been(
    new_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its initial values and the order of the data are those of any trial, so the same study can do without it."""
    calm, rough = (new_lab(tmp_path / name) for name in ("calm", "rough"))
    calm.write(RANKS.format(ranks=[1, 2, 4, 8]), "{trials: 9}", more=ONE_BY_ONE)
    with Limited() as plenty:
        assert calm.sweep(how).code == 0

    held: list[int] = []
    finished = Display.finished

    def count(*args: Any) -> None:
        finished(*args)
        held.append(memory.left())

    monkeypatch.setattr(Display, "finished", count)
    rough.write(RANKS.format(ranks=[1, LARGE, 2, 4, 8]), "{trials: 9}", more=ONE_BY_ONE)
    with Limited(1.2 * plenty.peak) as memory:
        done = rough.sweep(how)
    assert done.code == 0
    assert "5 trials: 4 complete, 1 out of memory" in done.out

    by_rank = {int(run.data.params["lora.r"]): run for run in rough.trials}
    large = by_rank.pop(LARGE)
    number = int(large.data.tags["workbench.trial"])
    assert 0 < number < 4, "there are trials before it and after it"
    assert held[number] == held[number - 1]
    assert len(set(held[1:])) == 1
    assert (large.data.tags["workbench.outcome"], large.info.status) == ("out_of_memory", "FAILED")
    assert "does not fit into memory; try micro_batch_size" in large.data.tags["workbench.message"]
    assert rough.study.trials[number].state == TrialState.FAIL
    assert traceback_of(rough, large) == ""
    for run in calm.trials:
        twin = by_rank.pop(int(run.data.params["lora.r"]))
        for name in ("train.loss", "validation.loss", "validation.accuracy"):
            assert rough.curve(twin, name) == calm.curve(run, name), "to the last bit"
        weights = "adapter_model.safetensors"
        assert (rough.adapter(twin) / weights).read_bytes() == (calm.adapter(run) / weights).read_bytes()
    assert by_rank == {}


# -------------------------------------------------------------------- crashed


@pytest.mark.parametrize("how", ["--solo", "--workers=1", "--workers=2"])
def test_the_traceback_of_a_method_that_crashes(lab: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("no such layer")

    monkeypatch.setattr(IA3, "post", broken)
    monkeypatch.setattr(IA3, "post_each", broken)
    methods = "lora: {r: 2, target_modules: [query]}\nia3: {target_modules: [key], feedforward_modules: []}"
    done = lab.write(methods, "{trials: 9}", more=ALL).sweep(how)
    assert done.code == 0
    assert "2 trials: 1 complete, 1 crashed" in done.out
    assert "Traceback" not in done.out + done.err
    crashed, complete = sorted(lab.trials, key=lambda run: run.data.tags["workbench.label"])
    assert crashed.data.tags["workbench.outcome"] == "crashed"
    assert crashed.data.tags["workbench.message"] == "KeyError: 'no such layer'"
    assert crashed.info.status == "FAILED"
    trace = traceback_of(lab, crashed)
    assert trace.startswith("Traceback (most recent call last):")
    assert "in broken\n    raise KeyError" in trace
    assert trace.endswith("KeyError: 'no such layer'\n")
    assert complete.data.tags["workbench.outcome"] == "complete"
    assert traceback_of(lab, complete) == ""
    shown = workbench("show", lab.name, "--home", lab.home)
    assert "2 trials: 1 complete, 1 crashed" in shown.out


# -------------------------------------------------------------------- timed out


@pytest.mark.parametrize("how", ["--workers=1", "--solo"])
def test_a_trial_that_is_too_slow_ends_at_its_first_step(lab: Any, how: str) -> None:
    lab.write(RANKS.format(ranks=[1, 2]), "{trials: 2}", more=ALL + "constraints: {seconds: 1e-6}\n")
    done = lab.sweep(how)
    assert "2 trials: 2 timed out" in done.out
    assert "lora: timed out, " in done.out
    for run, trial in zip(lab.trials, lab.study.trials, strict=True):
        assert (run.data.tags["workbench.outcome"], run.info.status) == ("timed_out", "KILLED")
        assert run.data.tags["workbench.message"] == "step 1: the 1e-06 seconds that it had are over"
        assert [*lab.curve(run, "train.loss")] == [1]
        assert not [metric for metric in run.data.metrics if metric.startswith("validation.")]
        assert run.data.metrics["seconds/total"] > 0
        assert trial.state == TrialState.PRUNED, "Optuna's samplers learn from constraints of these"
        assert trial.constraints["seconds"] == pytest.approx(run.data.metrics["seconds/total"] / 1e-6 - 1)


@pytest.mark.parametrize("how", ["--workers=1", "--solo"])
def test_a_trial_whose_evaluations_take_its_time_ends_after_one(
    lab: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "seconds", property(lambda self: 1000.0 if self.metrics else 0.0))
    lab.write(RANKS.format(ranks=[1]), "{trials: 1}", more=ALL + "constraints: {seconds: 900}\n")
    assert "it took 1000.0 of 900 seconds" in lab.sweep(how).out
    (run,) = lab.trials
    assert run.data.tags["workbench.outcome"] == "timed_out"
    assert [*lab.curve(run, "validation.loss")] == [5]


# -------------------------------------------------------------------- the summary


def test_every_outcome_is_counted_the_most_frequent_first() -> None:
    ended = ["crashed", "timed_out", "out_of_memory", *["pruned"] * 3, "running", *["complete"] * 12]
    assert tally(ended) == "12 complete, 3 pruned, 1 out of memory, 1 timed out, 1 crashed, 1 running"
    assert tally([]) == ""
