"""Tiny base models of many architectures with data, made in memory, and how a trial fares on them: by the plain loop
and on the bench."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from workbench.adapters import PeftConfig
from workbench.adapters.registry import METHODS
from workbench.training.adapted import adapted
from workbench.training.base import MODEL_CLASSES, Base
from workbench.training.bench import Bench
from workbench.training.config import TrainingSection
from workbench.training.data import IGNORED, Split, TaskData
from workbench.training.loop import Result, train
from workbench.training.packed import Packed
from workbench.training.stint import Report, Stint

from .conftest import make_tokenizer

LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide enough that an untrained model tells inputs apart
    "pad_token_id": 0,
    "num_labels": 3,
}
SPECIAL = 5  # tokens of the vocabulary that no row holds
TOKENS = [7, 20, 33]  # that few rows hold


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer(eos_token="[EOS]", pad_token="[PAD]")


def make_base(kind: str, task: str, **config: Any) -> Base:
    """A frozen model of an architecture (`model_type`) with random weights."""
    sizes = SIZES if kind != "t5" else {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    made = AutoConfig.for_model(kind, **{**sizes, "vocab_size": len(tokenizer()), **config})
    if kind == "t5":
        made.decoder_start_token_id = 0
    if task == "SEQ_CLS":
        made.problem_type = "single_label_classification"
    torch.manual_seed(1)
    model = MODEL_CLASSES[task].from_config(made)  # type: ignore[index]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer(), task, torch.device("cpu"), kind, f"{kind}-{task}", (), "cpu")  # type: ignore[arg-type]


def make_data(task: str, target: bool = False, pairs: bool = False, shortest: int = 2, longest: int = 14) -> TaskData:
    """Random rows of many lengths. What is to be learnt follows from the tokens."""
    draw = torch.Generator().manual_seed(2)

    def split(rows: int) -> Split:
        lengths = torch.randint(shortest, longest + 1, (rows,), generator=draw).tolist()
        lengths[:2] = shortest, longest
        ids = [torch.randint(SPECIAL, len(tokenizer()), (n,), generator=draw).tolist() for n in lengths]
        columns: dict[str, Any] = {"input_ids": ids}
        if pairs:
            columns["token_type_ids"] = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
        if task == "SEQ_CLS":
            columns["labels"] = [row[0] % 3 for row in ids]
        elif task == "TOKEN_CLS":
            columns["labels"] = [[i % 3 if i % 4 else IGNORED for i in row[:-1]] + [row[-1] % 3] for row in ids]
        elif task == "CAUSAL_LM":
            half = [n // 2 if target else 0 for n in lengths]
            columns["labels"] = [[IGNORED] * n + row[n:] for n, row in zip(half, ids, strict=True)]
        else:
            columns["labels"] = [row[: 1 + n // 3] for n, row in zip(lengths, ids, strict=True)]
        if target:
            columns["target"] = [tokenizer().decode([i for i in row if i >= 0]) for row in columns["labels"]]
        return Split(Dataset.from_dict(columns), task, 0)  # type: ignore[arg-type]

    return TaskData(split(24), split(9), [], [], f"{task}-{target}-{pairs}-{shortest}-{longest}")


def made_settings(**changes: Any) -> TrainingSection:
    """50 steps of small, uneven batches."""
    return TrainingSection(**{"steps": 50, "batch_size": 5, "eval_batch_size": 4, "learning_rate": 5e-3, **changes})


@dataclass
class Trained:
    """What came of a trial: what it trained by name, and its validation loss."""

    weights: dict[str, Tensor]
    metrics: dict[str, float]

    def differs(self, other: Trained) -> float:
        """The largest relative difference of a tensor."""
        assert self.weights.keys() == other.weights.keys()
        pairs = [(self.weights[name], other.weights[name]) for name in self.weights]
        return max(float((a - b).norm() / a.norm().clamp_min(1e-6)) for a, b in pairs)


@dataclass
class Place:
    """A base with data, and a bench on both."""

    base: Base
    data: TaskData
    folder: Path
    cache_gib: float = 1.0
    count: int = 0
    bench: Bench = field(init=False)

    def __post_init__(self) -> None:
        self.bench = self.another_bench()

    def another_bench(self, **changes: Any) -> Bench:
        return Bench(self.base, self.data, **{"cache": self.folder, "cache_gib": self.cache_gib, **changes})

    def plainly(self, config: PeftConfig, settings: TrainingSection, seed: int = 0, order_seed: int = 0) -> Trained:
        """Train by the plain loop."""
        with adapted(self.base, config, seed) as model:
            whole = settings.model_copy(update={"eval_every": settings.steps})
            result: Result = train(
                model, self.base, self.data, whole, seed=seed, order_seed=order_seed, on_eval=lambda *_: None
            )
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return Trained(weights, result.metrics)

    def stint(
        self, config: PeftConfig, settings: TrainingSection, seed: int = 0, order_seed: int = 0, **changes: Any
    ) -> Stint:
        """A new trial's stint to its end."""
        self.count += 1
        file = self.folder / f"trial-{self.count}.safetensors"
        return replace(Stint(self.count, config, settings, seed, order_seed, file, settings.steps), **changes)

    def benched(self, *stints: Stint, bench: Bench | None = None) -> list[Trained]:
        """Train on the bench, in one pass."""
        return [came_of(stint, report) for stint, report in zip(stints, self.reports(stints, bench), strict=True)]

    def reports(self, stints: Iterable[Stint], bench: Bench | None = None) -> list[Report]:
        return (bench or self.bench).train(list(stints), lambda *_: None)

    def alone(self, config: PeftConfig, settings: TrainingSection, **changes: Any) -> Trained:
        """Train on the bench, in a pass of its own."""
        (trained,) = self.benched(self.stint(config, settings, **changes))
        return trained


