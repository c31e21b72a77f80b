"""Small functions around adapters and their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import AdapterError

from .config import PeftConfig
from .layer_types import LoraLayer


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder or a hub repository holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the hub says: there is no adapter that could be loaded
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context the scaling of every LoRA adapter is multiplied by a number. Between 0 and 1 that goes from
    the base model to the trained one along a line (Wortsman et al. 2021, arXiv:2109.01903).

    Raises:
        TypeError: the multiplier is no number.
        AdapterError: the model has no LoRA adapters.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s")
    before = [(part, part.scaling) for layer in layers for name in layer.adapters for part in layer.scaled(name)]
    try:
        for part, scaling in before:
            part.scaling = scaling * multiplier
        yield
    finally:
        for part, scaling in before:
            part.scaling = scaling


def no_split_modules(model: nn.Module) -> set[str]:
    """The classes of the modules that a device map must keep on one device."""
    return set(getattr(model, "_no_split_modules", None) or ())
