"""A split as tensors: all rows one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Split


@dataclass(frozen=True)
class Rows:
    """The rows of a split, in memory.

    Attributes:
        name: of the split.
        split: where they came from.
        ids: token ids of all rows, `(tokens,)`.
        types: token type ids like `ids`; None if all are zero.
        labels: `(rows,)` with one class each, or like `ids` with one label a token.
        starts: where each row starts, `(rows + 1,)`.
    """

    name: str
    split: Split
    ids: Tensor
    types: Tensor | None
    labels: Tensor
    starts: Tensor

    @classmethod
    def of(cls, name: str, split: Split) -> Rows:
        """Read a split whose labels are a class, or one label a token."""
        columns = split.features[:]
        lengths = torch.tensor([len(row) for row in columns["input_ids"]])
        types = columns.get("token_type_ids")
        labels = columns["labels"]
        return cls(
            name,
            split,
            joined(columns["input_ids"]),
            None if types is None else joined(types),
            joined(labels) if isinstance(labels[0], list) else torch.tensor(labels),
            torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, `(rows,)`."""
        return self.starts.diff()

    def tokens(self, indices: Tensor) -> Tensor:
        """Where the tokens of these rows are, one row after the other."""
        return ranges(self.starts[indices], self.lengths[indices])

    def holding(self, tokens: Sequence[int]) -> Tensor:
        """Which rows hold at least one of these tokens, `(rows,)`."""
        hits = torch.isin(self.ids, torch.tensor(list(tokens))).long()
        before = torch.cat([hits.new_zeros(1), hits.cumsum(0)])
        return before[self.starts].diff() > 0


def joined(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row])


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`starts[0], starts[0] + 1, ...` for `lengths[0]` numbers, then those from `starts[1]` on, and so on."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
