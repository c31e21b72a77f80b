"""Whole sweeps on a tiny model: what they record, when they end, and that a trial that fails harms no other."""

from __future__ import annotations

import csv
import itertools
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import peft
import pytest
import torch
from mlflow.entities import Run
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workbench.adapters.tuner_layer import TunerLayer
from workbench.sweep import solo, workshop
from workbench.sweep.budget import Clock
from workbench.sweep.workshop import Workshop
from workbench.training import loop, trainee
from workbench.training.base import Base, fingerprint, load_base
from workbench.training.trainee import Trainee

ROOT = Path(__file__).parents[2]

EVERY_METHOD = """
lora:
  r: {values: [2, 4]}
  target_modules: [query, value]
  learning_rate: 3e-2
ia3:
  learning_rate: 5e-2
trainable_tokens:
  token_indices: {most_informative: 50}
  learning_rate: 3e-2
tokens_with_lora:
  method: lora
  r: 2
  target_modules: [query]
  trainable_token_indices: [film, good]
  learning_rate: 3e-2
"""
GRID = "search: {sampler: grid, pruner: none}\n"


@pytest.fixture(scope="module")
def every_method(new_lab: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Base]:
    """A sweep over all methods, and the base that its trials shared."""
    lab = new_lab(tmp_path_factory.mktemp("every-method"))
    lab.write(EVERY_METHOD, budget="{trials: 20}", more=GRID)
    bases: list[Base] = []
    with mock.patch.object(workshop, "load_base", lambda *args: bases.append(load_base(*args)) or bases[-1]):
        done = lab.sweep()
    assert (done.code, done.err) == (0, "")
    return lab, bases[0]


def is_as_loaded(base: Base) -> bool:
    """Whether configuration and weights are those that were read from the files."""
    return fingerprint(base.model) == base.fingerprint


