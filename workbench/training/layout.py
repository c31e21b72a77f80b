"""Where the tokens of a packed pass are: which rows are there at which layer, and how attention finds its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .data import IGNORED
from .rows import Rows, ranges

BUCKET = 0.85  # a sequence shorter than this share of its bucket's longest opens a bucket of its own


@dataclass(frozen=True)
class Group:
    """What one trial brings to a pass.

    Attributes:
        rows: the split.
        indices: which of its rows, `(n,)`.
        entry: the layer at which each of them enters, `(n,)`: 0 as tokens, `l` with the activations before layer `l`.
        virtual: virtual tokens that stand before every row, `(tokens, width)`.
        starts: where each row's tokens start among all tokens of its batch, of which the pass may be a part.
    """

    rows: Rows
    indices: Tensor
    entry: Tensor
    virtual: Tensor | None = None
    starts: Tensor | None = None

    @property
    def before(self) -> int:
        """Virtual tokens before each row."""
        return 0 if self.virtual is None else len(self.virtual)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, virtual ones included, `(n,)`."""
        return self.rows.lengths[self.indices] + self.before

    def inputs(self, came: Tensor) -> dict[str, Tensor]:
        """Ids, positions and types of all tokens of the rows marked true; virtual tokens have the id 0."""
        indices, lengths = self.indices[came], self.lengths[came]
        where = self.rows.tokens(indices)
        own = {"input_ids": self.rows.ids[where]}
        if self.rows.types is not None:
            own["token_type_ids"] = self.rows.types[where]
        return {
            **{name: self._beside_virtual(values, lengths, 0) for name, values in own.items()},
            "position_ids": ranges(torch.zeros_like(lengths), lengths),
        }

    def targets(self, causal: bool) -> Tensor:
        """The label of each token; `causal`: the one that it should predict, which is the next.

        Positions that are not scored hold `IGNORED`.
        """
        lengths = self.lengths
        labels = self._beside_virtual(self.rows.labels[self.rows.tokens(self.indices)], lengths, IGNORED)
        return labels.roll(-1).index_fill(0, lengths.cumsum(0) - 1, IGNORED) if causal else labels

    def _beside_virtual(self, values: Tensor, lengths: Tensor, filling: int) -> Tensor:
        if self.virtual is None:
            return values
        starts = lengths.cumsum(0) - lengths + self.before
        places = ranges(starts, lengths - self.before)
        return values.new_full((int(lengths.sum()),), filling).index_copy(0, places, values)


@dataclass(frozen=True)
class Bucket:
    """Sequences of about one length, which attention pads to the longest of them.

    Attributes:
        rows, length: the padded sequences' shape.
        mask: `(rows, 1, 1, length)`, true for tokens; None: there is no padding.
    """

    rows: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class Buckets:
    """Sequences as attention takes them: bucket by bucket, padded.

    Attributes:
        each: the buckets, the one with the longest sequences first.
        padded: the token that stands at each place of the padded sequences, `(places,)`; where a sequence has ended it
            is the last of its own, so that no sequence ever meets what is another's.
        places: the place of each token, `(tokens,)`.
        order: the sequence in each row of the buckets, `(rows,)`.
        back: the row of each sequence, `(rows,)`.
    """

    each: list[Bucket]
    padded: Tensor
    places: Tensor
    order: Tensor
    back: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> Buckets:
        """Sequences of these lengths that lie one after the other."""
        order = lengths.argsort(descending=True, stable=True)
        ordered = lengths[order]
        each, longest, begin = [], torch.empty_like(lengths), 0
        for end in ends(ordered.tolist()):
            own = ordered[begin:end]
            length = int(own[0])
            mask = (torch.arange(length) < own[:, None])[:, None, None] if int(own[-1]) < length else None
            each.append(Bucket(end - begin, length, mask))
            longest[begin:end], begin = length, end
        back = order.argsort()
        starts, rows = lengths.cumsum(0) - lengths, longest.cumsum(0) - longest  # of tokens, of places
        within = torch.minimum(ranges(torch.zeros_like(longest), longest), (ordered - 1).repeat_interleave(longest))
        return cls(
            each=each,
            padded=starts[order].repeat_interleave(longest) + within,
            places=ranges(rows[back], lengths),
            order=order,
            back=back,
        )


@dataclass(frozen=True)
class Stage:
    """The rows that are present from one layer on.

    Attributes:
        layer: the first of which this holds.
        present: their tokens among all tokens of the pass; None: all of them.
        order: puts the tokens before this stage, followed by those that enter, in the order of the pass; None: nothing
            to do.
        entering: for each group the positions of its rows that enter here.
        sizes: tokens of each group.
        rows: sequences of each group.
        lengths: of each sequence.
        firsts: where each sequence starts.
        buckets: the sequences, as attention takes them.
    """

    layer: int
    present: Tensor | None
    order: Tensor | None
    entering: list[Tensor]
    sizes: list[int]
    rows: list[int]
    lengths: Tensor
    firsts: Tensor
    buckets: Buckets


