"""A model of more layers than it has: ranges of its layers one after another, which share their weights
(`layer_replication` of LoRA; Kim et al. 2023, SOLAR 10.7B, arXiv:2312.15166, section 2, where the copies have weights
of their own)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from workbench.errors import TargetError

PLACES = ("layers", "encoder.layer", "h")  # where Llama, BERT and Falcon, and those like them, have their layers


def find_layers(model: nn.Module) -> tuple[Any, str]:
    """The module that holds the model's list of layers, and the list's name there.

    Raises:
        TargetError: there is none that can be found.
    """
    inner: Any = model
    while hasattr(inner, "model") or hasattr(inner, "bert"):
        inner = inner.model if hasattr(inner, "model") else inner.bert
    for place in PLACES:
        path, _, name = place.rpartition(".")
        owner = getattr(inner, path, None) if path else inner
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise TargetError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures.",
        "layer_replication",
    )


def clone(layer: nn.Module, index: int) -> Any:
    """A copy of a layer that shares its parameters and buffers, for the place `index` in the model."""
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    twin: Any = copy.deepcopy(layer, shared)
    module: Any
    for module in twin.modules():
        if hasattr(module, "layer_idx"):  # the layer's place in the key-value cache
            module.layer_idx = index
    return twin


@contextmanager
def replicated(model: nn.Module, ranges: list[tuple[int, int]] | None) -> Iterator[None]:
    """Build the model of these ranges of its layers, `[start, end)`, for good; as it was, if what follows fails.

    Raises:
        TargetError: the model's layers cannot be found.
    """
    if not ranges:
        yield
        return
    owner, name = find_layers(model)
    before, config = getattr(owner, name), getattr(model, "config", None)
    chosen = [before[i] for start, end in ranges for i in range(start, end)]
    put(owner, name, nn.ModuleList(clone(layer, index) for index, layer in enumerate(chosen)), config)
    try:
        yield
    except BaseException:
        put(owner, name, before, config)
        raise


def put(owner: Any, name: str, layers: nn.ModuleList, config: Any) -> None:
    """Give the model another list of layers, and its configuration their number."""
    setattr(owner, name, layers)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(layers)
