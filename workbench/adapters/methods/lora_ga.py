"""LoRA-GA's preparation: the gradient of each target layer's weight on sample data (Wang et al. 2024, arXiv:2407.05000,
section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import ConfigError

from .corda import _save, _there, target_layers
from .lora import LoraConfig


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Leave on each target layer the mean gradient that `init_lora_weights="lora_ga"` starts from.

    Args:
        model: the base model that will be adapted; only its target weights get gradients meanwhile.
        lora_config: with a `lora_ga_config`.
        train_step: runs forward and backward on sample data, once or several times.
        cache_file: safetensors file that keeps the gradients.

    Raises:
        ConfigError: the configuration has no `lora_ga_config`, means no linear layer, or a layer is not used.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...).",
            "lora_ga_config",
        )
    _default_targets(model, lora_config)
    layers = dict(target_layers(model, lora_config))
    if not layers:
        raise ConfigError("No supported layers found for LoRA-GA initialization, which needs linear layers.")
    if _there(cache_file):
        from ..checkpoint import read_file

        gradients = read_file(Path(str(cache_file)))
        for name, layer in layers.items():
            layer._peft_loraga_grad = gradients[name].to(layer.weight.device)
        return
    _measure(model, layers, train_step)
    if cache_file is not None:
        _save({name: layer._peft_loraga_grad for name, layer in layers.items()}, cache_file)


def _default_targets(model: nn.Module, config: LoraConfig) -> None:
    from ..inject import fill_defaults  # which needs the methods
    from ..registry import METHODS

    fill_defaults(config, METHODS["lora"], model)


def _measure(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> None:
    """Run `train_step` in train mode and keep each weight's gradient, a mean over the backward passes."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    training = model.training
    counts = dict.fromkeys(layers, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    model.train().requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    handles = [layer.register_full_backward_hook(counter(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            train_step()
    finally:
        for handle in handles:
            handle.remove()
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
        model.train(training)
    for name, layer in layers.items():
        if counts[name]:
            layer._peft_loraga_grad = layer.weight.grad / counts[name]
        layer.weight.grad = None
