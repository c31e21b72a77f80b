"""Swapping the weights of a LoRA adapter for those of another, in place, so that a compiled model stays compiled."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import AdapterError, ConfigError, MergeError, MismatchError

from .checkpoint import base_slots, load_peft_weights
from .config import PeftConfig, pattern_value
from .injected import tuner_of
from .methods.lora import Lora, LoraConfig
from .registry import by_peft_type
from .tuner_layer import TunerLayer

SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")  # what two adapters must have in common


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Give an adapter of a `PeftModel` the weights and the scaling of a saved one. It keeps its name and its layers;
    those that the saved one does not have give no update any more. Ranks may differ; see
    `prepare_model_for_compiled_hotswap` for compiled models.

    Args:
        model_name_or_path: folder or hub id of the saved adapter.
        torch_device: where its tensors are read to.
        kwargs: what `hf_hub_download` takes (subfolder, revision, token, ...).

    Raises:
        ConfigError: an adapter is no LoRA, or the two differ in options that weights and scaling do not tell.
        MismatchError: the saved adapter has tensors that have no place here.
        MergeError: the adapter is merged.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    prefix = by_peft_type(config.peft_type).prefix
    tensors = load_peft_weights(model_name_or_path, torch_device, **kwargs)
    held = {_held_key(key, adapter_name, prefix): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, held, adapter_name, config, prefix)  # type: ignore[arg-type]


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """See that one adapter's weights can take the place of the other's.

    Raises:
        ConfigError: they cannot.
    """
    if config0.peft_type != config1.peft_type:
        raise ConfigError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    if config0.peft_type != LoraConfig.peft_type:
        raise ConfigError(f"Hotswapping only supports {LoraConfig.peft_type} but {config0.peft_type} was passed.")
    for name in SAME:
        one, other = getattr(config0, name), getattr(config1, name)
        if one != other:
            raise ConfigError(f"Configs are incompatible: for {name}, {one} != {other}", name)


def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors by the names that they have in the model's state dict, with the adapter's name
    in them, and for plain models too. That the configurations fit is not checked.

    Args:
        config: of the new adapter; gives its ranks and scalings.
        parameter_prefix: what the names of the method's parameters start with.

    Raises:
        MismatchError, MergeError: as `hotswap_adapter`. Nothing is swapped then.
    """
    tuner = tuner_of(model)
    layers = dict(tuner.layers_of(adapter_name))
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise MergeError(f"Cannot hot-swap adapter {adapter_name!r} while it is merged; call unmerge_adapter first.")
    own: dict[str, tuple[TunerLayer, Tensor]] = {}
    for path, layer in layers.items():
        for name, (owner, leaf) in layer.adapter(adapter_name).slots().items():
            key = _held_key(f"{tuner.key_prefix}{path}.{name}", adapter_name, parameter_prefix)
            own[key] = layer, getattr(owner, leaf)
    base = {tuner.key_prefix + name: getattr(*slot) for name, slot in base_slots(tuner.model).items()}
    # embeddings that were saved along
    saved = {key: base[key] for key, new in state_dict.items() if key in base and base[key].shape == new.shape}
    unexpected = [key for key in state_dict if key not in own and key not in saved]
    if unexpected:
        raise MismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    with torch.no_grad():
        for key, (layer, tensor) in own.items():
            if key in state_dict:
                _fill(tensor, state_dict[key], getattr(layer.get_base_layer(), "groups", 1))
            else:
                tensor.zero_()
        for key, tensor in saved.items():
            tensor.copy_(state_dict[key])
    for path, layer in layers.items():
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        for part in layer.scaled(adapter_name):
            part.initial_scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
            if isinstance(part.scaling, Tensor):
                part.scaling.fill_(part.initial_scaling)
            else:
                part.scaling = part.initial_scaling


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Call this once, between loading the first LoRA adapter and compiling the model, so that adapters of other ranks
    and scalings can be swapped in without compiling again: ranks are padded with zeros, scalings become tensors.

    Args:
        target_rank: the largest rank of all adapters to come; by default ranks stay as they are.
        config: configurations in which the rank is to be changed as well.
        check_compiled: what to do if the model is compiled already.

    Raises:
        AdapterError: there is no LoRA adapter, or the model is compiled already.
        ConfigError: a rank is larger than `target_rank`, or the groups of a convolution do not divide it.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise AdapterError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled, which will "
                "probably be compiled again.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ConfigError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
            )
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    scaled = [(layer, part) for layer in layers for name in layer.adapters for part in layer.scaled(name)]
    if not scaled:
        raise AdapterError("No adapter layers found on the model; load the first adapter before.")
    if target_rank is not None:
        factors = [pair for layer in layers for pair in _factors(layer, target_rank)]
        for factor, wider in factors:
            factor.data = wider
    for layer, part in scaled:
        part.scaling = torch.as_tensor(part.scaling, device=next(layer.parameters()).device)
    if config is not None and target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config]:
            one.r, one.rank_pattern = target_rank, dict.fromkeys(one.rank_pattern, target_rank)


def _factors(layer: TunerLayer, target_rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each factor of a layer's LoRA adapters, and the same of another rank."""
    groups = getattr(layer.get_base_layer(), "groups", 1)
    for adapter in layer.adapters.values():
        if not isinstance(adapter, Lora):
            continue
        up, down = adapter.factors()
        if len(down) > target_rank:
            raise ConfigError(
                f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                f"({len(down)})."
            )
        if target_rank % groups:
            raise ConfigError(
                f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank {target_rank}, but the "
                f"target rank is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
            )
        wider_up = up.new_zeros(up.shape[0], target_rank // groups, *up.shape[2:])
        wider_down = down.new_zeros(target_rank, *down.shape[1:])
        with torch.no_grad():
            _fill(wider_up, up, groups)
            _fill(wider_down, down, groups)
        yield from ((up, wider_up), (down, wider_down))


def _fill(tensor: Tensor, value: Tensor, groups: int) -> None:
    """Overwrite a factor, in place, with one of at most its rank and zeros; a larger one takes its place.

    A convolution's groups each have a block of rows of `lora_A`, which must stay theirs.
    """
    value = value.to(tensor)
    if any(new > old for new, old in zip(value.shape, tensor.shape, strict=True)):
        tensor.data = value.clone()
        return
    tensor.zero_()
    if len(value) < len(tensor):
        tensor.unflatten(0, (groups, -1))[:, : len(value) // groups] = value.unflatten(0, (groups, -1))
    else:
        tensor[tuple(slice(size) for size in value.shape)] = value


def _held_key(key: str, adapter_name: str, prefix: str) -> str:
    """The name in the model's state dict, from that in a checkpoint, which has no adapter name in it."""
    return re.sub(rf"^(.*\.{re.escape(prefix)}[^.]*)", rf"\1.{adapter_name}", key)