def came_of(stint: Stint, report: Report) -> Trained:
    """What a stint left, which must have gone well."""
    assert report.error is None, report.trace or report.error
    assert report.step == stint.until
    return Trained(weights_in(stint.checkpoint), report.metrics)


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """What a trial trains, from its checkpoint."""
    start = "parameter."
    return {n.removeprefix(start): tensor for n, tensor in load_file(checkpoint).items() if n.startswith(start)}


def same(actual: Trained, expected: Trained, weights: float, loss: float = 1e-5) -> None:
    """Assert that a trial came to the same."""
    assert expected.differs(actual) <= weights
    assert abs(actual.metrics["loss"] - expected.metrics["loss"]) <= loss * max(1.0, expected.metrics["loss"])
    assert actual.metrics.keys() == expected.metrics.keys()


# ---------------------------------------------------------------- places

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # model, task, what is told of the model
    "classifying": ("bert", "SEQ_CLS", {}),
    "tagging": ("bert", "TOKEN_CLS", {}),
    "continuing": ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    "answering": ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    "translating": ("t5", "SEQ_2_SEQ_LM", {}),
}


def make_place(kind: str, folder: Path) -> Place:
    model, task, config = KINDS[kind]
    return Place(make_base(model, task, **config), make_data(task, kind in ("answering", "translating")), folder)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 10, "deltaT": 5, "total_step": 50},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
    "ia3": {},
    "trainable_tokens": {"token_indices": TOKENS},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3, "num_tasks": 2},
}


def config_of(method: str, base: Base, **changes: Any) -> PeftConfig:
    """The configuration of a method, by its name in the registry."""
    return METHODS[method].config(**{"task_type": base.task, **OPTIONS[method], **changes})


# ---------------------------------------------------------------- the base


@dataclass
class State:
    """All of a model that a trial could leave changed."""

    tensors: dict[str, Tensor]
    rest: list[Any]

    @classmethod
    def of(cls, model: Any) -> State:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        return cls(
            {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            [
                [(name, type(m), m.training, "forward" in vars(m), hooks(m)) for name, m in model.named_modules()],
                [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
                [(c._attn_implementation, getattr(c, "use_cache", None)) for c in configs],
            ],
        )

    def check(self, model: Any) -> None:
        """Assert that the model is in this state, to the bit."""
        now = State.of(model)
        assert now.rest == self.rest
        assert list(now.tensors) == list(self.tensors)
        assert [name for name in self.tensors if not torch.equal(now.tensors[name], self.tensors[name])] == []


def hooks(module: Any) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for kind in kinds]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers for which activations are computed from now on."""
    layers: list[int] = []
    activations = Packed.activations

    def spy(self: Packed, group: Any, layer: int, *rest: Any) -> Tensor:
        layers.append(layer)
        return activations(self, group, layer, *rest)

    monkeypatch.setattr(Packed, "activations", spy)
    return layers
