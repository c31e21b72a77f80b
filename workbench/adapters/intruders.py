"""Intruder dimensions: strong singular directions of an adapted weight that the base weight does not have, which go
along with forgetting (Shuttleworth et al. 2024, arXiv:2410.21228)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.errors import ConfigError

from .methods.lora import Lora
from .model import PeftModel


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add a LoRA adapter that is another one with weaker intruder dimensions, and make it the active one.

    Args:
        peft_model: has the adapter.
        old_adapter_name: the adapter, which stays as it is.
        new_adapter_name: the new one.
        top_k: how many of the adapted weight's strongest directions are looked at.
        threshold_epsilon: a direction is an intruder if its cosine with every direction of the base weight is less.
        mitigation_lambda: the share of the intruders that goes; 1 is all of it (section 6 of the paper: `1 - lambda`).
        logging_sink: told how many intruders each layer has.

    Raises:
        ConfigError: the adapter is not LoRA.
    """
    if peft_model.peft_config[old_adapter_name].peft_type != "LORA":
        raise ConfigError("The provided model is not using LoRA and is therefore not supported.")
    say = logging_sink or (lambda _: None)
    peft_model.add_adapter(new_adapter_name, peft_model.peft_config[old_adapter_name])
    for path, layer in peft_model.base_model.adapted_layers():
        old = layer.named_adapters().get(old_adapter_name)
        if not isinstance(old, Lora):
            continue
        new: Any = layer.adapters[new_adapter_name]
        up, down = old.factors()
        weight, delta = layer.own_weights()[0].float(), old.delta().float()
        mine, values, right = torch.linalg.svd(weight + delta, full_matrices=False)
        base = torch.linalg.svd(weight, full_matrices=False).U
        intruders = (mine.T @ base).abs().amax(1)[:top_k] < threshold_epsilon
        say(f"{path}: Intruders: {int(intruders.sum())}" if intruders.any() else f"{path}: No intruders")
        if intruders.any():
            chosen = intruders.nonzero().flatten()
            unwanted = (mine[:, chosen] * values[chosen]) @ right[chosen]
            up, down = halves((delta - (1 - mitigation_lambda) * unwanted) / old.scaling, old.r)
        for factor, value, like in zip(new.factors(), (up, down), old.factors(), strict=True):
            factor.data = value.to(like.dtype, copy=True)
    say(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def halves(update: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B `(out, r)` and A `(r, in)` of the update's r largest singular values, with a root of them in either."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    root = values[:r].sqrt()
    return left[:, :r] * root, root[:, None] * right[:r]