@dataclass(frozen=True)
class Layout:
    """A packed pass: the groups' rows one after the other, each entering at its layer.

    Attributes:
        depth: layers of the model.
        inputs: ids, positions and types of the tokens that are embedded, `(1, tokens)` each.
        came: for each group which rows come as tokens, `(n,)`; others come after all layers.
        sizes: embedded tokens of each group.
        stages: by the layer at which somebody enters, in order.
        row_order: puts the rows that come as tokens, followed by the others, in order; None: they are.
    """

    groups: Sequence[Group]
    depth: int
    inputs: dict[str, Tensor]
    came: list[Tensor]
    sizes: list[int]
    stages: dict[int, Stage]
    row_order: Tensor | None

    @property
    def first(self) -> int:
        """The first layer that has anything to do; `depth` if none has."""
        return min(self.stages, default=self.depth)

    @property
    def rows(self) -> list[int]:
        """Rows of each group."""
        return [len(group.indices) for group in self.groups]

    def stage(self, layer: int) -> Stage:
        """The stage that a layer belongs to."""
        return self.stages[max(first for first in self.stages if first <= layer)]


def lay_out(groups: Sequence[Group], depth: int, pooled: bool, device: torch.device) -> Layout:
    """Plan a pass through a model with `depth` layers.

    Args:
        pooled: what is wanted of each row is one position after the last layer; rows may enter there with it.
    """
    came = [group.entry < depth if pooled else torch.ones_like(group.entry, dtype=torch.bool) for group in groups]
    parts = [group.inputs(own) for group, own in zip(groups, came, strict=True)]
    inputs = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    sizes = [len(part["input_ids"]) for part in parts]
    if not sum(sizes):  # all that is to do comes after the layers; models want something to embed
        inputs = {name: tensor.new_zeros(1, 1) for name, tensor in inputs.items()}
        sizes[0] = 1
    everyone = torch.cat(came)
    entry = torch.cat([group.entry for group in groups])[everyone]
    lengths = torch.cat([group.lengths for group in groups])[everyone]
    owner = torch.cat([torch.full_like(own, i, dtype=torch.long) for i, own in enumerate(came)])[everyone]
    token_entry, token_owner = entry.repeat_interleave(lengths), owner.repeat_interleave(lengths)
    stages: dict[int, Stage] = {}
    before = torch.zeros(0, dtype=torch.long)
    for layer in sorted(set(entry.tolist())):
        here, tokens_here = entry <= layer, token_entry <= layer
        present = tokens_here.nonzero()[:, 0]
        order = torch.cat([before, (token_entry == layer).nonzero()[:, 0]]).argsort()
        own = lengths[here]
        stages[layer] = Stage(
            layer=layer,
            present=None if len(present) == len(token_entry) else present,
            order=None if bool((order.diff() == 1).all()) else order,
            entering=[((group.entry == layer) & c).nonzero()[:, 0] for group, c in zip(groups, came, strict=True)],
            sizes=torch.bincount(token_owner[tokens_here], minlength=len(groups)).tolist(),
            rows=torch.bincount(owner[here], minlength=len(groups)).tolist(),
            lengths=own,
            firsts=own.cumsum(0) - own,
            buckets=Buckets.of(own),
        )
        before = present
    all_came = bool(everyone.all()) or not bool(everyone.any())
    row_order = None if all_came else torch.cat([everyone.nonzero()[:, 0], (~everyone).nonzero()[:, 0]]).argsort()
    layout = Layout(groups, depth, inputs, came, sizes, stages, row_order)
    return layout if device.type == "cpu" else moved(layout, device)


def ends(lengths: list[int]) -> list[int]:
    """Where each bucket ends, for lengths from the longest to the shortest."""
    found, longest = [], lengths[0]
    for i, length in enumerate(lengths):
        if length < BUCKET * longest:
            found.append(i)
            longest = length
    return [*found, len(lengths)]


def moved(value: Any, device: torch.device) -> Any:
    """A plan with all its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [moved(part, device) for part in value]
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (Stage, Buckets, Bucket)):
        return replace(value, **{name: moved(part, device) for name, part in vars(value).items()})
    if isinstance(value, Layout):  # the groups' indices, and who came, are for this side
        stages = {layer: replace(moved(s, device), entering=s.entering) for layer, s in value.stages.items()}
        return replace(
            value, inputs=moved(value.inputs, device), stages=stages, row_order=moved(value.row_order, device)
        )
    return value
