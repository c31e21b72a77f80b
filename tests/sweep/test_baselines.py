"""Full fine-tuning, the head alone and zero-shot as methods of a study: each is what its name says, to the last digits,
and leaves files that peft loads."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import peft
import pytest
import torch
from command import workbench
from conftest import ASSETS
from torch import nn
from training.places import Place as Bench
from training.places import State, config_of, made_settings, make_base, make_data
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, get_scheduler

from workbench import adapters
from workbench.adapters import PeftConfig
from workbench.adapters.matching import sites
from workbench.errors import ConfigError, StudyError
from workbench.sweep.baselines import BASELINES, names
from workbench.sweep.configure import peft_config
from workbench.sweep.schema import json_schema
from workbench.sweep.source import read
from workbench.sweep.spec import load_study
from workbench.training import bench as bench_file
from workbench.training.adapted import adapted, save_adapter
from workbench.training.base import Base
from workbench.training.config import TrainingSection
from workbench.training.data import TaskData, batches, collate
from workbench.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore")

LM = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier": ("bert", "SEQ_CLS", {}),
    "head of several layers": ("roberta", "SEQ_CLS", {"hidden_dropout_prob": 0.0}),
    "tagger": ("bert", "TOKEN_CLS", {}),
    "tied": ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    "untied": ("llama", "CAUSAL_LM", {"tie_word_embeddings": False}),
    "tied four times": ("t5", "SEQ_2_SEQ_LM", {}),
    "parameters beside modules": ("mamba", "CAUSAL_LM", LM),
    "names within names": ("modernbert", "SEQ_CLS", {"cls_token_id": 1, "sep_token_id": 1, **LM}),
}
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving memory back takes longer than to train a model of this size."""
    monkeypatch.setattr(bench_file, "release", lambda device: None)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Bench]:
    """Makes a model with data and a bench."""

    def make(model: str) -> Bench:
        kind, task, config = MODELS[model]
        return Bench(make_base(kind, task, **config), make_data(task, target=kind == "t5"), tmp_path)

    return make


def config(method: str, base: Base) -> PeftConfig:
    return peft_config(method, base.task, {}, 10, base.model)


def benched(place: Bench, method: str, settings: TrainingSection) -> tuple[list[float], dict[str, float]]:
    """The loss of each step on the bench, and the metrics."""
    losses: list[float] = []
    stint = place.stint(config(method, place.base), settings)
    (report,) = place.bench.train([stint], lambda trial, step, loss: losses.append(loss))
    assert report.error is None, report.trace or report.error
    return losses, report.metrics


def solo(place: Bench, method: str, settings: TrainingSection) -> tuple[list[float], dict[str, float]]:
    """The same of the plain loop."""
    with adapted(place.base, config(method, place.base), seed=0) as model:
        result = train(model, place.base, place.data, settings, seed=0, order_seed=0, on_eval=lambda *_: None)
    return result.losses, result.metrics


def by_hand(model: nn.Module, trained: nn.Module, data: TaskData, settings: TrainingSection) -> list[float]:
    """The loss of each step where a part of a model trains, with PyTorch and transformers alone."""
    model.requires_grad_(False)
    trained.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler("linear", optimizer, round(settings.warmup * settings.steps), settings.steps)
    losses = []
    order = batches(len(data.train), settings.batch_size, settings.steps, seed=0)
    for rows in itertools.islice(order, settings.steps):
        loss = model(**collate(data.train, rows)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


SETTINGS = made_settings(steps=12, learning_rate=2e-3, weight_decay=0.1, max_grad_norm=0.5)


# ---------------------------------------------------------------- each is what its name says


@pytest.mark.parametrize("how", [benched, solo])
@every_model
def test_full_is_full_fine_tuning(model: str, how: Any, made: Callable[[str], Bench]) -> None:
    place = made(model)
    before = State.of(place.base.model)
    losses, _ = how(place, "full", SETTINGS)
    before.check(place.base.model)
    plain = copy.deepcopy(place.base.model)
    assert losses == pytest.approx(by_hand(plain, plain, place.data, SETTINGS), abs=1e-5)
    assert sum(p.requires_grad for p in plain.parameters()) == len(list(plain.parameters()))


@pytest.mark.parametrize("how", [benched, solo])
@every_model
def test_head_leaves_all_below_it_as_it_is(model: str, how: Any, made: Callable[[str], Bench]) -> None:
    place = made(model)
    before = State.of(place.base.model)
    losses, _ = how(place, "head", SETTINGS)
    before.check(place.base.model)
    plain: Any = copy.deepcopy(place.base.model)
    if place.base.task in ("SEQ_CLS", "TOKEN_CLS"):
        head = plain.classifier
    else:
        head = plain.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone())  # apart from an embedding that shares it
    assert losses == pytest.approx(by_hand(plain, head, place.data, SETTINGS), abs=1e-5)