def score_with_peft(
    adapter: Path, model: Path, data: Path, tokenizer: Path | None = None, rows: int | None = None
) -> tuple[float, float]:
    """Mean loss and accuracy on the validation file, of the adapter that peft puts on a base drawn anew."""
    with (data / "validation.csv").open(newline="") as file:
        reviews = list(csv.DictReader(file))[:rows]
    names = sorted({review["label"] for review in reviews})
    words = AutoTokenizer.from_pretrained(tokenizer or model)
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(names), dtype=torch.float32)
    if tokenizer:
        base.resize_token_embeddings(len(words), mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    inputs = words([r["text"] for r in reviews], padding=True, truncation=True, max_length=32, return_tensors="pt")
    labels = torch.tensor([names.index(review["label"]) for review in reviews])
    with torch.no_grad():
        output = adapted(**inputs, labels=labels)
    return output.loss.item(), (output.logits.argmax(-1) == labels).float().mean().item()


def check_in_peft(lab: Any, run: Run, **options: Any) -> None:
    """A trial's adapter, put on a fresh base by peft, measures as the trial did."""
    loss, accuracy = score_with_peft(lab.adapter(run), lab.model, lab.data, **options)
    assert accuracy == pytest.approx(run.data.metrics["validation.accuracy"])
    assert loss == pytest.approx(run.data.metrics["validation.loss"], abs=1e-5)


# -------------------------------------------------------------------- what is recorded


def test_optuna_has_each_trial_once_and_the_grid_ends_the_sweep(every_method):
    lab, _ = every_method
    trials = lab.study.trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert Counter(trial.params["method"] for trial in trials) == {
        "lora": 2,
        "ia3": 1,
        "trainable_tokens": 1,
        "tokens_with_lora": 1,
    }
    assert sorted(trial.params["lora.r"] for trial in trials if "lora.r" in trial.params) == [2, 4]
    for trial, run in zip(trials, lab.trials, strict=True):
        assert trial.user_attrs["run_id"] == run.info.run_id
        assert trial.value == run.data.metrics["validation.accuracy"]
        losses = lab.curve(run, "validation.loss")  # accuracy is maximised, so their negatives are compared
        assert trial.intermediate_values == {step: -loss for step, loss in losses.items()}


def test_the_parent_run(every_method):
    lab, base = every_method
    parent = lab.parent
    artifact = lab.client.download_artifacts(parent.info.run_id, "study.yaml")
    assert Path(artifact).read_text() == lab.file.read_text()
    assert parent.info.status == "FINISHED"
    params, tags = parent.data.params, parent.data.tags
    assert params["model.fingerprint"] == base.fingerprint
    assert (params["model.path"], params["training.steps"], params["training.seed"]) == (str(lab.model), "10", "0")
    assert (params["search.sampler"], params["data.rows"]) == ("grid", "train 160, validation 50")
    assert params["base_dropout"].startswith("off")
    assert (tags["workbench.metric"], tags["workbench.goal"]) == ("accuracy", "maximize")
    assert tags["workbench.env.version.torch"] == torch.__version__
    assert {"workbench.env.version.transformers", "workbench.env.version.mlflow", "workbench.env.python"} <= set(tags)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert tags.get("workbench.env.git.commit") == (git.stdout.strip() if git.returncode == 0 else None)
    assert parent.data.metrics["seconds/load"] > 0
    (used,) = parent.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("tiny", params["data.fingerprint"])


def test_the_child_runs(every_method):
    lab, base = every_method
    assert len(lab.runs) == 6  # no run besides the parent and one a trial
    size = sum(parameter.numel() for parameter in base.model.parameters())
    for number, run in enumerate(lab.trials):
        tags, metrics = run.data.tags, run.data.metrics
        assert (tags["workbench.trial"], tags["workbench.init_seed"]) == (str(number), "0")
        assert (tags["workbench.outcome"], run.info.status) == ("complete", "FINISHED")
        assert tags["workbench.method"] == {"tokens_with_lora": "lora"}.get(label := tags["workbench.label"], label)
        assert run.data.params[f"{label}.learning_rate"] == {"ia3": "0.05"}.get(label, "0.03")
        assert list(lab.curve(run, "train.loss")) == [*range(1, 11)]
        for metric in ("accuracy", "f1", "mcc", "loss"):
            assert list(lab.curve(run, f"validation.{metric}")) == [5, 10]
        trained = metrics["trainable_params"]
        assert 0 < trained < metrics["all_params"] <= size + trained
        assert metrics["trainable_percent"] == pytest.approx(100 * trained / metrics["all_params"])
        files = [file for file in lab.adapter(run).iterdir() if file.name.startswith("adapter_")]
        assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
        assert metrics["adapter_bytes"] == sum(file.stat().st_size for file in files)
        assert metrics["tokens_seen"] > 10 * 8 * 2
        assert 0 < metrics["seconds/train"] + metrics["seconds/eval"] <= metrics["seconds/total"]
        # on a CPU nothing may pass for memory of a GPU
        memory = {name for name in metrics if "_mib" in name or "memory" in name or "peak" in name}
        assert memory == {"process_peak_growth_mib/train", "process_peak_growth_mib/eval"}
        (used,) = run.inputs.dataset_inputs
        assert used.dataset.digest == lab.parent.data.params["data.fingerprint"]


def test_hyperparameters_count_parameters(every_method):
    lab, _ = every_method
    trained = {
        (run.data.tags["workbench.label"], run.data.params.get("lora.r")): run.data.metrics["trainable_params"]
        for run in lab.trials
    }
    head, layers, hidden = 16 * 2 + 2, 2, 16
    assert trained["lora", "2"] == head + layers * 2 * 2 * (2 * hidden)
    assert trained["lora", "4"] == head + layers * 2 * 4 * (2 * hidden)
    assert trained["trainable_tokens", None] == head + 50 * hidden
    assert trained["tokens_with_lora", None] == head + layers * 2 * (2 * hidden) + 2 * hidden


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft knows no modules_to_save of trainable tokens
def test_peft_loads_every_adapter_and_measures_the_same(every_method):
    lab, _ = every_method
    for run in lab.trials:
        check_in_peft(lab, run)


def test_the_base_is_left_as_it_was(every_method):
    _, base = every_method
    assert is_as_loaded(base)
    assert not [module for module in base.model.modules() if isinstance(module, TunerLayer)]
    assert not [name for name, parameter in base.model.named_parameters() if parameter.requires_grad]
    assert not base.model.training


def test_the_table_lists_every_trial(every_method):
    lab, _ = every_method
    done = lab.sweep()  # finished, so it only tells
    rows = [line for line in done.out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0].split("│")[1:3]] == [
        "1",
        str(max(lab.study.trials, key=lambda t: t.value).number),
    ]
    assert len(rows) == 5
    assert "5 trials: 5 complete" in done.out


