"""Making modules whose parameters take no memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def init_empty_weights() -> AbstractContextManager[object]:
    """Within this context modules are made on the meta device: they have shapes, but no values."""
    return torch.device("meta")


def skip_init_on_device(func: Callable[P, R]) -> Callable[P, R]:
    """Let a function make its modules in main memory, even within `init_empty_weights`."""

    @wraps(func)
    def in_memory(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return func(*args, **kwargs)

    return in_memory
