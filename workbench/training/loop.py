"""The training loop: one adapter on the frozen base, and its evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, get_scheduler

from workbench.adapters import PeftModel
from workbench.errors import Diverged

from .base import Base
from .config import Task, TrainingSection
from .data import IGNORED, Split, TaskData, batches, collate, pad
from .memory import Meter, out_of_memory, release, says_no_memory
from .metrics import METRICS, score_classes, score_tags, score_texts
from .recompute import recomputed

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # names in transformers

P = ParamSpec("P")


@dataclass
class Result:
    """What a trial came to.

    Attributes:
        meter: time and memory of the phases train and eval.
        metrics: of the last evaluation.
        best: each metric's best value over all evaluations.
        losses: the training loss of every step.
        tokens: tokens of the training batches, padding not counted.
        measured: the last evaluation, example by example.
    """

    meter: Meter
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    measured: Measured | None = None


# ---------------------------------------------------------------- training


def releasing_memory(
    function: Callable[Concatenate[PeftModel, Base, P], Result],
) -> Callable[Concatenate[PeftModel, Base, P], Result]:
    """Turn running out of memory into `OutOfMemory`, raised when the function's tensors are gone."""

    @functools.wraps(function)
    def run(model: PeftModel, base: Base, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return function(model, base, *args, **kwargs)
        except Exception as error:
            if not says_no_memory(error):
                raise
            failure = out_of_memory(error)
        # out of the except block the error is gone, and with it the frames that hold activations and optimiser state
        release(base.device)
        raise failure

    return run


@releasing_memory
def train(
    model: PeftModel,
    base: Base,
    data: TaskData,
    settings: TrainingSection,
    *,
    seed: int,
    order_seed: int,
    on_eval: Callable[[int, dict[str, float]], None],
    on_step: Callable[[int, float], None] | None = None,
    meter: Meter | None = None,
) -> Result:
    """Train the active adapter and measure it on the validation split at `settings.eval_steps`.

    On one and the same CPU, the same arguments give the same losses to the bit.

    Args:
        model: an adapter on `base.model`; whatever requires a gradient is trained.
        seed: of dropout.
        order_seed: of the order of the data.
        on_eval: called with the step (from 1) and the metrics. What it raises passes through, so it can prune.
        on_step: called with the step and its loss.
        meter: goes on with measurements already begun.

    Raises:
        Diverged: a loss or gradient is not a finite number.
        OutOfMemory: the trial did not fit; what it held has been released.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": parameters}], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    rising = round(settings.warmup * settings.steps)
    schedule = get_scheduler(SCHEDULES[settings.schedule], optimizer, rising, settings.steps)
    order = batches(len(data.train), settings.batch_size, settings.steps, order_seed)
    result = Result(meter or Meter(base.device))
    if settings.track_memory:
        result.meter.held = lambda: [*model.parameters(), *model.buffers(), *state_of(optimizer, parameters)]
    step = 0
    with seeded(seed, base.device), gradients_cleared(model):
        for stop in settings.eval_steps if parameters else [settings.steps]:
            with result.meter.phase("train"):
                training_mode(model, settings.base_dropout)
                step = step if parameters else stop  # no step would change anything
                while step < stop:
                    step += 1
                    indices = next(order)
                    at_once = settings.micro_batch_size or len(indices)
                    parts = [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
                    loss, tokens = backward(model, base, data.train, parts, settings.gradient_checkpointing)
                    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                    check_finite(step, settings, {"loss": loss, "gradient": norm.item()})
                    optimizer.step()
                    model.base_model.after_step(step)
                    schedule.step()
                    optimizer.zero_grad()
                    result.losses.append(loss)
                    result.tokens += tokens
                    if on_step:
                        on_step(step, result.losses[-1])
            with result.meter.phase("eval"):
                result.measured = evaluate(model, base, data.validation, settings)
                result.metrics = result.measured.metrics
            check_finite(step, settings, {"validation loss": result.metrics["loss"]})
            result.best = better(base, result.best, result.metrics)
            on_eval(step, result.metrics)
    return result


def state_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """What an optimiser keeps of its parameters, and their gradients."""
    for parameter in parameters:
        yield from (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
        if parameter.grad is not None:
            yield parameter.grad


def backward(
    model: PeftModel, base: Base, split: Split, parts: Sequence[Sequence[int]], checkpointing: bool
) -> tuple[float, int]:
    """Gradients of a batch's mean loss, whose rows go through the model part by part.

    Returns:
        the loss, and the number of tokens without padding.
    """
    batches = [collate(split, part) for part in parts]
    counts = [scored(model, batch["labels"], base.task) for batch in batches]
    total, tokens = 0.0, 0
    for batch, count in zip(batches, counts, strict=True):
        with recomputed(base.model, checkpointing):
            loss = model(**to_device(batch, base.device)).loss * (count / sum(counts))
            if not tokens:
                loss = loss + model.base_model.regularisation()
            loss.backward()
        total += float(loss.detach())
        tokens += int(batch["attention_mask"].sum())
    return total, tokens


def scored(model: PeftModel, labels: Tensor, task: Task) -> int:
    """How many of a batch's labels its mean loss is over."""
    if task == "CAUSAL_LM" and not stands_before(model):
        labels = labels[:, 1:]  # nothing comes before the first token that could predict it
    return int((labels != IGNORED).sum())


def stands_before(model: PeftModel) -> bool:
    """Whether virtual tokens stand before the first token."""
    encoders = getattr(model.base_model, "prompt_encoder", {})
    return any(not encoder.in_cache for encoder in encoders.values())


def training_mode(model: PeftModel, base_dropout: bool) -> None:
    """Adapters train, with their own dropout; the frozen base drops nothing out unless asked to."""
    model.train(base_dropout)
    for name in model.peft_config:
        for _, part in model.base_model.parts(name):
            part.train()


def check_finite(step: int, settings: TrainingSection, values: dict[str, float]) -> None:
    """Stop a trial whose numbers have run away."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(
                f"The {name} became {value} at step {step} of {settings.steps} with learning rate "
                f"{settings.learning_rate:g}; try a lower learning_rate."
            )


def better(base: Base, best: dict[str, float], metrics: dict[str, float]) -> dict[str, float]:
    """Each metric's better value of the two."""
    choose = {"maximize": max, "minimize": min}
    return {name: choose[METRICS[base.task][name]](value, best.get(name, value)) for name, value in metrics.items()}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed; afterwards the process's generators are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def gradients_cleared(model: PeftModel) -> Iterator[None]:
    """Leave no gradients behind, however the block ends."""
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---------------------------------------------------------------- evaluation


@dataclass
class Row:
    """The scored positions of one row (one position for SEQ_CLS): loss in nats, likeliest id, right id."""

    losses: list[float]
    guesses: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Measured:
    """What a model did on a split.

    Attributes:
        metrics: see `METRICS`. `loss` is the mean over rows (SEQ_CLS) or over all scored tokens (the other tasks), in
            nats.
        rows: their scored positions.
        predicted: for each row the class, the tags of the scored words, the text produced, or, where the task is plain
            text, the row's mean loss.
    """

    metrics: dict[str, float]
    rows: list[Row]
    predicted: list[Any]


@torch.no_grad()
def evaluate(model: PeftModel, base: Base, split: Split, settings: TrainingSection) -> Measured:
    """Measure a model on a split."""
    model.eval()
    order = by_length(split, settings.eval_batch_size)
    rows = in_order(order, [row for indices in order for row in score_rows(model, base, split, indices)])
    return measure(model, base, split, rows, settings.eval_batch_size)


def measure(model: PeftModel, base: Base, split: Split, rows: list[Row], batch_size: int) -> Measured:
    """The metrics of a split whose rows were scored, and what was predicted; texts are produced here."""
    losses = [loss for row in rows for loss in row.losses]
    metrics = {"loss": math.fsum(losses) / len(losses)}
    predicted: list[Any]
    if base.task == "SEQ_CLS":
        predicted = [base.labels[row.guesses[0]] for row in rows]
        metrics |= score_classes(predicted, [base.labels[row.labels[0]] for row in rows])
    elif base.task == "TOKEN_CLS":
        predicted = [[base.labels[i] for i in row.guesses] for row in rows]
        metrics |= score_tags(predicted, [[base.labels[i] for i in row.labels] for row in rows])
    else:
        predicted = [math.fsum(row.losses) / len(row.losses) for row in rows]
    if base.task == "CAUSAL_LM":
        right = [guess == label for row in rows for guess, label in zip(row.guesses, row.labels, strict=True)]
        metrics["perplexity"] = math.exp(metrics["loss"]) if metrics["loss"] < 700 else math.inf
        metrics["accuracy"] = sum(right) / len(right)
    if "target" in split.features.column_names:
        order = by_length(split, batch_size)
        longest = max(len(row.labels) for row in rows)
        texts = [text for indices in order for text in produce(model, base, split, indices, longest)]
        predicted = in_order(order, texts)
        metrics |= score_texts(predicted, split.features["target"][:])
    return Measured(metrics, rows, predicted)


def by_length(split: Split, batch_size: int) -> list[list[int]]:
    """All row numbers in batches of rows of about the same length, to save padding."""
    lengths = [len(row) for row in split.features["input_ids"]]
    order = sorted(range(len(split)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def in_order(order: list[list[int]], values: list[Any]) -> list[Any]:
    """What was computed batch by batch, in the order of the split."""
    placed = dict(zip((i for indices in order for i in indices), values, strict=True))
    return [placed[i] for i in range(len(placed))]


def score_rows(model: PeftModel, base: Base, split: Split, indices: list[int]) -> list[Row]:
    """Run a batch and take the scored positions apart row by row."""
    batch = to_device(collate(split, indices), base.device)
    labels = batch["labels"]
    logits = model(**batch).logits
    if base.task == "SEQ_CLS":
        logits, labels = logits[:, None], labels[:, None]
    logits = logits[:, -labels.shape[1] :]  # virtual tokens stand before the others
    if base.task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]  # each position predicts the next token
    scored = labels != IGNORED
    return taken_apart([scores(logits[scored], labels[scored])], scored.sum(1).tolist())


Scores = tuple[Tensor, Tensor, Tensor]  # of scored positions: loss in nats, likeliest id, right id, each `(n,)`


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """What is kept of the logits `(n, classes)` of scored positions."""
    logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1), labels


def taken_apart(found: list[Scores], counts: list[int]) -> list[Row]:
    """Scored positions row by row, `counts[i]` of them in row `i`."""
    columns = (torch.cat(column).cpu().split(counts) for column in zip(*found, strict=True))
    return [Row(*(part.tolist() for part in row)) for row in zip(*columns, strict=True)]


def produce(model: PeftModel, base: Base, split: Split, indices: list[int], longest: int) -> list[str]:
    """Texts written greedily, of at most `longest` tokens."""
    columns = split.features[indices]
    prompts = columns["input_ids"]
    if base.task == "CAUSAL_LM":
        prompts = [ids[: labels.count(IGNORED)] for ids, labels in zip(prompts, columns["labels"], strict=True)]
    side = "left" if base.task == "CAUSAL_LM" else "right"  # a decoder goes on where the row ends
    inputs = {
        "input_ids": pad(prompts, split.pad_token_id, side),
        "attention_mask": pad([[1] * len(ids) for ids in prompts], 0, side),
    }
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=longest,
        pad_token_id=split.pad_token_id,
        eos_token_id=base.tokenizer.eos_token_id,
        decoder_start_token_id=getattr(base.model.config, "decoder_start_token_id", None),
    )
    prompt: dict[str, Any] = to_device(inputs, base.device)
    written = model.generate(generation_config=greedy, **prompt)
    if base.task == "CAUSAL_LM":
        written = written[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in base.tokenizer.batch_decode(written, skip_special_tokens=True)]