@pytest.mark.parametrize("how", [benched, solo])
@every_model
def test_zero_shot_is_the_base(model: str, how: Any, made: Callable[[str], Bench]) -> None:
    place = made(model)
    before = State.of(place.base.model)
    losses, metrics = how(place, "zero_shot", SETTINGS)
    before.check(place.base.model)
    assert losses == []
    split, plain = place.data.validation, place.base.model
    with torch.no_grad():
        each = [collate(split, [row]) for row in range(len(split))]
        found = [(float(plain(**batch).loss), batch["labels"]) for batch in each]
    shifted = place.base.task == "CAUSAL_LM"
    counts = [int((labels[:, 1:] if shifted else labels).ge(0).sum()) for _, labels in found]
    mean = sum(loss * count for (loss, _), count in zip(found, counts, strict=True)) / sum(counts)
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)


@every_model
def test_how_many_numbers_train(model: str, made: Callable[[str], Bench]) -> None:
    place = made(model)
    stints = {method: place.stint(config(method, place.base), made_settings(steps=1)) for method in BASELINES}
    found = {method: place.reports([stint])[0] for method, stint in stints.items()}
    plain: Any = place.base.model
    head = plain.classifier if hasattr(plain, "classifier") else plain.lm_head
    everything, alone = plain.num_parameters(), sum(p.numel() for p in head.parameters())
    assert {method: report.trainable for method, report in found.items()} == {
        "full": everything,
        "head": alone,
        "zero_shot": 0,
    }
    shared = hasattr(plain, "lm_head") and plain.lm_head.weight is plain.get_input_embeddings().weight
    assert {method: report.total for method, report in found.items()} == {
        "full": everything,
        "head": everything + shared * alone,  # the embedding stays beside it
        "zero_shot": everything,
    }
    assert (found["zero_shot"].step, found["zero_shot"].made) == (1, 0)


# ---------------------------------------------------------------- on the bench


@pytest.mark.parametrize("model", ["classifier", "tagger", "tied"])
def test_in_one_pass_with_adapters(model: str, made: Callable[[str], Bench]) -> None:
    place = made(model)
    configs = [*(config(method, place.base) for method in ("full", "head", "zero_shot", "full"))]
    configs.insert(1, config_of("lora", place.base))
    together = place.benched(*(place.stint(own, SETTINGS) for own in configs))
    for own, trained in zip(configs, together, strict=True):
        alone = place.alone(own, SETTINGS)
        assert trained.weights.keys() == alone.weights.keys()
        telling = [name for name in alone.weights if "key" not in name]  # their biases do nothing, nor are they taught
        assert all(torch.allclose(trained.weights[name], alone.weights[name], atol=1e-4) for name in telling)
        assert trained.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-4)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("model", ["classifier", "tied", "tied four times"])
def test_stretch_by_stretch(model: str, method: str, made: Callable[[str], Bench]) -> None:
    place = made(model)
    whole = place.alone(config(method, place.base), SETTINGS)
    first = place.stint(config(method, place.base), SETTINGS, until=5)
    place.benched(first)
    (halved,) = place.benched(replace(first, until=SETTINGS.steps), bench=place.another_bench())
    assert halved.metrics == pytest.approx(whole.metrics, abs=1e-5)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("library", [peft, adapters])
@pytest.mark.parametrize("method", BASELINES)
@every_model
def test_the_file_holds_the_model_that_was_measured(
    model: str, method: str, library: Any, made: Callable[[str], Bench], tmp_path: Path
) -> None:
    """On a base whose own files lack the head, where it has one, so that it is another one each time."""
    place = made(model)
    lacking = [name for name, _ in place.base.model.named_parameters() if name.startswith("classifier")]
    base = replace(place.base, fresh=tuple(lacking))
    other = copy.deepcopy(base.model)
    with torch.no_grad():
        for name in lacking:
            other.get_parameter(name).normal_()
    batch = collate(place.data.validation, [0, 1, 2])
    with adapted(base, config(method, base), seed=0) as trained:
        train(trained, base, place.data, SETTINGS, seed=0, order_seed=0, on_eval=lambda *_: None)
        trained.eval()
        with torch.no_grad():
            expected = trained(**batch).logits
        save_adapter(trained, base, tmp_path / "file")
    loaded = library.PeftModel.from_pretrained(other, tmp_path / "file").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, expected, atol=1e-5)


