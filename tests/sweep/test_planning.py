"""What is predicted before trials train, and what follows from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from command import workbench
from optuna.trial import TrialState

from workbench.sweep import planning
from workbench.sweep.plan_table import duration, size
from workbench.sweep.planning import CORNERS, Planner, corners, relevant, survey
from workbench.sweep.record import prediction_errors
from workbench.sweep.space import TrialConfig
from workbench.sweep.spec import load_study
from workbench.sweep.workshop import Job, Workshop
from workbench.tracking import frames
from workbench.tracking.runs import default_store
from workbench.training.base import load_base
from workbench.training.data import read_data
from workbench.training.rehearsal import Need

MIB = 2**20
ROOT = Path(__file__).parents[2]

LARGE_AND_SMALL = """
lora:
  r: {values: [2, 512]}
  target_modules: [query, value]
"""


def planner_of(lab: Any) -> Planner:
    study = load_study(lab.file)
    raw = read_data(study.data, study.model.task)
    base = load_base(study.model, raw.labels, 0, "cpu")
    return Planner.beside(Workshop(study, base, raw, lab.home / "cache"))


def lora(**fields: Any) -> TrialConfig:
    return TrialConfig("lora", "lora", {"target_modules": ["query", "value"], **fields}, {}, ())


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each rehearsal from here on runs steps."""
    done: list[bool] = []
    rehearse = planning.rehearse

    def spy(bench: Any, stints: Any, steps: bool) -> Need:
        done.append(steps)
        return rehearse(bench, stints, steps)

    monkeypatch.setattr(planning, "rehearse", spy)
    return done


# -------------------------------------------------------------------- one trial


def test_each_kind_of_trial_is_rehearsed_once(lab, rehearsed):
    planner = planner_of(lab.write())
    need = planner.need(lora(r=4, lora_alpha=8, lora_dropout=0.1))
    assert planner.need(lora(r=4, lora_alpha=16, lora_dropout=0.2)) == need
    assert len(rehearsed) == 1
    assert planner.need(lora(r=4, lora_alpha=8, lora_dropout=0.0)).train < need.train
    assert len(rehearsed) == 2


def test_what_lies_on_a_line_is_not_rehearsed(lab, rehearsed):
    planner, fresh = planner_of(lab.write()), planner_of(lab)
    for r in (64, 256, 128):
        planner.need(lora(r=r))
    for r in (65, 200, 255):
        assert planner.need(lora(r=r)) == fresh.need(lora(r=r)), "to the byte"
    assert rehearsed == [True] * 3 + [False, True] * 3
    planner.need(lora(r=512))  # nobody knows whether the line goes on
    assert rehearsed[-1]


def test_what_bends_is_rehearsed(lab, rehearsed):
    """LoKr factors a layer's sizes, so that its rank does not make it grow evenly."""
    planner = planner_of(lab.write())
    lokr = [TrialConfig("lokr", "lokr", {"r": r, "target_modules": ["query"]}, {}, ()) for r in (1, 16, 8, 2)]
    for config in lokr:
        planner.need(config)
    assert rehearsed == [True] * 4


def test_why_a_configuration_cannot_run(lab, monkeypatch: pytest.MonkeyPatch):
    planner = planner_of(lab.write())
    verdict = planner.judge(lora(r=4, target_modules=["nothing"]))
    assert (verdict.need, verdict.unknown) == (None, "")
    assert "nothing" in verdict.refusal
    assert planner.judge(lora(r=4)).refusal == ""
    planner.limit = planner.need(lora(r=4)).peak
    assert planner.judge(lora(r=4)).refusal == ""
    planner.limit -= 1
    assert re.match(r"(evaluation|a training step) is predicted to need .* of ", planner.judge(lora(r=4)).refusal)

    def cannot(*_: Any, **__: Any) -> None:
        raise NotImplementedError("an operation\nwithout a kernel for this")

    monkeypatch.setattr(planning, "rehearse", cannot)
    verdict = planner.judge(lora(r=5))
    assert (verdict.need, verdict.refusal, verdict.unknown) == (None, "", "NotImplementedError: an operation")


def test_new_tokens_make_the_base_grow(lab):
    planner = planner_of(lab.write())
    file = lab.folder / "more.yaml"
    file.write_text(
        lab.file.read_text().replace(
            "methods:", "methods:\n  tokens: {method: trainable_tokens, token_indices: {new_tokens: [flurb, zonk]}}"
        )
    )
    (config,) = corners(load_study(file).methods["tokens"])
    need, plain = planner.need(config), planner.need(lora(r=2))
    assert need.weights - plain.weights == 2 * 16 * 4


# -------------------------------------------------------------------- several


