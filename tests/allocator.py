"""A fake allocator with a limit, for what happens when memory runs out on a machine that has plenty."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from workbench.training.tracker import Tracker


class Limited(Tracker):
    """While it is entered, tensors that take more than `limit` bytes together raise what CUDA's allocator raises."""

    def __init__(self, limit: float = math.inf, held: Iterable[Tensor] = ()):
        self.limit = limit
        super().__init__(held)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor; raise if it is one too many."""
        super().note(tensor)
        if self.now > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.untyped_storage().nbytes()} B")

    def left(self) -> int:
        """Bytes that are still held when all garbage is gone."""
        gc.collect()
        return self.now
