"""What state a model's adapters are in, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedModel

from workbench.errors import AdapterError

from .matching import is_target, sites
from .model import PeftModel
from .tuner_layer import TunerLayer

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: its path.
        module_type: kind of its first adapter and of the layer below, e.g. `lora.Linear`.
        enabled, active_adapters, merged_adapters: which adapters act.
        requires_grad: by adapter; "irregular" if only some of its parameters train.
        available_adapters: the adapters on this layer.
        devices: by adapter, the types of device that hold its parameters.
        quantization_backend: of the base layer, None if it is not quantised.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The model as a whole; "irregular" where its layers disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted layer of a PeftModel, or of a model that adapters were injected into.

    Raises:
        AdapterError: there is no adapted layer.
        TypeError: a prompt method, which has no adapted layers, or adaption prompt.
    """
    return _layers(model, "get_layer_status")


def _layers(model: nn.Module, asked_by: str) -> list[TunerLayerStatus]:
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise TypeError(f"{asked_by}() got an invalid PeftModel instance; {config.peft_type} has no such layers.")
        model = model.base_model
    found = [layer_status(name, layer) for name, layer in model.named_modules() if isinstance(layer, TunerLayer)]
    if not found:
        raise AdapterError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return found


def layer_status(name: str, layer: TunerLayer) -> TunerLayerStatus:
    """The status of one layer."""
    parameters = {adapter: list(module.parameters()) for adapter, module in layer.adapters.items()}
    own_place = next((adapter.prefix for adapter in layer.named_adapters().values()), "")
    return TunerLayerStatus(
        name=f"{name}.{own_place}".removesuffix("."),
        module_type=layer.kind,
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={adapter: agreed(p.requires_grad for p in own) for adapter, own in parameters.items() if own},
        available_adapters=sorted(layer.adapters),
        devices={adapter: sorted({p.device.type for p in own}) for adapter, own in parameters.items() if own},
        quantization_backend=getattr(layer.quantization_backend, "backend_name", None),
    )


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """Paths of the base model's modules that an adapter's `target_modules` mean ("matched"), and of the others
    ("unmatched"), to see what a configuration does.

    Args:
        tuner: a PeftModel, or its `base_model`.
    """
    config = tuner.peft_config[adapter_name]  # type: ignore[index]
    paths: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for site in sites(cast(Any, tuner).model):
        paths["matched" if is_target(config, site.path) else "unmatched"].append(site.path)
    return paths


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a model's adapters together.

    Raises:
        AdapterError, TypeError: as `get_layer_status`.
    """
    layers = _layers(model, "get_model_status")
    peft_model = model if isinstance(model, PeftModel) else None
    trainable, total = (peft_model or PeftModel).get_nb_trainable_parameters(*() if peft_model else (model,))
    base: nn.Module = peft_model.get_base_model() if peft_model else model
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    half_merged = any(set(merged) & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if peft_model or isinstance(model, PreTrainedModel) else "other",
        adapter_model_type=next(iter(peft_model.peft_config.values())).tuner_name if peft_model else "None",
        peft_types={name: str(c.peft_type) for name, c in peft_model.peft_config.items()} if peft_model else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=agreed(layer.enabled for layer in layers),
        active_adapters=same(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if half_merged else merged,
        requires_grad=by_adapter(layers, "requires_grad", agreed),
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices=by_adapter(layers, "devices", lambda lists: sorted({device for types in lists for device in types})),
        quantization_backend=agreed(layer.quantization_backend for layer in layers),
    )


def agreed(values: Iterable[Any]) -> Any:
    """The value that all share."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "irregular"


def same(lists: Iterable[list[str]]) -> list[str] | Irregular:
    """The list that all share."""
    distinct = {tuple(values) for values in lists}
    return list(distinct.pop()) if len(distinct) == 1 else "irregular"


def by_adapter(layers: list[TunerLayerStatus], field: str, combine: Any) -> dict[str, Any]:
    """One field of all layers, combined for each adapter."""
    values: dict[str, list[Any]] = {}
    for layer in layers:
        for name, value in getattr(layer, field).items():
            values.setdefault(name, []).append(value)
    return {name: combine(found) for name, found in values.items()}