# ---------------------------------------------------------------- what cannot be


def test_what_cannot_train_as_it_should_is_refused() -> None:
    for method, (kind, task, options), message in [
        ("full", ("bert", "CAUSAL_LM", {"is_decoder": True}), "cls.predictions shares weights with other modules"),
        ("head", ("bart", "SEQ_CLS", {"d_model": 16}), "has no head .* nothing in it is called classifier or score"),
        ("full", ("llama", "SEQ_CLS", {"dtype": "bfloat16"}), "would train .* in torch.bfloat16, which loses small"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(method, make_base(kind, task, **options))


class Rootless(nn.Module):
    """A model of which one parameter lies in no module, or whose modules have names that go on from one another."""

    def __init__(self, loose: bool):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.prefc = nn.Identity()
        if loose:
            self.scale = nn.Parameter(torch.ones(1))


def test_modules_that_cannot_be_named_apart() -> None:
    with pytest.raises(ConfigError, match="scale lies in no module of Rootless"):
        BASELINES["full"].configure(None, Rootless(loose=True))
    with pytest.raises(ConfigError, match="No name means fc and not another module"):
        BASELINES["full"].configure(None, Rootless(loose=False))


def test_names_mean_what_they_should(made: Callable[[str], Bench]) -> None:
    for model in MODELS:
        base = made(model).base
        everything = list(sites(base.model))
        chosen = BASELINES["full"].modules(base.model, base.task)
        found = names(chosen, base.model)
        assert {s.path for s in everything if s.path.endswith(tuple(found))} == {site.path for site in chosen}
        assert len(found) < len(chosen)


# ---------------------------------------------------------------- the study file

METHODS = """
full: {learning_rate: {min: 1e-4, max: 1e-3, distribution: log_uniform_values}, weight_decay: 0.01}
head: {learning_rate: 1e-2}
zero_shot: {}
slowly: {method: full, learning_rate: 1e-5}
"""


def test_in_a_study_file(lab: Any) -> None:
    study = load_study(lab.write(METHODS).file)
    assert [spec.method for spec in study.methods.values()] == ["full", "head", "zero_shot", "full"]
    assert {label: spec.size for label, spec in study.methods.items()} == {
        "full": None,
        "head": 1,
        "zero_shot": 1,
        "slowly": 1,
    }
    jsonschema.validate(read(lab.file).data, json_schema())
    assert load_study(lab.write("zero_shot:").file).methods["zero_shot"].domains == {}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("full: {§r: 4}", "unknown key 'r'"),
        ("full: {learning_rate: §-1}", "learning_rate should be greater than 0"),
        ("head: {§target_modules: all-linear}", "unknown key 'target_modules'"),
        ("zero_shot: {§learning_rate: 1e-3}", "unknown key 'learning_rate'"),
        ("§zeroshot: {}", r"there is no method 'zeroshot' \(did you mean zero_shot\?"),
    ],
)
def test_wrong_fields_are_refused_at_their_place(methods: str, message: str, lab: Any) -> None:
    marked = lab.write(methods).file.read_text()
    (line,) = [number for number, text in enumerate(marked.splitlines(), 1) if "§" in text]
    column = marked.splitlines()[line - 1].index("§") + 1
    lab.file.write_text(marked.replace("§", ""))
    with pytest.raises(StudyError, match=message) as error:
        load_study(lab.file)
    assert [(problem.line, problem.column) for problem in error.value.problems] == [(line, column)]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(lab.file).data, json_schema())


def test_what_the_base_cannot_do_is_refused_before_anything_trains(lab: Any) -> None:
    lab.write("lora: {target_modules: [query]}\nfull: {}", training="precision: bf16")
    done = lab.sweep()
    assert done.code == 2
    line = 1 + [text.strip() for text in lab.file.read_text().splitlines()].index("full: {}")
    assert re.search(rf"study.yaml:{line}:\d+: full would train .* in torch.bfloat16", done.err)


def test_the_command_lists_them() -> None:
    done = workbench("methods")
    rows = [line.split("│") for line in done.out.splitlines() if "│" in line]
    assert {"full", "head", "zero_shot"} <= {cells[1].strip() for cells in rows}
    assert "weight_decay" in workbench("methods", "full").out
    assert "learning_rate" not in workbench("methods", "zero_shot").out