def made_need(peak: int) -> Need:
    return Need(100, 1, 1, 2, peak, peak - 10, 1, 1)


def test_as_many_trials_share_a_pass_as_fit(lab, monkeypatch: pytest.MonkeyPatch):
    planner = planner_of(lab.write())
    planner.limit = 200
    needs = {1: 150, 2: 150, 3: 140, 4: 120, 5: 200}
    monkeypatch.setattr(planner, "need", lambda config: made_need(needs[config.adapter["r"]]))
    jobs = [Job(r, r, lora(r=r), None, Path("end"), 10, None) for r in needs]
    assert [[job.trial for job in own] for own in planner.fitting(jobs)] == [[1, 2], [3, 4], [5]]
    assert planner.together([made_need(150), made_need(140)]) == {"train": 190, "eval": 170}
    assert [made_need(peak).times(200) for peak in (110, 150, 151, 200, 201)] == [10, 2, 1, 1, 0]
    planner.limit = None
    assert [len(own) for own in planner.fitting(jobs)] == [5]


def test_predicted_against_measured():
    assert prediction_errors({"predicted_pass_mib/train": 105.0, "tensor_peak_mib/train": 100.0}) == {
        "prediction_error_percent/train": pytest.approx(5.0)
    }
    assert prediction_errors({"predicted_pass_mib/eval": 90.0, "cuda_peak_allocated_mib/eval": 100.0}) == {
        "prediction_error_percent/eval": pytest.approx(-10.0)
    }
    assert prediction_errors({"predicted_pass_mib/train": 1.0, "process_peak_growth_mib/train": 2.0}) == {}


# -------------------------------------------------------------------- corners


def test_corners(lab):
    lab.write(
        """
        lora:
          r: {min: 2, max: 64}
          lora_alpha: {values: [8, 16]}
          lora_dropout: {min: 0.0, max: 0.1}
          target_modules: {values: [[query], all-linear]}
          learning_rate: {min: 1e-3, max: 1e-1}
        """
    )
    found = corners(load_study(lab.file).methods["lora"])
    assert len(found) == 8
    assert {config.adapter["lora_alpha"] for config in found} == {8}
    assert {(config.adapter["r"], config.adapter["lora_dropout"]) for config in found} == {
        (r, p) for r in (2, 64) for p in (0.0, 0.1)
    }
    assert found[0].varied == ("r", "lora_dropout", "target_modules")
    assert len({relevant(config) for config in found}) == 8


def test_of_many_corners_some(lab):
    lab.write(
        """
        lora:
          r: {values: [1, 2, 3, 4, 5, 6]}
          layers_to_transform: {values: [[0], [1], [0, 1]]}
          target_modules: {values: [[query], [key], [value]]}
        """
    )
    found = corners(load_study(lab.file).methods["lora"])
    assert 2 < len(found) <= CORNERS
    assert {config.adapter["r"] for config in found} == {1, 2, 3, 4, 5, 6}
    assert found[-1].adapter == {"r": 6, "layers_to_transform": [0, 1], "target_modules": ["value"]}


def test_a_survey_is_in_order_whatever_was_looked_at_first(lab, rehearsed):
    lab.write("lora: {r: {values: [2, 4, 8, 16, 32]}, target_modules: [query]}")
    planner, heard = planner_of(lab), []
    verdicts = survey(planner, load_study(lab.file).methods["lora"], lambda: heard.append(1))
    assert [verdict.config.adapter["r"] for verdict in verdicts] == [2, 4, 8, 16, 32]
    assert len(heard) == 5
    assert sum(rehearsed) == 3


# -------------------------------------------------------------------- a sweep


def limit_between(lab: Any) -> float:
    """GiB that the small configuration needs and the large one does not do with."""
    planner = planner_of(lab)
    small, large = (planner.need(lora(r=r)).peak for r in (2, 512))
    assert small < large
    return (small + large) / 2 / 2**30


