"""Which trials a sweep tries, stops and resumes: with made-up training, so that many trials take no time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from workbench.errors import WorkbenchError
from workbench.sweep.halving import Halving, rungs
from workbench.sweep.interrupt import Interrupt
from workbench.sweep.pool import Pool, crew
from workbench.sweep.scheduler import Scheduler
from workbench.sweep.workshop import Job, Workshop
from workbench.training.bench import Report

METHODS = """
lora:
  r: {values: [2, 4]}
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
ia3:
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
"""
STEPS = "steps: 9, batch_size: 8, eval_every: 1"


def made_up(job: Job, step: int) -> dict[str, float]:
    """Metrics of a trial, which has no training: a better learning rate has less loss, and less accuracy."""
    rate = float(job.config.training["learning_rate"])
    return {"loss": rate / step, "accuracy": rate, "f1": 0.0, "mcc": 0.0}


def train(shop: Workshop, jobs: Sequence[Job], on_step: Callable[[int, int, float], None]) -> list[Report]:
    """In place of `Workshop.train`. A checkpoint holds the steps that were made."""
    reports = []
    for job in jobs:
        made = load_file(job.begin)["steps"].tolist() if job.begin else []
        before = len(made)
        for step in range(len(made) + 1, job.until + 1):
            made.append(step)
            on_step(job.trial, step, 1 / step)
        assert made == [*range(1, job.until + 1)]
        save_file({"steps": torch.tensor(made)}, job.end, {"step": str(job.until), "config": "made up"})
        if job.results:
            (job.results / "adapter").mkdir(parents=True, exist_ok=True)
            (job.results / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        costs = {"seconds/train": 0.1, "seconds/eval": 0.1}
        metrics, new = made_up(job, job.until), job.until - before
        reports.append(Report(job.trial, job.until, new, metrics, costs=costs, trainable=1, total=2))
    return reports


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workshop, "train", train)


def write(lab: Any, search: str, budget: str = "{trials: 16}") -> Any:
    text = lab.write(METHODS, budget=budget, more=f"search: {{{search}}}\n").file.read_text()
    lab.file.write_text(text.replace("steps: 10, batch_size: 8, eval_every: 5", STEPS))
    return lab


def story(study: optuna.Study) -> list[tuple]:
    """What became of each trial."""
    return [(trial.number, trial.params, trial.state, trial.intermediate_values) for trial in study.trials]


def best(trials: Sequence[Any], step: int) -> set[int]:
    """The numbers of the best third at a step."""
    there = sorted((t for t in trials if step in t.intermediate_values), key=lambda t: t.intermediate_values[step])
    return {trial.number for trial in there[-max(1, len(there) // 3) :]}


# -------------------------------------------------------------------- who loses


def test_halving_compares_all_that_came_to_a_rung_in_whichever_order_they_are_judged():
    study = optuna.create_study(direction="minimize", pruner=Halving(1, 9))
    trials = [study.ask() for _ in range(7)]
    for trial, value in zip(trials, (5.0, 1.0, 7.0, 3.0, 2.0, 2.0, 6.0), strict=True):
        trial.report(value, 1)
    assert [trial.should_prune() for trial in trials] == [True, False, True, True, False, False, True]  # a tie
    assert [trial.should_prune() for trial in reversed(trials)][::-1][:3] == [True, False, True]
    trials[1].report(9.0, 2)  # no rung
    assert not trials[1].should_prune()
    trials[1].report(9.0, 3)  # the first one there
    assert not trials[1].should_prune()
    trials[4].report(8.0, 3)
    assert trials[1].should_prune()
    trials[4].report(0.0, 9)  # the end
    assert not trials[4].should_prune()


def test_hyperband_deals_trials_out_to_brackets_that_begin_with_later_rungs():
    assert rungs(10, 90) == [10, 30]
    assert rungs(10, 91) == [10, 30, 90]
    pruner = Halving(1, 9, brackets=True)
    brackets = [pruner.bracket(number) for number in range(17)]
    assert brackets == [0] * 9 + [1] * 5 + [2] * 3
    assert pruner.bracket(17) == 0
    study = optuna.create_study(direction="maximize", pruner=pruner)
    trials = [study.ask() for _ in range(17)]
    for trial in trials:
        trial.report(-trial.number, 1)
    assert [trial.number for trial in trials if trial.should_prune()] == [*range(3, 9)]
    for trial in trials[9:]:
        trial.report(trial.number, 3)
    assert [trial.number for trial in trials[9:] if trial.should_prune()] == [*range(9, 13)]


def test_all_at_once_is_synchronous_halving(lab):
    done = write(lab, "sampler: random, pruner: successive_halving").sweep()
    assert done.code == 0
    trials = lab.study.trials
    assert [{*t.intermediate_values} for t in trials if t.number not in best(trials, 1)] == [{1}] * 11
    assert len(best(trials, 1)) == 5
    assert [{*t.intermediate_values} for t in trials if t.number in best(trials, 1) - best(trials, 3)] == [
        {1, 2, 3}
    ] * 4
    (winner,) = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert {winner.number} == best(trials, 3) == best(trials, 1) & best(trials, 3)
    assert (
        winner.params.items()
        >= min((t.params for t in trials), key=lambda p: min(v for k, v in p.items() if "rate" in k)).items()
    )
    assert "16 trials: 15 pruned, 1 complete" in done.out


def test_whoever_waits_at_a_rung_is_compared_with_all_that_come_to_it(lab, monkeypatch: pytest.MonkeyPatch):
    """With few in flight, newcomers catch up before anybody goes on."""
    rounds: list[tuple[dict[int, int], dict[int, int]]] = []
    goals = Scheduler._goals

    def spy(self: Scheduler) -> dict[int, int]:
        rounds.append(({number: live.step for number, live in self.live.items()}, goals(self)))
        return rounds[-1][1]

    monkeypatch.setattr(Scheduler, "_goals", spy)
    write(lab, "sampler: random, pruner: successive_halving, in_flight: 4").sweep()
    assert max(len(steps) for steps, _ in rounds) == 4
    assert len(lab.study.trials) == 16
    for steps, aims in rounds:
        assert {steps[number] for number in aims} == {min(steps.values())}
        assert {*aims.values()} <= {1, 3, 9}
    trials = lab.study.trials
    assert {t.number for t in trials if 2 in t.intermediate_values} >= best(trials, 1)


@pytest.mark.parametrize(
    ("prune_by", "sign", "metric"),
    [("loss", -1, "loss"), ("accuracy", 1, "accuracy"), ("objective", 1, "accuracy")],
)
def test_what_the_pruner_compares(lab, prune_by: str, sign: int, metric: str):
    """Accuracy is maximised, so loss is reported as its negative; the last value is the objective in any case."""
    search = f"sampler: random, pruner: successive_halving, prune_by: {prune_by}"
    write(lab, search, budget="{trials: 6}").sweep()
    for run, trial in zip(lab.trials, lab.study.trials, strict=True):
        curve = lab.curve(run, f"validation.{metric}")
        assert trial.intermediate_values == {step: sign * value for step, value in curve.items()}
    (winner,) = [trial for trial in lab.study.trials if trial.state == TrialState.COMPLETE]
    rates = [next(v for k, v in trial.params.items() if "rate" in k) for trial in lab.study.trials]
    chosen = min if prune_by == "loss" else max
    assert rates[winner.number] == winner.value == chosen(rates)


# -------------------------------------------------------------------- the same whatever happens


@pytest.mark.parametrize(
    "search",
    [
        "sampler: tpe, sampler_options: {n_startup_trials: 4}, pruner: successive_halving",
        "sampler: tpe, sampler_options: {n_startup_trials: 4}, pruner: median",
        "sampler: random, pruner: hyperband",
    ],
    ids=["halving", "median", "hyperband"],
)
def test_the_same_trials_and_decisions_with_any_number_of_workers_and_interruptions(
    new_lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str
):
    labs = (new_lab(tmp_path / name) for name in ("one", "two", "stopped"))
    one, two, stopped = (write(lab, search, budget="{trials: 12}") for lab in labs)
    assert one.sweep("--workers=1").code == 0
    assert two.sweep("--workers=2").code == 0
    assert story(two.study) == story(one.study)
    assert TrialState.PRUNED in {trial.state for trial in one.study.trials}

    calls = count(1)

    def interrupted(*args: Any) -> list[Report]:
        if next(calls) in (3, 8):
            signal.raise_signal(signal.SIGINT)
        return train(*args)

    monkeypatch.setattr(Workshop, "train", interrupted)
    assert [stopped.sweep("--workers=1").code for _ in range(3)] == [130, 130, 0]
    assert story(stopped.study) == story(one.study)
    assert [run.data.tags["workbench.outcome"] for run in stopped.trials] == [
        run.data.tags["workbench.outcome"] for run in one.trials
    ]
    for run, trial in zip(stopped.trials, one.study.trials, strict=True):
        assert [*stopped.curve(run, "validation.loss")] == [*trial.intermediate_values]
        assert [*stopped.curve(run, "train.loss")] == [*range(1, trial.last_step + 1)]
        assert run.data.metrics["seconds/total"] == pytest.approx(0.2 * trial.last_step)


def test_a_budget_of_steps_counts_what_live_trials_will_make(lab):
    write(lab, "sampler: random, pruner: none", budget="{steps: 30}").sweep()
    assert len(lab.study.trials) == 4  # nine steps each


# -------------------------------------------------------------------- workers


def test_who_trains(monkeypatch: pytest.MonkeyPatch):
    """One worker a core on the CPU, but not more than there are trials; elsewhere this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))

    def size(device: str, workers: int | None, trials: int) -> int:
        shop: Any = SimpleNamespace(base=SimpleNamespace(device=torch.device(device)))
        found = crew(shop, Interrupt(), workers, trials)
        return found._size if isinstance(found, Pool) else 1

    assert [size("cpu", None, 9), size("cpu", None, 3), size("cpu", None, 1)] == [4, 3, 1]
    assert [size("cpu", 6, 9), size("cpu", 1, 9), size("cuda", None, 9)] == [6, 1, 1]
    with pytest.raises(WorkbenchError, match="--workers 2: several workers need Linux, and a study on the CPU"):
        size("cuda", 2, 9)


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_dies(lab, monkeypatch: pytest.MonkeyPatch, times: int):
    """Its trial is given to another worker once, from the checkpoint before."""
    deaths = lab.folder / "deaths"

    def deadly(shop: Workshop, jobs: Sequence[Job], on_step: Any) -> list[Report]:
        if jobs[0].trial == 1 and jobs[0].until == 5 and (not deaths.exists() or deaths.stat().st_size < times):
            with deaths.open("a") as file:
                file.write(".")
            os.kill(os.getpid(), signal.SIGKILL)
        return train(shop, jobs, on_step)

    monkeypatch.setattr(Workshop, "train", deadly)
    done = write(lab, "sampler: random, pruner: none", budget="{trials: 4}").sweep("--workers=2")
    assert (done.code, done.err) == (0, "")
    outcomes = [run.data.tags["workbench.outcome"] for run in lab.trials]
    assert outcomes == ["complete", "crashed" if times == 2 else "complete", "complete", "complete"]
    message = lab.trials[1].data.tags.get("workbench.message", "")
    assert ("Two worker processes were killed by signal 9 in this trial" in message) == (times == 2)
    assert [*lab.curve(lab.trials[1], "train.loss")] == [*range(1, 5 if times == 2 else 10)]


