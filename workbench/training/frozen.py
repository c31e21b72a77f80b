"""Activations of the frozen base, computed once for each row and shared by all trials, epochs and processes.

What lies below everything that a trial trains gives the same activations in every step. They are kept in memory-mapped
files: the system holds them in memory as long as there is room, and processes on one machine share them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from .layout import Group
from .packed import Packed
from .rows import Rows, ranges

TOKENS = 4096  # of a pass that fills the store
TOKENS_ON_CPU = 1024  # as fast there, and processes that fill it together divide the work better
MISSING, BEGUN, KEPT = 0, 1, 2


class Activations:
    """A store of activations, by split and layer.

    Args:
        folder: of this model and data; others beside it count too and make way.
        limit: bytes that all files together may take.
    """

    def __init__(self, packed: Packed, folder: Path, limit: int):
        self.packed, self.folder, self.limit = packed, folder, limit
        self._shelves: dict[tuple[str, int], Shelf] = {}

    def prepare(self, rows: Rows, layer: int, indices: Tensor) -> bool:
        """Compute what is missing of these rows at a layer, and on the way at the next lower one that some trial wants.
        The plain base must be on its own: no adapter attached.

        Returns:
            Whether there was room for them.
        """
        shelf = self._shelf(rows, layer)
        if shelf is None:
            return False
        wanted = indices.unique()
        lower = max((at for at in range(1, layer) if self._file(rows, at).exists()), default=0)
        if lower:
            self.prepare(rows, lower, wanted[shelf.state[wanted] != KEPT])
        by_length = wanted[rows.lengths[wanted].argsort(stable=True)]
        most = TOKENS_ON_CPU if self.packed.base.kind == "cpu" else TOKENS
        for state in (MISSING, BEGUN):  # then what another process began and has not finished
            for part in by_tokens(by_length[shelf.state[by_length] == state], rows, most):
                part = part[shelf.state[part] <= state]
                if not len(part):
                    continue
                shelf.state[part] = BEGUN
                shelf.values[shelf.places(part)] = self._compute(rows, layer, part).cpu()
                shelf.state[part] = KEPT
        return True

    def known(self, group: Group, layer: int, which: Tensor) -> Tensor:
        """Activations of some of a group's rows, one after the other, `(tokens, width)`; or `(rows, width)`, after all
        layers where one position is read."""
        shelf = self._shelves[group.rows.name, layer]
        return shelf.values[shelf.places(group.indices[which])].to(self.packed.base.device)

    @torch.no_grad()
    def _compute(self, rows: Rows, layer: int, indices: Tensor) -> Tensor:
        below = [at for (name, at), s in self._shelves.items() if name == rows.name and at < layer and s.holds(indices)]
        entry = torch.full_like(indices, max(below, default=0))
        return self.packed.activations(Group(rows, indices, entry), layer, self.known)

    def _shelf(self, rows: Rows, layer: int) -> Shelf | None:
        if (rows.name, layer) not in self._shelves:
            vectors = self.packed.pooled and layer == self.packed.depth
            starts = torch.arange(len(rows) + 1) if vectors else rows.starts
            width = self.packed.model.config.get_text_config().hidden_size
            size = int(starts[-1]) * width * self.packed.model.dtype.itemsize
            file = self._file(rows, layer)
            if not file.exists() and not self._make_room(size):
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shelves[rows.name, layer] = Shelf(file, starts, width, self.packed.model.dtype)
        return self._shelves[rows.name, layer]

    def _file(self, rows: Rows, layer: int) -> Path:
        return self.folder / f"{rows.name}-{layer}"

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes more fit; other models' and data's activations are given up for them, oldest first."""
        others = [folder for folder in self.folder.parent.glob("*") if folder.is_dir() and folder != self.folder]
        others.sort(key=lambda folder: folder.stat().st_mtime)
        while bytes_in(self.folder.parent) + size > self.limit:
            if not others:
                return False
            shutil.rmtree(others.pop(0), ignore_errors=True)
        return True


class Shelf:
    """The activations of one split at one layer, on disk: `values` `(tokens, width)`, and which rows it holds."""

    def __init__(self, file: Path, starts: Tensor, width: int, dtype: torch.dtype):
        self.starts = starts
        tokens = int(starts[-1])
        self.values = torch.from_file(str(file), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
        state = file.with_name(f"{file.name}-state")
        self.state = torch.from_file(str(state), shared=True, size=len(starts) - 1, dtype=torch.uint8)

    def places(self, rows: Tensor) -> Tensor:
        """Where the values of these rows are."""
        return ranges(self.starts[rows], self.starts[rows + 1] - self.starts[rows])

    def holds(self, rows: Tensor) -> bool:
        return bool((self.state[rows] == KEPT).all())


def by_tokens(indices: Tensor, rows: Rows, tokens: int) -> list[Tensor]:
    """Row numbers in parts of about so many tokens."""
    if not len(indices):
        return []
    number = (rows.lengths[indices].cumsum(0) - 1) // tokens
    return list(indices.split(torch.unique_consecutive(number, return_counts=True)[1].tolist()))


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