@pytest.mark.parametrize("how", ["workers", "solo"])
def test_what_does_not_fit_is_answered_without_training(lab, how: str):
    lab.write(LARGE_AND_SMALL, "{trials: 4}", "track_memory: true", "search: {sampler: grid, pruner: none}\n")
    limit = limit_between(lab)
    lab.file.write_text(lab.file.read_text() + f"constraints: {{vram_gib: {limit}}}\n")
    done = lab.sweep(*(["--solo"] if how == "solo" else ["--workers", "1"]))
    assert (done.code, done.err) == (0, "")
    assert "2 trials: 1 complete, 1 infeasible" in done.out
    assert "is predicted to need" in done.out
    small, large = sorted(lab.trials, key=lambda run: int(run.data.params["lora.r"]))
    assert small.data.tags["workbench.outcome"] == "complete"
    assert large.data.tags["workbench.outcome"] == "infeasible"
    assert not {"train.loss", "seconds/train"} & large.data.metrics.keys()
    assert large.data.metrics["predicted_peak_mib/train"] > small.data.metrics["predicted_peak_mib/train"]
    parts = ("weights", "adapter", "gradients", "moments", "activations")
    whole = sum(small.data.metrics[f"predicted_mib/{part}"] for part in parts)
    assert whole == pytest.approx(small.data.metrics["predicted_peak_mib/train"])
    if how == "workers":  # the plain loop is not what is rehearsed
        for phase in ("train", "eval"):
            measured, predicted = (
                small.data.metrics[f"{kind}_mib/{phase}"] for kind in ("tensor_peak", "predicted_peak")
            )
            error = small.data.metrics[f"prediction_error_percent/{phase}"]
            assert error == pytest.approx(100 * (predicted / measured - 1))
            assert abs(error) < 5
        assert "off by, %" in done.out

    by_rank = {trial.params["lora.r"]: trial for trial in lab.study.get_trials()}
    assert by_rank[2].state == TrialState.COMPLETE
    assert by_rank[512].state == TrialState.PRUNED  # what samplers learn from
    assert by_rank[512].constraints["vram_gib"] > 0 >= by_rank[2].constraints["vram_gib"]
    table = frames.trials(default_store(lab.home)[0], "tiny")
    assert sorted(table["outcome"]) == ["complete", "infeasible"]


def test_a_pruned_trial_is_told_from_one_that_does_not_fit(lab):
    lab.write("lora: {r: 512}", "{trials: 1}", more="constraints: {vram_gib: 0.0001}\n")
    done = lab.sweep()
    assert done.code == 1
    assert "no trial is complete" in done.out
    refused = lab.sweep("--resume-trial", "0")
    assert refused.code == 2
    assert "it is infeasible, not pruned" in refused.err


def test_tpe_learns_what_fits(lab):
    methods = "lora: {r: {min: 1, max: 600}, target_modules: [query, value]}"
    search = "{sampler: tpe, sampler_options: {n_startup_trials: 8}, pruner: none, in_flight: 1}"
    lab.write(methods, "{trials: 20}", more=f"search: {search}\n")
    limit = limit_between(lab)
    lab.file.write_text(
        lab.file.read_text().replace("steps: 10", "steps: 1").replace("eval_every: 5", "eval_every: 1")
        + f"constraints: {{vram_gib: {limit}}}\n"
    )
    assert lab.sweep("--workers", "1").code == 0
    outcomes = [run.data.tags["workbench.outcome"] for run in lab.trials]
    assert outcomes[:8].count("infeasible") > 4
    assert outcomes[8:].count("infeasible") < 5, "by chance it would be more than half of twelve"


def test_a_search_in_which_nothing_fits_ends(lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "PATIENCE", 4)
    lab.write(budget="{steps: 100}", more="constraints: {vram_gib: 0.0001}\n")
    done = lab.sweep()
    assert done.code == 2
    assert "4 trials in a row cannot run" in done.err
    assert "workbench plan" in done.err
    assert len(lab.study.get_trials()) == 4
    lab.write(budget="{trials: 5}", more="constraints: {vram_gib: 1}\n")
    assert lab.sweep().code == 0, "a higher limit lets the study go on"
    assert [run.data.tags["workbench.outcome"] for run in lab.trials] == ["infeasible"] * 4 + ["complete"]


@pytest.mark.parametrize("how", ["workers", "solo"])
def test_trials_that_run_are_finished_before_a_search_ends(lab, monkeypatch: pytest.MonkeyPatch, how: str):
    """The first one fits, then nothing does."""
    monkeypatch.setattr(planning, "PATIENCE", 4)
    excess = Planner.excess
    asked: list[Need] = []

    def only_first(self: Planner, need: Need) -> str:
        asked.append(need)
        return excess(self, need) if len(asked) == 1 else "it is too large"

    monkeypatch.setattr(Planner, "excess", only_first)
    monkeypatch.setattr(Planner, "fitting", lambda self, jobs: [list(jobs)])
    lab.write("lora: {r: {min: 1, max: 500}}", "{steps: 100}", more="constraints: {vram_gib: 1}\n")
    done = lab.sweep(*(["--solo"] if how == "solo" else ["--workers", "1"]))
    assert done.code == 2
    assert [run.data.tags["workbench.outcome"] for run in lab.trials] == ["complete"] + ["infeasible"] * 4