# -------------------------------------------------------------------- when it ends


def test_a_finished_study_trains_nothing(every_method, monkeypatch: pytest.MonkeyPatch):
    lab, _ = every_method
    before = lab.results()
    monkeypatch.setattr(workshop, "load_base", mock.Mock(side_effect=AssertionError("it is finished")))
    done = lab.sweep()
    assert done.code == 0
    assert "study tiny is finished: 5 trials, every combination of its grid." in done.out
    assert lab.results() == before


def test_a_larger_budget_goes_on_as_if_it_had_been_so_from_the_start(new_lab, tmp_path: Path):
    short, long = new_lab(tmp_path / "short"), new_lab(tmp_path / "long")
    short.write(budget="{trials: 2}").sweep()
    done = short.sweep()
    assert "study tiny is finished: 2 trials have used its budget (2 trials). Raise the budget" in done.out
    done = short.write(budget="{trials: 4}").sweep("--trials", 3)  # the word on the command line counts
    assert "resuming study tiny: 2 trials are done" in done.out
    assert [line.split(":")[0] for line in done.out.splitlines() if "complete," in line] == ["trial 2 lora"]
    long.write(budget="{trials: 3}").sweep()
    short.check_alike(short.results(), long.results())
    assert len(short.results()) == 3
    assert len({str(params) for _, params, *_ in long.results()}) == 3  # it did not draw the same again


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda lab: change_text(lab.file, "[2, 4]", "[2, 8]"), "the file changed"),
        (lambda lab: change_text(lab.file, "steps: 10", "steps: 9"), "the file changed"),
        (lambda lab: change_text(lab.data / "train.csv", "movie", "opera"), "the data changed"),
        (lambda lab: change_text(lab.model / "tokenizer.json", '"movie"', '"opera"'), "the data changed"),
        (lambda lab: change_weights(lab.model), "the data changed"),
    ],
    ids=["search space", "training", "rows", "tokenizer", "weights"],
)
def test_results_that_cannot_be_compared_are_refused(every_method, tmp_path: Path, change, culprit):
    """The budget is left open, so that only the change stands in the way."""
    swept, _ = every_method
    lab = type(swept)(tmp_path, tmp_path / "model", tmp_path / "data")
    for old, new in ((swept.home, lab.home), (swept.model, lab.model), (swept.data, lab.data)):
        shutil.copytree(old, new)
    lab.write(EVERY_METHOD, budget="{trials: 20}", more=GRID)
    # one trial less than the grid has, so that the study is not finished
    storage = optuna.storages.RDBStorage(f"sqlite:///{lab.home / 'optuna.db'}")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trials WHERE number = 4")
    change(lab)
    done = lab.sweep()
    assert done.code == 2
    assert culprit in done.err
    assert "Give the changed study a new name" in done.err
    assert "Traceback" not in done.err
    assert len(lab.study.trials) == 4


