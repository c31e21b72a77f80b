"""Functions for libraries that put adapters into models of their own, as transformers and diffusers do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from workbench.errors import ConfigError

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import PeftConfig
from .inject import fill_defaults
from .injected import InjectedTuner, tuner_of
from .matching import is_target, sites
from .registry import by_peft_type
from .tuner_layer import TunerLayer

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "key_prefixes",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
    "with_prefixes",
]

COMPILED = "_orig_mod."  # what the names of a compiled model's modules start with


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model's layers, in place, without a `PeftModel` around it. It becomes the active one; the
    others go on training or not, as before. `model.peft_config` has the configurations by adapter name.

    Args:
        low_cpu_mem_usage: leave the parameters on the meta device until a file is loaded.
        state_dict: a checkpoint of such an adapter, whose keys say which modules to adapt, whatever the configuration
            does. Its tensors are not loaded.

    Returns:
        The same model.

    Raises:
        AdapterError: the configuration does not fit the model, which then stays as it was; or it is one of a prompt
            method, which changes no layers.
    """
    if by_peft_type(peft_config.peft_type).encoder is not None:
        raise ConfigError("`inject_adapter_in_model` does not support prompt learning; use `get_peft_model`.")
    tuner = InjectedTuner(model)
    config = peft_config if state_dict is None else _for_checkpoint(peft_config, model, state_dict)
    tuner.add(adapter_name, config, low_cpu_mem_usage)
    tuner.peft_config[adapter_name] = peft_config
    tuner.activate([adapter_name])
    tuner.set_requires_grad(adapter_name, not peft_config.inference_mode)
    model.peft_config = tuner.peft_config  # type: ignore[assignment]
    return model


def _for_checkpoint(peft_config: Any, model: nn.Module, state_dict: dict[str, Tensor]) -> Any:
    """The configuration, with the modules of a checkpoint as its targets."""
    if getattr(peft_config, "target_parameters", None):
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported: leave the state_dict out.",
            "target_parameters",
        )
    method = by_peft_type(peft_config.peft_type)
    fill_defaults(peft_config, method, model)
    named = {key.rpartition(f".{method.prefix}")[0].removeprefix(COMPILED) for key in state_dict}
    paths = {site.path.removeprefix(COMPILED) for site in sites(model)}
    configured, found = {path for path in paths if is_target(peft_config, path)}, paths & named
    if configured != found:
        differences = {"PEFT config": configured - found, "state_dict": found - configured}
        said = [
            f"The {of} contained these additional target modules: {sorted(d)}. " for of, d in differences.items() if d
        ]
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            + "".join(said),
            RuntimeWarning,
            stacklevel=3,
        )
    config = copy.copy(peft_config)
    config.target_modules, config.exclude_modules, config.layers_to_transform = found, None, None
    return config


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several that fold in this order, the active ones; only these train, unless
    `inference_mode`."""
    tuner_of(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "") -> list[str] | None:
    """Take an adapter out of a model's layers. Its entry of a plain model's `peft_config` stays.

    Args:
        prefix: of the method's parameters; what peft has to know to find them.

    Returns:
        The adapters that are active now; None if there are none.
    """
    tuner = tuner_of(model)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train or not."""
    tuner = tuner_of(model)
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        tuner.set_requires_grad(name, requires_grad)


def key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """What the names of the adapters' tensors start with in `model.state_dict()`; of one adapter, if it is named. Those
    of modules that train along (`modules_to_save`, tokens beside another method) are not among them."""
    return {
        ".".join([path, view.path, *([adapter_name] if adapter_name else [])]).lstrip(".")
        for path, layer in model.named_modules()
        if isinstance(layer, TunerLayer) and not layer.auxiliary
        for view in layer.containers()
        if adapter_name is None or adapter_name in view
    }


def with_prefixes(state_dict: dict[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """The part of a state dict whose names start so, e.g. the adapters' alone, without the base model's."""
    return {key: value for key, value in state_dict.items() if any(f"{key}.".startswith(f"{p}.") for p in prefixes)}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's half-precision parameters into float32, unless told otherwise."""
    if autocast_adapter_dtype:
        tuner_of(model).upcast(adapter_name)
