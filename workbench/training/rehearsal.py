"""What a trial will need, found by running its code on tensors without data.

Whatever has a floating point type gets a shape, a type and a place, but no memory (a fake tensor of PyTorch's);
integers, which say who is where, are real. So a step runs as it will, through the same lines, and its storages can be
counted, for a model that does not fit here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.meta_utils import MetaConverter
from transformers import PreTrainedModel

from .adapted import adapter_size
from .base import Base, adopt_special_tokens, available, load_config, load_model, load_tokenizer, quiet
from .bench import Bench
from .config import ModelSection
from .data import Split, TaskData, batches, collate
from .frozen import Activations
from .halved import halve_weights
from .layout import Group
from .loop import by_length, to_device
from .packed import Packed
from .parts import by_length as parted
from .rows import Rows
from .stint import Stint
from .tracker import Tracker, tensors
from .trainee import Trainee

INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


TOKENS = 512  # of the vocabulary of a small copy that is made for real
MOST_NUMBERS = 500_000_000  # of such a copy


@dataclass(frozen=True)
class Need:
    """What trials that share a pass need, in bytes but for `trainable`.

    Attributes:
        weights: of the frozen base.
        adapter: of what the trials add to it, and what they remember between steps.
        gradients, moments: of what they train; moments are AdamW's two.
        train: at the peak of a step, all of these and activations included.
        evaluation: at the peak of an evaluation.
        files: of the adapters, written.
        trainable: numbers that train.
    """

    weights: int
    adapter: int
    gradients: int
    moments: int
    train: int
    evaluation: int
    files: int
    trainable: int

    @property
    def activations(self) -> int:
        """What a step takes beyond what stays."""
        return self.train - self.weights - self.adapter - self.gradients - self.moments

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.train, self.evaluation)

    def times(self, limit: int) -> int:
        """How often the trials fit into one pass that may take so many bytes: the base is there once."""
        return max(0, (limit - self.weights) // (self.peak - self.weights))


class Rehearsal(Tracker):
    """Tensors of floating point numbers that are made while this is entered have no data. A number that is read off one
    is 1."""

    def __init__(self, blank: FakeTensorMode):
        super().__init__()
        self._blank = blank

    def __enter__(self) -> Self:
        self._patch = mock.patch.object(FakeTensor, "__deepcopy__", copied, create=True)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def perform(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What an operation gives: with data where all that it is given has some, and gives no floating point."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func in INDEXING:  # how many numbers a mask picks depends on it
            args = (args[0], spelt_out(args[1]), *args[2:])
        given = [*tensors(args), *tensors(list(kwargs.values()))]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
        elif given or not (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
            return func(*args, **kwargs)
        try:
            out: Any = self._blank.dispatch(func, types, args, kwargs)  # type: ignore[arg-type]
            whole = isinstance(out, Tensor) and not out.is_floating_point()
            return func(*args, **kwargs) if whole and not given else out
        finally:  # a module whose tensors are known there by weak references refuses to change their type
            self._blank.fake_tensor_converter.meta_converter = MetaConverter()


def copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a tensor without data; PyTorch's own would copy memory that is not there."""
    copy = tensor.detach().clone()
    memo[id(tensor)] = copy = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return copy