def change_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def change_weights(folder: Path) -> None:
    """Change one weight of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_budget_of_steps(lab):
    assert lab.write(budget="{steps: 25}").sweep().code == 0  # ten a trial: the third one passes it
    assert len(lab.study.trials) == 3
    assert "is finished: 3 trials have used its budget (25 steps)" in lab.sweep().out


@pytest.mark.parametrize("how", ["--solo", "--workers=1"])
def test_a_budget_of_minutes(lab, monkeypatch: pytest.MonkeyPatch, how: str):
    def seconds(clock: Clock) -> float:
        return 31.0 * sum(trial.state.is_finished() for trial in lab.study.trials)

    monkeypatch.setattr(Clock, "seconds", property(seconds))
    lab.write(budget="{minutes: 1}", more="search: {sampler: random, pruner: none, in_flight: 1}\n")
    assert lab.sweep(how).code == 0  # 31 seconds a trial: the second one passes it
    assert len(lab.study.trials) == 2
    assert "is finished: 2 trials have used its budget (1 minutes)" in lab.sweep(how).out


@pytest.mark.parametrize(("training", "orders"), [("", 1), ("data_order: own", 2)])
@pytest.mark.parametrize(("how", "module"), [("--solo", loop), ("--workers=1", trainee)])
def test_trials_share_the_order_of_the_data(
    lab, monkeypatch: pytest.MonkeyPatch, training: str, orders: int, how: str, module: Any
):
    seen: list[list[list[int]]] = []

    def spy(*args: Any) -> Iterator[list[int]]:
        drawn, kept = itertools.tee(batches(*args))
        seen.append([[*rows] for rows in kept])
        return drawn

    batches = module.batches
    monkeypatch.setattr(module, "batches", spy)
    assert lab.write(budget="{trials: 2}", training=training).sweep(how).code == 0
    assert {len(order) for order in seen} == {10}
    assert len({str(order) for order in seen}) == orders


# -------------------------------------------------------------------- the fast way and the plain one


def check_measured_alike(fast: Run, plain: Run) -> None:
    """The same trial, trained in two ways."""
    assert fast.data.params == plain.data.params
    for metric in ("loss", "accuracy", "f1", "mcc"):
        name = f"validation.{metric}"
        assert fast.data.metrics[name] == pytest.approx(plain.data.metrics[name], abs=5e-5)
    for metric in ("trainable_params", "all_params", "adapter_bytes"):
        assert fast.data.metrics[metric] == plain.data.metrics[metric]


def test_solo_measures_the_same(every_method, new_lab, tmp_path: Path):
    swept, _ = every_method
    lab = new_lab(tmp_path).write(EVERY_METHOD, budget="{trials: 20}", more=GRID)
    assert lab.sweep("--solo").code == 0
    for fast, plain in zip(swept.trials, lab.trials, strict=True):
        check_measured_alike(fast, plain)
        assert fast.data.metrics["tokens_seen"] == plain.data.metrics["tokens_seen"]


def test_a_pruned_trial_that_is_taken_up_again_ends_like_one_that_never_was(new_lab, tmp_path: Path):
    methods = """
    lora:
      r: {values: [2, 4]}
      target_modules: [query, value]
      lora_dropout: 0.2
      learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
    """
    halved, whole = (new_lab(tmp_path / name) for name in ("halved", "whole"))
    order = "data_order: own"
    whole.write(methods, training=order).sweep()
    halved.write(methods, training=order, more="search: {sampler: random, pruner: successive_halving}\n").sweep()
    pruned = [trial.number for trial in halved.study.trials if trial.state == TrialState.PRUNED]
    assert len(pruned) == 2
    assert halved.sweep("--resume-trial", pruned[1]).code == 0
    again, never = halved.trials[3], whole.trials[pruned[1]]
    assert list(halved.curve(again, "train.loss")) == [6, 7, 8, 9, 10]
    assert 0 < again.data.metrics["tokens_seen"] < never.data.metrics["tokens_seen"]
    check_measured_alike(again, never)
    check_in_peft(halved, again)


# -------------------------------------------------------------------- trials that go wrong


def fault(number: int, step: int) -> None:
    """What goes wrong in the next test after a trial's step; 0 is where its adapter is made."""
    if (number, step) == (0, 0):
        raise RuntimeError("a bug in a method")
    if (number, step) == (2, 3):
        raise MemoryError
    if (number, step) == (3, 0):
        raise MemoryError("the adapter is too large")


def break_solo(patch: pytest.MonkeyPatch) -> None:
    """Put the faults into trials that train alone."""
    current, adapted, train = -1, solo.adapted, solo.train

    def faulty_adapted(*args: Any) -> Any:
        nonlocal current
        current += 1
        fault(current, 0)
        return adapted(*args)

    def faulty_train(*args: Any, on_step: Callable[[int, float], None], **options: Any) -> Any:
        def on_faulty_step(step: int, loss: float) -> None:
            fault(current, step)
            on_step(step, loss)

        return train(*args, on_step=on_faulty_step, **options)

    patch.setattr(solo, "adapted", faulty_adapted)
    patch.setattr(solo, "train", faulty_train)


