"""The sections that take single training steps in one process, ours and peft's in turn: step, tokens."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from workbench import adapters
from workbench.training.base import load_tokenizer
from workbench.training.config import DataSection, ModelSection
from workbench.training.data import read_data

from .report import Report, Row, times
from .work import DATA

LIBRARIES = {"ours": adapters, "peer": peft}
MIB = 2**20
VOCABULARY, WIDTH, TOKENS = 256_000, 2_304, 64

Step = Callable[[], None]


def step(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """One training step of the adapter core against peft's, on the same model and batch."""
    batch, rounds = sentences(model, 32), 5 if quick else 40
    everywhere = ["query", "key", "value", "dense"]
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "LoRA, query and value": ("LoraConfig", {"r": 8, "target_modules": ["query", "value"]}),
        "LoRA, every linear layer": ("LoraConfig", {"r": 8, "target_modules": everywhere}),
        "(IA)³": (
            "IA3Config",
            {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
        ),
    }
    rows, figures = [], {}
    for name, (config, fields) in configs.items():
        steps = {}
        for side, library in LIBRARIES.items():
            base = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=2)
            adapted = library.get_peft_model(base, getattr(library, config)(task_type="SEQ_CLS", **fields))
            steps[side] = training_step(adapted.eval(), batch)  # adapters have no dropout, the base needs none
        ratios, memory = race(steps, rounds), {side: peak(take) / MIB for side, take in steps.items()}
        sooner = times(f"one step, {name}", ratios, 1)
        # 1 % is what a median of such ratios is off when both sides are the same
        rows.append(Row(sooner.what, "never slower", sooner.measured, statistics.median(ratios) >= 0.99))
        measured = f"{memory['ours']:.1f} of {memory['peer']:.1f} MiB"
        rows.append(Row("its memory", "≤ peft's", measured, memory["ours"] <= memory["peer"]))
        figures[name] = {"ratios": ratios, "mib": memory}
    shape = " x ".join(map(str, batch["input_ids"].shape))
    how = (
        f"Forward, backward and AdamW on a padded batch of {shape} tokens, {rounds} rounds, both sides in turn. Memory "
        "is the highest sum of the bytes that tensors take during a step, beyond those that exist before it."
    )
    return Report(rows, how, figures)


def tokens(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """Trainable tokens in a large vocabulary."""
    shape = (32_000, 512) if quick else (VOCABULARY, WIDTH)
    cases = {"tied": (LlamaForCausalLM, True, 3.0), "untied": (LlamaForSequenceClassification, False, 50.0)}
    rows, figures = [], {}
    for name, (cls, tied, bar) in cases.items():
        base = large_vocabulary(cls, shape, tied)
        ids = torch.randint(1, shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids if tied else torch.zeros(1, dtype=torch.long)}
        # one copy of the weights serves both sides, one after the other
        chosen = sorted(set(ids[0, ::2].tolist()))
        found: dict[str, list[float]] = {side: [] for side in LIBRARIES}
        memory = {"plain": peak(plain_step(base, batch)) / MIB}
        for _ in range(1 if quick else 3):
            for side, library in LIBRARIES.items():
                task = "CAUSAL_LM" if tied else "SEQ_CLS"
                config = library.TrainableTokensConfig(task_type=task, token_indices=chosen)
                adapted = library.get_peft_model(base, config)
                take = training_step(adapted, batch)
                # the first steps still find the allocator and the caches as the other side left them
                found[side].append(statistics.median([seconds(take) for _ in range(8)][3:]))
                if side not in memory:
                    memory[side] = peak(take) / MIB
                base = adapted.unload()
        ratios = [theirs / ours for ours, theirs in zip(found["ours"], found["peer"], strict=True)]
        rows.append(times(f"trainable tokens, {shape[0]:,} x {shape[1]:,}, {name}", ratios, bar))
        extra = {side: memory[side] - memory["plain"] for side in LIBRARIES}
        measured = f"{extra['ours']:.1f} of {extra['peer']:.0f} MiB"
        rows.append(Row("its extra memory", "≤ 0.1 of peft's", measured, extra["ours"] <= 0.1 * extra["peer"]))
        figures[name] = {"seconds": found, "mib": memory}
        del base, adapted
        gc.collect()
    how = (
        f"A Llama of one thin layer with random weights, {TOKENS} tokens, every second one of them trained. Tied: a "
        "language model whose output layer is the table. Untied: a classifier, so that the table is the input "
        "embedding alone. Extra memory is the peak of a step beyond that of the same frozen model without an adapter, "
        "whose gradient goes back to the embeddings: logits, activations and their gradients are in both."
    )
    return Report(rows, how, figures)


def sentences(model: str, rows: int) -> dict[str, torch.Tensor]:
    """The first rows of the data as a padded batch."""
    split = read_data(DataSection(path=str(DATA), text="text", label="label"), "SEQ_CLS").splits["train"]
    tokenizer = load_tokenizer(ModelSection(path=model, task="SEQ_CLS"))
    batch = dict(tokenizer(split["text"][:rows], padding=True, return_tensors="pt"))
    return batch | {"labels": torch.tensor([int(label == "positive") for label in split["label"][:rows]])}


def large_vocabulary(cls: Any, shape: tuple[int, int], tied: bool) -> torch.nn.Module:
    """A frozen Llama with an embedding of this shape, random weights and one thin layer: the table is what counts."""
    vocabulary, width = shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        num_labels=2,
    )
    return cls(config).requires_grad_(False).eval()


def training_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A function that makes one optimiser step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def take() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def plain_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """Forward and backward of a frozen model down to its embeddings."""

    def take() -> None:
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()

    return take


def race(steps: dict[str, Step], rounds: int) -> list[float]:
    """How many times sooner ours is than the peer's, by round; who begins alternates."""
    for take in steps.values():
        take()
    found = []
    for number in range(rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        spent = {side: seconds(steps[side]) for side in order}
        found.append(spent["peer"] / spent["ours"])
    return found


def seconds(take: Step) -> float:
    started = time.perf_counter()
    take()
    return time.perf_counter() - started


def peak(take: Step) -> int:
    """Bytes of tensors at the height of a step, beyond those that exist before it."""
    take()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take()
    held = highest = 0
    for change in allocations(profiler):
        held += change
        highest = max(highest, held)
    return highest


def allocations(profiler: profile) -> Iterator[int]:
    """Bytes taken (positive) and given back (negative), in order of time."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