def spelt_out(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks given as positions."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found


# ---------------------------------------------------------------- what it is played on


def blank_base(model: ModelSection, labels: list[str] | None, device: torch.device, precision: str = "fp32") -> Base:
    """The base of a study without data: its configuration and its tokenizer are read, its weights are not.

    Args:
        device: for which a trial is rehearsed. Where there is none of it here the tensors are on the CPU, and only
            what is computed goes by it.
        precision: as in a study's training section.

    Raises:
        ModelError: the configuration or the tokenizer is missing or unreadable, or not made for the task.
    """
    here = device if available(device) else torch.device("cpu")
    with quiet():
        config, tokenizer = load_config(model, labels), load_tokenizer(model)
        adopt_special_tokens(config, tokenizer)
        with FakeTensorMode(allow_non_fake_inputs=True), here:
            network, _ = load_model(model.model_copy(update={"weights": "random"}), config)
            network.requires_grad_(False).eval()
    fresh = () if model.weights == "random" else lacking(network, Path(model.path))
    base = Base(network, tokenizer, model.task, here, model.path, fingerprint="", fresh=fresh, kind=device.type)
    if precision == "bf16":
        halve_weights(base)
    return base


def lacking(network: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """The names of weights that the files of a saved model lack, as far as one can tell without loading them."""
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    start = f"{network.base_model_prefix}."

    def held(name: str, shape: list[int]) -> bool:
        return any(shapes.get(key) == shape for key in (name, name.removeprefix(start), start + name))

    own = network.named_parameters() if shapes else ()  # a tied weight is among them once
    return tuple(sorted(name for name, p in own if not held(name, list(p.shape))))


def blank_bench(base: Base, data: TaskData, fault: str) -> Bench:
    """A bench for rehearsals.

    Args:
        base: without data, see `blank_base`.
        fault: why passes are padded; "" if they are packed.
    """
    bench = Bench(base, data, fault=fault)
    if bench.packed:
        bench.store = Unwritten(bench.packed)
    return bench


class Unwritten(Activations):
    """Activations of rows that enter late, without data."""

    def __init__(self, packed: Packed):
        self.packed = packed

    def prepare(self, rows: Rows, layer: int, indices: Tensor) -> bool:
        """See `Activations`."""
        return True

    def known(self, group: Group, layer: int, which: Tensor) -> Tensor:
        """See `Activations`."""
        vectors = self.packed.pooled and layer == self.packed.depth
        count = len(which) if vectors else int(group.lengths[which].sum())
        network = self.packed.model
        width = network.config.get_text_config().hidden_size
        return torch.empty(count, width, dtype=network.dtype, device=self.packed.base.device)


# ---------------------------------------------------------------- the rehearsal


def rehearse(bench: Bench, stints: Sequence[Stint], steps: bool = True) -> Need:
    """What a pass of these stints needs, should the heaviest batch of each come in the same step.

    What evaluation needs to produce texts is not counted.

    Args:
        bench: see `blank_bench`.
        steps: whether to run a step and an evaluation; else both peaks are 0, and the trials are only put on the base.

    Raises:
        AdapterError: a trial cannot be put on the base.
    """
    network: Any = bench.base.model
    trainees: list[Trainee] = []
    with Rehearsal(next(network.parameters()).fake_mode) as rehearsal:
        for tensor in (*network.parameters(), *network.buffers()):
            rehearsal.note(tensor)
        weights = rehearsal.now
        try:
            for stint in map(uncompiled, stints):
                trainees.append(Trainee(bench.base, bench.data, stint, bench.packed, bench.rows))
            bench.prepare(trainees)
            kept = rehearsal.now - weights
            files = sum(file_size(trainee) for trainee in trainees)
            train = step_peak(rehearsal, bench, trainees) if steps else 0
            grown = rehearsal.now - weights - kept  # what a method keeps from its first step on
            evaluation = evaluation_peak(rehearsal, bench, trainees) if steps else 0
        finally:
            for trainee in trainees:
                trainee.remove()
    trained = sum(flat.value.nbytes for trainee in trainees for flat in trainee.optimizer.flats)
    return Need(
        weights=weights,
        adapter=kept + grown - 3 * trained,
        gradients=trained,
        moments=2 * trained,
        train=train + grown,
        evaluation=evaluation,
        files=files,
        trainable=sum(trainee.report.trainable for trainee in trainees),
    )


def uncompiled(stint: Stint) -> Stint:
    """The same, without the compiler, which wants data."""
    return replace(stint, settings=stint.settings.model_copy(update={"compile": False}))


def file_size(trainee: Trainee) -> int:
    """Bytes of a trial's adapter files."""
    with trainee.attached():
        return adapter_size(trainee.model, trainee.base)


def step_peak(rehearsal: Rehearsal, bench: Bench, trainees: Sequence[Trainee]) -> int:
    """Bytes at the peak of a training step; where nothing trains none is made."""
    split, trainees = bench.data.train, [trainee for trainee in trainees if trainee.parameters]
    if not trainees:
        return rehearsal.now
    for trainee in trainees:
        settings = trainee.stint.settings
        every = batches(len(split), settings.batch_size, settings.steps, trainee.stint.order_seed)
        load = Load(bench, trainee, "train", settings.micro_batch_size)
        trainee.pending = torch.tensor(max(every, key=load))
    rehearsal.reset()
    with bench.on_base(trainees):
        bench.step(trainees, lambda trial, step, loss: None)
    return rehearsal.peak


def evaluation_peak(rehearsal: Rehearsal, bench: Bench, trainees: Sequence[Trainee]) -> int:
    """Bytes at the peak of a batch of evaluation."""
    split, first = bench.data.validation, trainees[0]
    every = by_length(split, first.stint.settings.eval_batch_size)
    batch = max(every, key=Load(bench, first, "validation"))
    rehearsal.reset()
    with torch.no_grad(), bench.on_base(trainees, training=False):
        if first.packed:
            bench.scores(trainees, bench.rows["validation"], torch.tensor(batch))
        else:
            first.model(**to_device(collate(split, batch), bench.base.device)).logits.float()
    return rehearsal.peak


class Load:
    """Says how much goes through the model at once for a batch: tokens times layers, or tokens with padding.

    Args:
        name: of the split.
        most: rows that go through at once; None: all.
    """

    def __init__(self, bench: Bench, trainee: Trainee, name: str, most: int | None = None):
        self.most, self.kind, self.packed = most, trainee.base.kind, trainee.packed
        if name in bench.rows:
            self.lengths = bench.rows[name].lengths
        else:
            self.lengths = torch.tensor([len(ids) for ids in getattr(bench.data, name).features["input_ids"]])
        self.work = self.lengths * (1 + trainee.depth - trainee.entry[name]) if self.packed else self.lengths

    def __call__(self, batch: Sequence[int]) -> int:
        rows = torch.tensor(batch)
        if self.packed:
            return max(int(part.sum()) for part in self.work[rows].split(self.most or len(rows)))
        lengths = self.lengths[rows].tolist()
        return max(len(part) * max(lengths[i] for i in part) for part in parted(lengths, self.most, self.kind))


# ---------------------------------------------------------------- padded or packed


def fault_of(model: ModelSection, base: Base, data: TaskData) -> str:
    """Why the model's passes are padded, "" if they are packed: tried out on a copy with few layers, few tokens and
    random weights.

    Args:
        base: without data.
    """
    if base.task == "SEQ_2_SEQ_LM":
        return "it has an encoder and a decoder"
    config = copy.deepcopy(base.model.config)
    few = shorten(config.get_text_config())
    drawn = model.model_copy(update={"weights": "random", "dtype": "float32"})
    with FakeTensorMode(), quiet():
        numbers = load_model(drawn, config)[0].num_parameters()
    if numbers > MOST_NUMBERS:
        return f"whether it can be run packed was not tried: two of its layers have {numbers:,} numbers"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small, _ = load_model(drawn, config)
    tried = replace(base, model=small.requires_grad_(False).eval(), device=torch.device("cpu"), kind="cpu")
    own = replace(data, train=few_rows(data.train, *few), validation=few_rows(data.validation, *few))
    return Bench(tried, own).fault


def shorten(config: Any) -> tuple[int, int]:
    """Leave a configuration as many layers as show every kind of them, and few tokens.

    Returns:
        how many tokens there are, and which of them pads.
    """
    depth, kinds = config.num_hidden_layers, list(getattr(config, "layer_types", None) or [])
    layers = min(depth, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:layers])
        elif name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, min(value, TOKENS - 1))
    config.num_hidden_layers, config.vocab_size = layers, min(config.vocab_size, TOKENS)
    return config.vocab_size, config.pad_token_id


def few_rows(split: Split, tokens: int, pad: int) -> Split:
    """The shortest and the longest rows in other tokens, none of which pads."""
    order = sorted(range(len(split)), key=[len(ids) for ids in split.features["input_ids"]].__getitem__)
    columns = split.features[list(dict.fromkeys(order[:4] + order[-4:]))]
    columns["input_ids"] = [[(pad + 1 + i % (tokens - 1)) % tokens for i in ids] for ids in columns["input_ids"]]
    return replace(split, features=Dataset.from_dict(columns), pad_token_id=pad)