def test_what_cannot_be_predicted_runs(lab, monkeypatch: pytest.MonkeyPatch):
    def cannot(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(planning, "rehearse", cannot)
    lab.write(budget="{trials: 2}", more="constraints: {vram_gib: 0.0001}\n")
    assert lab.sweep().code == 0
    assert [run.data.tags["workbench.outcome"] for run in lab.trials] == ["complete"] * 2
    assert lab.trials[0].data.tags["workbench.unpredicted"] == "NotImplementedError: no kernel"


def test_no_prediction_where_nothing_asks_for_it(lab):
    lab.write(budget="{trials: 1}")
    assert lab.sweep().code == 0
    assert not [name for name in lab.trials[0].data.metrics if "predict" in name or "tensor_peak" in name]


# -------------------------------------------------------------------- the command


def plan(lab: Any, *words: object) -> Any:
    return workbench("plan", lab.file, "--home", lab.home, *words)


def test_the_command(lab):
    """What it says of a configuration is what a trial comes to."""
    lab.write("lora: {r: {values: [2, 8]}, target_modules: [query, value]}", "{trials: 2}", "track_memory: true")
    done = plan(lab)
    assert done.code == 0
    assert "2 of 2 configurations can run; no limit was given" in done.out
    assert "time: nothing was measured yet" in done.out
    need = planner_of(lab).need(lora(r=8))
    (row,) = [line for line in done.out.splitlines() if "r=8" in line]
    for value in (f"{need.trainable:,}", size(need.files), size(need.train), size(need.evaluation), "yes"):
        assert value in row


def test_the_command_needs_no_weights(lab, tmp_path: Path):
    lab.write()
    folder = tmp_path / "without"
    folder.mkdir()
    for file in lab.model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    lab.file.write_text(lab.file.read_text().replace(str(lab.model), str(folder)))
    done = plan(lab)
    assert done.code == 0
    assert "2 of 2 configurations can run" in done.out


def test_the_command_for_another_device_and_limit(lab):
    lab.write(LARGE_AND_SMALL)
    done = plan(lab, "--device", "cuda", "--vram-gib", limit_between(lab))
    assert done.code == 0
    assert "on cuda" in done.out
    assert "1 of 2 configurations can run; the limit is" in done.out
    assert "r=512: " in done.out
    assert "too large" in done.out
    done = plan(lab, "--vram-gib", "0.001")
    assert done.code == 1
    assert "0 of 2 configurations can run" in done.out


def test_the_command_tells_the_time_once_something_was_measured(lab):
    lab.write(budget="{trials: 2}")
    done = plan(lab, "--measure", "2")
    assert done.code == 0
    assert re.search(r"time: lora: .* s a step, .* s an evaluation, .* a trial .*\(2 steps were measured\)", done.out)
    assert re.search(r"time: .* for 2 trials", done.out)
    assert not optuna.get_all_study_names(f"sqlite:///{lab.home / 'optuna.db'}")
    assert lab.sweep().code == 0
    assert "(20 steps were measured)" in plan(lab).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "toaster"], "training.device: 'toaster' is no device"),
        (["--device", "cuda", "--measure", "1"], "--measure: cuda cannot be used here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_the_command_on_a_device_that_is_not_there(lab, words, message: str):
    done = plan(lab.write(), *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_on_a_device_that_is_not_there(lab):
    lab.write()
    lab.file.write_text(lab.file.read_text().replace("device: cpu", "device: cuda"))
    done = lab.sweep()
    assert done.code == 2
    assert "training.device: cuda cannot be used here" in done.err


def test_a_space_that_does_not_fit_the_model_is_refused_with_its_place(lab):
    done = plan(lab.write("lora: {r: 4, target_modules: [quarry]}"))
    assert done.code == 2
    assert "study.yaml:" in done.err
    assert "quarry" in done.err


def test_the_shipped_study_holds_what_does_not_fit(tmp_path: Path):
    """As docs/memory.md says."""
    done = workbench("plan", ROOT / "studies" / "memory.yaml", "--home", tmp_path)
    assert done.code == 0
    assert "7 of 10 configurations can run" in done.out
    message = "r=64, target_modules=all-linear: a training step is predicted to need 0.0892 GiB of 0.068"
    assert message in done.out
    page = (ROOT / "docs" / "memory.md").read_text()
    assert message.partition(": ")[2] in page
    assert "7 complete, 3 infeasible" in page


def test_figures():
    assert [size(n) for n in (0, 1023, 1024, 3 * MIB, 2**31)] == ["0 B", "1023 B", "1 KiB", "3 MiB", "2 GiB"]
    assert [duration(s) for s in (1.234, 119, 180, 7200)] == ["1.23 s", "119 s", "3 min", "2 h"]