def test_a_lone_trial_has_the_threads_of_all_workers(lab, monkeypatch: pytest.MonkeyPatch):
    """That hangs where a process uses the thread pool of the one that forked it."""
    noted = lab.folder / "threads"

    def training(shop: Workshop, jobs: Sequence[Job], on_step: Any) -> list[Report]:
        _ = torch.ones(700, 700) @ torch.ones(700, 700)
        with noted.open("a") as file:
            file.write(f"{jobs[0].until}:{torch.get_num_threads()} ")
        return train(shop, jobs, on_step)

    monkeypatch.setattr(Workshop, "train", training)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _ = torch.ones(700, 700) @ torch.ones(700, 700)
        write(lab, "sampler: random, pruner: successive_halving", budget="{trials: 9}").sweep("--workers=2")
    finally:
        torch.set_num_threads(before)
    rounds = [["1:1"] * 9, ["2:1", "3:1"] * 3, [f"{step}:2" for step in range(4, 10)]]
    assert sorted(noted.read_text().split()) == sorted(chain(*rounds))


# -------------------------------------------------------------------- pruned trials that are taken up again


def test_a_pruned_trial_is_taken_up_again(lab):
    write(lab, "sampler: random, pruner: successive_halving", budget="{trials: 6}").sweep()
    pruned = [trial for trial in lab.study.trials if trial.state == TrialState.PRUNED]
    first, second = pruned[:2]
    files = {file.name for file in (lab.home / "checkpoints").rglob("*.*")}
    assert files == {f"{trial.number}-{trial.last_step}.safetensors" for trial in pruned}

    done = lab.sweep("--resume-trial", first.number, "--resume-trial", second.number)
    assert done.code == 0
    assert f"takes up trial {first.number} again, from step {first.last_step}" in done.out
    assert f"complete, resumes {first.number}" in done.out
    assert "is finished: 8 trials" in lab.sweep().out  # the budget was spent, and still is
    for trial, origin in zip(lab.study.trials[6:], (first, second), strict=True):
        assert (trial.state, trial.params) == (TrialState.COMPLETE, origin.params)
        assert trial.user_attrs["resumes"] == origin.number
        run = lab.trials[trial.number]
        assert run.data.tags["workbench.resumes"] == str(origin.number)
        assert [*lab.curve(run, "train.loss")] == [*range(origin.last_step + 1, 10)]
    for number, reason in (
        (first.number, "that was done, as trial 6"),
        (6, "it is complete, not pruned"),
        (99, "has no trial 99"),
    ):
        refused = lab.sweep("--resume-trial", number)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert reason in refused.err
    write(lab, "sampler: random, pruner: successive_halving", budget="{trials: 7}").sweep()
    assert len(lab.study.trials) == 9  # one more: the two that were taken up again do not count


def test_solo_has_no_workers_and_no_checkpoints(lab):
    write(lab, "sampler: random, pruner: none", budget="{trials: 2}")
    for words in (["--workers", 2], ["--resume-trial", 0], ["--launcher", "processes"]):
        done = lab.sweep("--solo", *words)
        assert (done.code, done.out) == (2, "")
        assert "--solo goes with no --workers, --launcher or --resume-trial" in done.err
