"""Gradient checkpointing for a base that is in evaluation mode, where transformers' own does nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .base import configs_of


@contextmanager
def recomputed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """While this is entered the model's layers keep no activations for the backward pass, but compute them again.

    Leave it after the backward pass.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if on else []
    caching: list[Any] = [config for config in configs_of(model) if getattr(config, "use_cache", False)] if on else []
    for layer in layers:
        layer.forward = functools.partial(_run, layer.forward)
    for config in caching:  # caches would be filled twice
        config.use_cache = False
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for config in caching:
            config.use_cache = True


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