# ---------------------------------------------------------------- sweeps

ALL = """
full: {learning_rate: 1e-3}
head: {learning_rate: 1e-1}
zero_shot: {}
lora: {r: 2, target_modules: [%s], learning_rate: 1e-2}
"""
GRID = "search: {sampler: grid, pruner: none}\n"
LLAMA = f"model: {{path: {ASSETS / 'tiny-llama'}, task: CAUSAL_LM}}\n"


def by_label(lab: Any) -> dict[str, Any]:
    return {run.data.tags["workbench.label"]: run for run in lab.trials}


@pytest.mark.parametrize("how", [["--workers", "1"], ["--solo"]], ids=["bench", "solo"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_sweep(task: str, how: list[str], lab: Any) -> None:
    model = LLAMA if task == "CAUSAL_LM" else ""
    lab.write(ALL % ("q_proj" if model else "query"), "{trials: 9}", "track_memory: true", GRID + model)
    done = lab.sweep(*how)
    assert (done.code, done.err) == (0, "")
    runs = by_label(lab)
    assert {label: run.data.tags["workbench.outcome"] for label, run in runs.items()} == dict.fromkeys(
        ("full", "head", "zero_shot", "lora"), "complete"
    )
    metrics = {label: run.data.metrics for label, run in runs.items()}
    assert metrics["full"]["trainable_percent"] == 100.0
    assert metrics["zero_shot"]["trainable_params"] == 0.0 == metrics["zero_shot"]["tokens_seen"]
    assert 0 < metrics["head"]["trainable_params"] < metrics["full"]["trainable_params"]
    assert metrics["full"]["validation.loss"] < metrics["zero_shot"]["validation.loss"]
    assert list(lab.curve(runs["zero_shot"], "validation.loss")) == [10]
    assert "train.loss" not in metrics["zero_shot"]
    if how != ["--solo"]:  # the plain loop is not what is rehearsed
        errors = [metrics[label][f"prediction_error_percent/{p}"] for label in BASELINES for p in ("train", "eval")]
        assert -1 < min(errors) <= max(errors) < 10  # of those that share a pass the sum is predicted
    cls = AutoModelForCausalLM if model else AutoModelForSequenceClassification
    for label in BASELINES:
        base = cls.from_pretrained(ASSETS / "tiny-llama" if model else lab.model)
        peft.PeftModel.from_pretrained(base, lab.adapter(runs[label]))


def test_a_plan_is_what_comes(lab: Any) -> None:
    lab.write(ALL % "query", "{trials: 9}", more=GRID)
    done = workbench("plan", lab.file, "--home", lab.home)
    assert done.code == 0
    assert "4 of 4 configurations can run" in done.out
    assert lab.sweep("--workers", "1").code == 0
    tables = dict(zip(("full", "head", "zero_shot", "lora"), re.findall(r"│ as it stands.*", done.out), strict=True))
    for label, run in by_label(lab).items():
        assert f" {int(run.data.metrics['trainable_params']):,} " in tables[label]


def test_what_does_not_fit_is_not_trained(lab: Any) -> None:
    """Of three thousandths of a GiB full fine-tuning needs more, the head does not."""
    lab.write("full: {}\nhead: {}", "{trials: 9}", more=GRID + "constraints: {vram_gib: 0.003}\n")
    assert lab.sweep("--workers", "1").code == 0
    outcomes = {label: run.data.tags["workbench.outcome"] for label, run in by_label(lab).items()}
    assert outcomes == {"full": "infeasible", "head": "complete"}


def test_zero_shot_is_tried_once(lab: Any) -> None:
    """However many trials each method may have."""
    methods = "zero_shot: {}\nhead: {learning_rate: {min: 1e-3, max: 1e-1}}"
    assert lab.write(methods, "{per_method: {trials: 3}}").sweep("--workers", "1").code == 0
    labels = [run.data.tags["workbench.label"] for run in lab.trials]
    assert (labels.count("zero_shot"), labels.count("head")) == (1, 3)


def test_a_sweep_that_goes_on(lab: Any) -> None:
    lab.write(ALL % "query", "{trials: 2}", more=GRID)
    assert lab.sweep().code == 0
    lab.write(ALL % "query", "{trials: 9}", more=GRID)
    assert lab.sweep().code == 0
    assert sorted(run.data.tags["workbench.label"] for run in lab.trials) == ["full", "head", "lora", "zero_shot"]
    assert {run.data.tags["workbench.outcome"] for run in lab.trials} == {"complete"}
