"""`create_arrow_model`: saved LoRA adapters on one base model, and a router over them; see `methods.arrow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import ConfigError, LayerKindError

from . import base_ops
from .methods.arrow import GKS_ADAPTER_PREFIX, TASK_ADAPTER_PREFIX
from .methods.lora import Lora, LoraConfig
from .methods.lora_options import ArrowConfig
from .model import PeftModel
from .tuner import Tuner

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model whose active adapter, `arrow_router`, routes over saved LoRA adapters.

    Args:
        base_model: the model that they were trained on.
        task_specific_adapter_paths: folders or hub ids (`user/repo` or `user/repo/subfolder`) of the experts; they get
            the names task_0, task_1, ...
        arrow_config: options of the router; the adapters' names are filled in.
        general_adapter_paths: the same for what every expert knows; gks_0, gks_1, ...
        adapter_kwargs: arguments of `from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: there is no adapter, or they differ in rank, shape or target modules.
        LayerKindError: an adapter is on something else than linear layers (also a TypeError).
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    general = general_adapter_paths or [] if arrow_config.use_gks else []
    sources = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    sources |= {f"{GKS_ADAPTER_PREFIX}{i}": path for i, path in enumerate(general)}
    model: PeftModel | None = None
    for name, path in sources.items():
        source, subfolder = adapter_source(path)
        where = adapter_kwargs if subfolder is None else {"subfolder": subfolder} | adapter_kwargs
        if model is None:
            model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **where)
        else:
            model.load_adapter(source, adapter_name=name, **where)
    assert model is not None
    arrow_config.task_adapter_names = [name for name in sources if name.startswith(TASK_ADAPTER_PREFIX)]
    arrow_config.gks_adapter_names = [name for name in sources if name.startswith(GKS_ADAPTER_PREFIX)]
    modules, r = common_shape(model.base_model, list(sources))
    router = LoraConfig(arrow_config=arrow_config, target_modules=modules, r=r)
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model


def adapter_source(path: str) -> tuple[str, str | None]:
    """The folder or hub id of an adapter, and the subfolder in the hub's repository.

    Raises:
        ConfigError: the folder holds no adapter.
    """
    if Path(path).is_dir():
        if not Path(path, "adapter_config.json").is_file():
            raise ConfigError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return path, None
    parts = path.strip("/").split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def common_shape(tuner: Tuner, names: list[str]) -> tuple[list[str], int]:
    """The target modules and the rank that all adapters share.

    Raises:
        ConfigError: they differ in either, or in the shape of factors.
        LayerKindError: one of them is on something else than a linear layer.
    """
    shapes: dict[str, dict[str, list[tuple[int, ...]]]] = {name: {} for name in names}
    for path, layer in tuner.adapted_layers():
        for name in names:
            adapter = layer.named_adapters().get(name)
            if not isinstance(adapter, Lora):
                continue
            if base_ops.kind_of(layer.base_layer) not in (base_ops.LINEAR, base_ops.CONV1D):
                raise LayerKindError(
                    "LoRA adapters must only target Linear-like layers (nn.Linear, Conv1D of transformers), but "
                    f"{name} is on {path}, a {type(layer.base_layer).__name__}."
                )
            shapes[name][path] = [tuple(factor.shape) for factor in adapter.factors()]
    ranks = {name: [down[0] for _, down in found.values()] for name, found in shapes.items()}
    first = names[0]
    for name in names:
        if shapes[name].keys() != shapes[first].keys():
            raise ConfigError(f"[{name}] target_modules mismatch: {sorted(shapes[name])} != {sorted(shapes[first])}")
        if ranks[name] != ranks[first]:
            raise ConfigError(f"[{name}] rank mismatch: {ranks[name]} != {ranks[first]}")
        if shapes[name] != shapes[first]:
            raise ConfigError(f"[{name}] shape mismatch: {shapes[name]} != {shapes[first]}")
    return sorted(shapes[first]), ranks[first][0]
