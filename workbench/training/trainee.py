"""A trial at work on the bench: its adapter, its optimiser, and how far it came."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.adapters.bank import by_token
from workbench.adapters.checkpoint import read_whole
from workbench.adapters.dropout import seed_dropout
from workbench.adapters.methods.adalora import RANK_DIM, AdaLora
from workbench.adapters.methods.trainable_tokens import TrainableTokens
from workbench.errors import CheckpointError, ConfigError

from .adapted import count, new_adapter
from .base import Base, positions
from .data import TaskData, batches
from .layout import Group
from .loop import Measured
from .optimizer import TrialOptimizer
from .packed import Packed
from .rows import Rows
from .stint import Report, Stint

NAME = "default"  # of the adapter on its own model


class Trainee:
    """A stint while it runs. Its adapter is off the base when this has been made.

    Attributes:
        model: the base with the adapter.
        packed: the trial's passes are packed; else they go through the model as it is, padded.
        entry: for each split the layer at which each row enters, `(rows,)`: all below gives what it gave before.
        step: steps made so far.
        pending: rows of the batch at work, `(rows,)`; the same one again where memory ran out.
        measured: the last evaluation.
        work: tokens times layers that this stint went through.
        seconds: that its steps took; those that it shared count in equal parts.
        place: which group of a pass is this trial's.
        tokens_of_batch: tokens of the batch at work, virtual ones included.
        draws: steps draw from torch's own random numbers.
        rare: parameters that a batch may not meet, since rows enter above them.
    """

    def __init__(self, base: Base, data: TaskData, stint: Stint, packed: Packed | None, rows: dict[str, Rows]):
        self.base, self.stint, self.report = base, stint, Report(stint.trial)
        config = copy.deepcopy(stint.config)  # training may change it
        self.model = new_adapter(base, config, stint.seed, new_head=stint.seed != stint.settings.seed)
        try:
            self._begin(data, packed, rows)
        except BaseException:
            self.remove()
            raise
        self.model.base_model.detach()

    def _begin(self, data: TaskData, packed: Packed | None, rows: dict[str, Rows]) -> None:
        settings = self.stint.settings
        encoders: Any = getattr(self.model.base_model, "prompt_encoder", None)
        self.encoder: Any = encoders[NAME] if encoders is not None else None
        if settings.gradient_checkpointing and getattr(self.encoder, "in_cache", False):
            raise ConfigError(f"{self.stint.config.peft_type} does not work with gradient_checkpointing.")
        if self.encoder is not None and rows:
            self._check_room(max(int(split.lengths.max()) for split in rows.values()))
        for _, layer in self.model.base_model.layers_of(NAME):
            dtype = next((p.dtype for p in layer.base_layer.parameters()), None)
            if dtype == torch.float32 or settings.precision == "bf16":
                layer.adapter(NAME).compute_dtype = dtype
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.report.trainable, self.report.total = count(self.model)
        self.optimizer = TrialOptimizer(list(self.parameters.values()), settings)
        self.step = 0
        if self.stint.checkpoint.exists():
            self._load(self.stint.checkpoint)
        if not self.parameters:  # no step would change anything
            self.step = self.stint.until
        self.report.step = self.step
        order = batches(len(data.train), settings.batch_size, settings.steps, self.stint.order_seed)
        self.order: Iterator[list[int]] = itertools.islice(order, self.step, None)
        self.pending: Tensor | None = None
        self.measured: Measured | None = None
        self.work = self.seconds = 0.0
        self.place = self.tokens_of_batch = 0
        self.packed = packed is not None and not settings.base_dropout and by_token(self.model)
        self.entry: dict[str, Tensor] = {}
        self.rare: list[Tensor] = []
        if packed is not None and self.packed:
            self.depth = packed.depth
            cut, tokens = self._lowest(packed)
            self.entry = {name: entries(split, cut, tokens) for name, split in rows.items()}
            seed_dropout(self.model, lambda number: functools.partial(self._mask, packed, number))
        self.draws = not self.packed or any(part.draws for _, part in self.model.base_model.parts(NAME))

    def _check_room(self, longest: int) -> None:
        """Refuse virtual tokens for which the model has no positions."""
        count, known = self.encoder.embedding.num_embeddings, positions(self.base.model)
        if known is not None and count + longest > known:
            raise ConfigError(
                f"num_virtual_tokens: {count} virtual tokens and rows of up to {longest} tokens are more than the "
                f"{known} positions of the model; use fewer, or a data.max_length of at most {max(1, known - count)}.",
                "num_virtual_tokens",
            )

    def tensors(self) -> Iterator[Tensor]:
        """What the trial keeps between steps."""
        for _, part in self.model.base_model.parts(NAME):
            yield from part.parameters()
            yield from part.buffers()
        yield from self.model.base_model.memory_of(NAME).values()
        for flat in self.optimizer.flats:
            yield from flat.tensors

    def remove(self) -> None:
        """Take the adapter off for good."""
        self.model.base_model.attach()
        self.model.delete_adapter(NAME)
        self.base.model.requires_grad_(False).zero_grad()  # it may have trained biases

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The trial alone on the base."""
        self.model.base_model.attach()
        try:
            yield
        finally:
            self.model.base_model.detach()

    @property
    def done(self) -> bool:
        """Whether no step is to come in this stint."""
        return self.step >= self.stint.until or self.report.error is not None

    def mode(self, training: bool) -> None:
        """Let the adapter train, with its own dropout, or not; the frozen base drops nothing out unless asked to."""
        self.base.model.train(training and self.stint.settings.base_dropout)
        for _, part in self.model.base_model.parts(NAME):
            part.train(training)

    # ---------------------------------------------------------------- batches

    def batch(self) -> Tensor:
        """The rows of the next step, `(rows,)`."""
        if self.pending is None:
            self.pending = torch.tensor(next(self.order))
        return self.pending

    def rows_to_come(self) -> Tensor:
        """The rows of all batches of this stint, each once."""
        count = max(0, self.stint.until - self.step)
        ahead = list(itertools.islice(self.order, count))
        self.order = itertools.chain(ahead, self.order)
        return torch.tensor(sorted({row for batch in ahead for row in batch}), dtype=torch.long)

    def zero_grad(self) -> None:
        """Leave the gradients that a batch gives which changes nothing."""
        self.optimizer.zero_grad()
        for parameter in self.rare:
            parameter.grad = torch.zeros_like(parameter)

    def stepped(self) -> None:
        """A step was made."""
        self.step += 1
        self.report.step = self.step
        self.report.made += 1
        self.pending = None

    def group(self, rows: Rows, indices: Tensor, starts: Tensor | None = None) -> Group:
        """What the trial brings to a packed pass over these rows."""
        virtual = None if self.encoder is None else self.encoder.prompt()[0]
        return Group(rows, indices, self.entry[rows.name][indices], virtual, starts)

    def count(self, rows: Rows, batch: Tensor) -> Tensor:
        """Note what a packed batch costs; where each row's tokens start among all tokens of the batch, `(rows,)`."""
        real = rows.lengths[batch]
        lengths = real + (0 if self.encoder is None else self.encoder.embedding.num_embeddings)
        self.tokens_of_batch = int(lengths.sum())
        self.report.tokens += int(real.sum())
        self.work += float((lengths * (self.depth - self.entry[rows.name][batch])).sum()) + len(batch)
        return lengths.cumsum(0) - lengths

    def work_of(self, rows: Rows | None) -> float:
        """Tokens times layers of a pass over a whole split. A padded pass is not shared: any number will do."""
        if rows is None or not self.packed:
            return 1.0
        return float((rows.lengths * (self.depth - self.entry[rows.name])).sum()) + len(rows)

    def _lowest(self, packed: Packed) -> tuple[int, list[int]]:
        """The lowest layer that holds something that trains, and the tokens that do so below it."""
        if self.encoder is not None:
            return 0, []
        tokens: list[int] = []
        words: Any = packed.model.get_input_embeddings()
        for _, layer in self.model.base_model.layers_of(NAME):
            adapter = layer.adapter(NAME)
            if layer is words and isinstance(adapter, TrainableTokens):
                tokens += adapter.token_indices
                self.rare.append(adapter.trainable_tokens_delta)
        start, rare = self.model.base_model.key_prefix, set(map(id, self.rare))
        others = [name.removeprefix(start) for name, p in self.parameters.items() if id(p) not in rare]
        return min(map(packed.layer_of, others), default=packed.depth), tokens

    def _mask(self, packed: Packed, number: int, x: Tensor, p: float) -> Tensor:
        """The mask of a dropout: of seed, step, place and token alone, however the batch is laid out."""
        seed = hash((self.stint.seed, self.step, number)) & (2**63 - 1)
        generator = torch.Generator(x.device).manual_seed(seed)
        everything = self.tokens_of_batch
        kept = torch.rand(everything, x.shape[-1], generator=generator, device=x.device) >= p
        here = kept.index_select(0, packed.positions(self.place).to(x.device))
        return here.view(x.shape).to(x.dtype) / (1 - p)

    # ---------------------------------------------------------------- files

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tuner = self.model.base_model
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        tensors |= {f"memory.{name}": t for name, t in tuner.memory_of(NAME).items()}
        file = self.stint.checkpoint
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.unlink(missing_ok=True)  # through a link it would be written elsewhere
        about = {"step": str(self.step), "config": identity(self.stint)}
        save_file({name: t.contiguous().cpu().clone() for name, t in tensors.items()}, part, about)
        os.replace(part, file)

    def _load(self, file: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another trial. Nothing is loaded then.
        """
        found = read_checkpoint(file)
        if found.config != identity(self.stint):
            raise CheckpointError(f"The checkpoint {file} is of another trial; delete it to begin anew.")
        tuner, optimizer = self.model.base_model, self.optimizer.state()
        own: dict[str, Tensor] = {f"parameter.{name}": p for name, p in self.parameters.items()}
        own |= {f"optimizer.{name}": t for name, t in optimizer.items()}
        own |= {f"memory.{name}": t for name, t in tuner.memory_of(NAME).items()}
        further: dict[str, Tensor] = {  # what some methods remember of a parameter once it has trained
            f"memory.{number}.{what}.{name}": getattr(part, name)
            for number, (_, part) in enumerate(tuner.parts(NAME))
            if isinstance(part, AdaLora)
            for what in ("importance", "uncertainty")
            for name in RANK_DIM
        }
        damage = next(misfits(found.tensors, own, further), None)
        if damage is None and not 0 <= int(found.tensors["optimizer.steps"]) <= found.step <= self.stint.settings.steps:
            damage = f"it is of step {found.step}"
        if damage is not None:
            raise CheckpointError(f"The checkpoint {file} is damaged ({damage}); delete it to begin anew.")
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, "optimizer": {}, "memory": {}}
        for name, tensor in found.tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(parts["parameter"][name])
        self.optimizer.load(parts["optimizer"])
        tuner.remember(NAME, parts["memory"])
        self.step = found.step


@dataclass(frozen=True)
class Saved:
    """A checkpoint as its file says it: the tensors are mapped, not read.

    Attributes:
        config: of whom it is (`identity`).
    """

    step: int
    config: str
    tensors: dict[str, Tensor]


def read_checkpoint(file: Path) -> Saved:
    """What a checkpoint's file says.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        tensors, about = read_whole(file)
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint cannot be read; delete it to begin anew. {error}") from error
    step, config = about.get("step", ""), about.get("config", "")
    if not re.fullmatch("[0-9]{1,18}", step) or not config:
        raise CheckpointError(f"{file} is no checkpoint of a trial; delete it to begin anew.")
    return Saved(int(step), config, tensors)


def misfits(found: dict[str, Tensor], own: dict[str, Tensor], further: dict[str, Tensor]) -> Iterator[str]:
    """How a checkpoint's tensors differ from those of a trial: all of `own` and all or none of `further`, in their
    shapes and types, and finite."""
    needed = own | further if further.keys() & found.keys() else own
    for name in needed.keys() - found.keys():
        yield f"{name} is missing"
    for name, tensor in found.items():
        place = needed.get(name)
        if place is None:
            yield f"{name} has no place"
        elif (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)} there, {place.dtype} {tuple(place.shape)} here"
        elif not name.startswith("memory.") and not torch.isfinite(tensor).all():
            yield f"{name} is not finite"


def identity(stint: Stint) -> str:
    """What two stints of one trial have in common, whichever processes they are in."""
    values = {
        "adapter": stint.config.to_dict(),
        "settings": stint.settings.model_dump(),
        "seeds": [stint.seed, stint.order_seed],
    }
    return json.dumps(values, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def entries(rows: Rows, cut: int, tokens: list[int]) -> Tensor:
    """The layer at which each row enters: the cut, but for rows that hold one of these tokens."""
    entry = torch.full((len(rows),), cut)
    return torch.where(rows.holding(tokens), 0, entry) if tokens else entry
