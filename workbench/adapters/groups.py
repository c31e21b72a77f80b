"""Groups of neighbouring entries of a tensor, each of which goes through an adapter of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """How many entries along a dimension each group has.

    Attributes:
        sizes: of the groups, one after the other; none is empty.
        dim: 0 where the entries are rows (rows, length, ...), 1 where they are the tokens of one row (1, tokens, ...).
    """

    sizes: tuple[int, ...]
    dim: int

    def __len__(self) -> int:
        return len(self.sizes)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The groups' parts of a tensor."""
        return (tensor,) if len(self) == 1 else tensor.split(self.sizes, self.dim)

    def mapped(self, rules: Iterable[Callable[..., Tensor]], *tensors: Tensor) -> Tensor:
        """What each group's rule makes of its part of the tensors; the last tensor itself if no rule changes it."""
        parts = [self.split(tensor) for tensor in tensors]
        made = [rule(*own) for rule, *own in zip(rules, *parts, strict=True)]
        if all(new is old for new, old in zip(made, parts[-1], strict=True)):
            return tensors[-1]
        return made[0] if len(made) == 1 else torch.cat(made, self.dim)

    def worth_stacking(self, tensor: Tensor) -> bool:
        """Whether it saves time to `stack` a tensor: a CPU copies and fills up for longer than it takes to begin more
        operations."""
        return len(set(self.sizes)) == 1 or not tensor.is_cpu

    def stack(self, tensor: Tensor) -> Tensor:
        """A tensor (..., features) as (groups, entries, features); shorter groups are filled up with entries of their
        own, so that nothing of one group, such as a NaN, meets another."""
        flat = tensor.flatten(0, -2)
        if len(set(self.sizes)) == 1:
            return flat.unflatten(0, (len(self), -1))
        into, _ = places(self.sizes, len(flat), flat.device)
        return flat.index_select(0, into).unflatten(0, (len(self), -1))

    def unstack(self, stacked: Tensor, like: Tensor) -> Tensor:
        """The reverse of `stack`: (groups, entries, features) in the shape of a tensor (..., any features)."""
        flat = stacked.flatten(0, 1)
        if len(set(self.sizes)) > 1:
            _, out_of = places(self.sizes, like[..., 0].numel(), flat.device)
            flat = flat.index_select(0, out_of)
        return flat.view(*like.shape[:-1], -1)


@functools.lru_cache(maxsize=64)  # all layers of a pass ask for the same ones
def places(sizes: tuple[int, ...], entries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the entries of the stacked groups come from, (groups * longest,), and where in the stack each entry went,
    (entries,). `entries` may be a multiple of what the sizes say: the tokens of rows."""
    lengths = torch.tensor(sizes)[:, None] * (entries // sum(sizes))
    starts = lengths.cumsum(0) - lengths
    count = torch.arange(int(lengths.max()))
    into = (starts + torch.minimum(count, lengths - 1)).flatten()
    out_of = (count < lengths).flatten().nonzero().flatten()
    return into.to(device), out_of.to(device)


@functools.lru_cache(maxsize=256)  # a copy to the GPU would make it wait in every layer
def numbers(values: tuple[float, ...], like_dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number for each group, in the shape that multiplies stacked groups: (groups, 1, 1)."""
    return torch.tensor(values, dtype=like_dtype, device=device)[:, None, None]


def padded(parameters: Iterable[Any]) -> Tensor:
    """Matrices (rank, features) as (groups, largest rank, features); missing ranks are zero."""
    matrices = list(parameters)
    if len({len(matrix) for matrix in matrices}) == 1:
        return torch.stack(matrices)
    return torch.nn.utils.rnn.pad_sequence(matrices, batch_first=True)