def break_bench(patch: pytest.MonkeyPatch) -> None:
    """Put the faults into trials on the bench."""
    begin, stepped = Trainee._begin, Trainee.stepped

    def faulty_begin(self: Trainee, *args: Any) -> None:
        fault(self.stint.trial, 0)
        begin(self, *args)

    def faulty_step(self: Trainee) -> None:
        fault(self.stint.trial, self.step + 1)
        stepped(self)

    patch.setattr(Trainee, "_begin", faulty_begin)
    patch.setattr(Trainee, "stepped", faulty_step)


@pytest.mark.parametrize(
    ("how", "break_trials"), [("--solo", break_solo), ("--workers=1", break_bench), ("--workers=2", break_bench)]
)
def test_what_becomes_of_a_trial_does_not_touch_the_others(
    new_lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, break_trials: Callable
):
    calm, rough = new_lab(tmp_path / "calm"), new_lab(tmp_path / "rough")
    calm.write(budget="{trials: 5}").sweep(how)

    break_trials(monkeypatch)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
    more = "search: {sampler: random, pruner: successive_halving}\n"
    done = rough.write(budget="{trials: 5}", more=more).sweep(how)
    assert done.code == 0
    assert done.out.count("5 trials") == 3
    (counts,) = [line for line in done.out.splitlines() if line.startswith("5 trials: ")]
    counted = {"1 complete", "2 out of memory", "1 crashed", "1 pruned"}
    assert {*counts.removeprefix("5 trials: ").split(", ")} == counted

    outcomes = [(run.data.tags["workbench.outcome"], run.info.status) for run in rough.trials]
    assert outcomes == [
        ("crashed", "FAILED"),
        ("pruned", "KILLED"),
        ("out_of_memory", "FAILED"),
        ("out_of_memory", "FAILED"),
        ("complete", "FINISHED"),
    ]
    states = [trial.state for trial in rough.study.trials]
    assert states == [
        TrialState.FAIL,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert [trial.user_attrs["outcome"] for trial in rough.study.trials] == [outcome for outcome, _ in outcomes]
    crashed, pruned, starved, too_large, _ = rough.trials
    trace = Path(rough.client.download_artifacts(crashed.info.run_id, "traceback.txt")).read_text()
    assert trace.startswith("Traceback")
    assert trace.rstrip().endswith("RuntimeError: a bug in a method")
    assert crashed.data.tags["workbench.message"] == "RuntimeError: a bug in a method"
    assert "trial 0 lora: crashed, " in done.out
    assert "Traceback" not in done.out + done.err
    assert list(rough.curve(pruned, "train.loss")) == [1, 2, 3, 4, 5]
    assert pruned.data.tags["workbench.message"] == "worse than others at step 5"
    assert "does not fit into memory; try " in starved.data.tags["workbench.message"]
    assert "(the adapter is too large)" in too_large.data.tags["workbench.message"]
    assert {*starved.data.metrics} >= {"trainable_params", "seconds/total"}
    assert list(rough.curve(starved, "train.loss")) == [1, 2]
    rough.check_alike(rough.results()[4:], calm.results()[4:])
    settings = [(number, params) for number, params, *_ in calm.results()]
    assert [(number, params) for number, params, *_ in rough.results()] == settings


def test_divergence_and_combinations_that_do_not_fit(lab):
    methods = """
    wild:
      method: lora
      target_modules: [query]
      learning_rate: 1e+30
    narrow:
      method: lora
      target_modules: {values: [[query], [key]]}
      exclude_modules: {values: [[value], [key]]}
    """
    done = lab.write(methods, budget="{trials: 9}", more=GRID).sweep()
    assert done.code == 0
    assert "5 trials: 3 complete, 1 " in done.out
    by_label = {run.data.tags["workbench.outcome"]: run for run in lab.trials}
    assert {*by_label} == {"complete", "diverged", "infeasible"}
    diverged, infeasible = by_label["diverged"], by_label["infeasible"]
    assert (diverged.info.status, infeasible.info.status) == ("FAILED", "KILLED")
    assert "learning rate 1e+30; try a lower learning_rate" in diverged.data.tags["workbench.message"]
    assert "No modules were targeted" in infeasible.data.tags["workbench.message"]
    assert infeasible.data.params["narrow.target_modules"] == infeasible.data.params["narrow.exclude_modules"]


@pytest.mark.parametrize("how", ["--solo", "--workers=2"])
def test_a_sweep_in_which_nothing_works_says_so(lab, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setattr(Workshop, "peft_config", mock.Mock(side_effect=RuntimeError("a bug in a method")))
    done = lab.write(budget="{trials: 2}").sweep(how)
    assert done.code == 1
    assert "2 trials: 2 crashed\nno trial is complete" in done.out


def test_a_storage_that_breaks_ends_the_sweep_with_a_message(lab, monkeypatch: pytest.MonkeyPatch):
    def breaking(*args: Any) -> Any:
        with optuna.storages.RDBStorage(f"sqlite:///{lab.home / 'optuna.db'}").engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE trial_intermediate_values")
        return train(*args)

    train = Workshop.train
    monkeypatch.setattr(Workshop, "train", breaking)
    done = lab.write().sweep()
    assert done.code == 2
    assert "cannot be used: " in done.err
    assert "trial_intermediate_values" in done.err
    assert len(done.err.splitlines()) == 1
    assert lab.parent.info.status == "FAILED"


# -------------------------------------------------------------------- new tokens, and a real model


def test_new_tokens(lab, monkeypatch: pytest.MonkeyPatch):
    """Two words that the vocabulary holds in pieces only become tokens that train."""
    tokenizer = AutoTokenizer.from_pretrained(lab.model)
    words = Counter(
        word
        for row in (lab.data / "train.csv").read_text().lower().split("\n")
        for word in row.split()
        if word.isalpha()
    )
    new = [word for word, _ in words.most_common() if len(tokenizer.tokenize(word)) > 1][:2]
    bases: list[Base] = []
    monkeypatch.setattr(workshop, "load_base", lambda *args: bases.append(load_base(*args)) or bases[-1])
    methods = f"""
    trainable_tokens:
      token_indices: {{new_tokens: {new}}}
      learning_rate: 5e-2
    lora:
      target_modules: [query]
      trainable_token_indices: {{new_tokens: {new}}}
    plain:
      method: lora
      target_modules: [query]
    """
    assert lab.write(methods, budget="{trials: 9}", more=GRID).sweep().code == 0
    assert len(lab.trials) == 3
    for run in lab.trials:
        adapter = lab.adapter(run)
        if run.data.tags["workbench.label"] == "plain":
            assert not (adapter / "tokenizer.json").exists()
            check_in_peft(lab, run)
            continue
        extended = AutoTokenizer.from_pretrained(adapter)
        assert len(extended) == len(tokenizer) + 2
        assert extended.tokenize(" ".join(new)) == new
        check_in_peft(lab, run, tokenizer=adapter)
    (base,) = bases
    assert is_as_loaded(base)
    assert base.model.get_input_embeddings().weight.shape[0] == base.model.config.vocab_size == 8000


def test_the_shipped_model(new_lab, tmp_path: Path):
    """A pretrained model in half precision that lacks pooler and head."""
    assets = ROOT / "studies" / "assets"
    lab = new_lab(tmp_path)
    lab.model, lab.data = assets / "minilm-l3-8k", assets / "movie_sentiment"
    methods = "lora: {target_modules: all-linear, learning_rate: 5e-3}\ntrainable_tokens: {token_indices: [film, good]}"
    lab.write(methods, budget="{trials: 9}", more=GRID)
    text = lab.file.read_text().replace("max_length: 32", "max_length: 32, max_rows: {train: 200, validation: 60}")
    lab.file.write_text(text)
    assert lab.sweep().code == 0
    assert {run.data.metrics["all_params"] > 8e6 for run in lab.trials} == {True}
    for run in lab.trials:
        check_in_peft(lab, run, rows=60)
