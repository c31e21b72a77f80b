"""An adapter that changes weights of linear layers alone as a LoRA adapter: what it adds to them, cut to the largest
singular values."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from workbench.errors import ConfigError, LayerKindError, MergeError

from . import base_ops
from .adapter import DeltaAdapter
from .checkpoint import write_weights
from .config import TargetConfig
from .methods.lora import LoraConfig
from .tuner import Tuner
from .tuner_layer import TunerLayer

if TYPE_CHECKING:
    from .model import PeftModel


KINDS = {base_ops.LINEAR, base_ops.CONV1D}


def update_of(layer: TunerLayer, name: str) -> Tensor | None:
    """What an adapter adds to the canonical weight of a linear layer, `(out, in)` in float64; None if it does anything
    else."""
    adapter = layer.adapter(name)
    if base_ops.kind_of(layer.base_layer) not in KINDS or not isinstance(adapter, DeltaAdapter):
        return None
    weight, bias = layer.own_weights()
    try:
        merged, merged_bias = adapter.merged(weight.detach().double(), bias)
    except MergeError:
        return None
    if bias is not None and merged_bias is not None and not torch.equal(bias, merged_bias):
        return None
    return merged - layer.original_weight().double()


def supports_lora_conversion(model: PeftModel, adapter_name: str = "default") -> bool:
    """Whether `convert_to_lora` takes an adapter of the model."""
    tuner = model.base_model
    layers = [layer for _, layer in tuner.layers_of(adapter_name) if not layer.adapter(adapter_name).replaces]
    return bool(layers) and all(update_of(layer, adapter_name) is not None for layer in layers)


def factors(update: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)`, whose product B A is nearest to the update among all of rank r.

    Args:
        rank: r, or the share of the squared singular values that it has to account for.

    Raises:
        ConfigError: the rank is larger than the update's sides.
    """
    left, values, right = torch.linalg.svd(update.float(), full_matrices=False)
    if isinstance(rank, float):
        energy = values.square().cumsum(0)
        rank = int(torch.searchsorted(energy, rank * energy[-1])) + 1
    if rank > len(values):
        raise ConfigError(
            f"The chosen rank {rank} is larger than the weight shape ({len(values)}), please choose a lower rank."
        )
    return right[:rank].contiguous(), left[:, :rank] * values[:rank]


@torch.no_grad()
def convert_to_lora(
    model: PeftModel,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter nearest to one of another method, as its configuration and the tensors of its file.

    Args:
        model: has the adapter; it is left as it is.
        rank: of every update; or, a number above 0 and up to 1, the share of an update's squared singular values that
            the smallest rank which is chosen for it accounts for.
        compile_kwargs: compile the decomposition, with these arguments of `torch.compile`.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: the rank is zero, no share, or larger than a layer.
        LayerKindError: the adapter changes something else than weights of linear layers.
    """
    if rank == 0:
        raise ConfigError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    tuner = model.base_model
    if not isinstance(tuner, Tuner):
        raise LayerKindError("Could not detect any layer that supports LoRA conversion: this is no PeftModel.")
    tuner.check_known([adapter_name])
    source: Any = model.peft_config[adapter_name]
    if source.peft_type == LoraConfig.peft_type:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter; no need for that.", stacklevel=2
        )
    if getattr(source, "bias", "none") != "none":
        raise ConfigError(f"The adapter trains biases of the base model (bias={source.bias!r}), which stay behind.")
    factorise = factors if compile_kwargs is None else torch.compile(factors, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, layer in tqdm(list(tuner.layers_of(adapter_name)), desc="Converting to LoRA", disable=not progressbar):
        adapter, prefix = layer.adapter(adapter_name), f"{tuner.key_prefix}{path}."
        if adapter.replaces:
            tensors |= {prefix + name: tensor for name, tensor in adapter.saved().items()}
            continue
        update = update_of(layer, adapter_name)
        if update is None:
            raise LayerKindError(
                f"Some module types on this model do not support LoRA conversion: {type(adapter).__name__} on {path}."
            )
        lora_A, lora_B = (factor.to(next(adapter.parameters()).dtype) for factor in factorise(update, rank))
        tensors |= {f"{prefix}lora_A.weight": lora_A, f"{prefix}lora_B.weight": lora_B}
        ranks[path] = len(lora_A)
    if not ranks:
        raise LayerKindError("Could not detect any layer that supports LoRA conversion.")

    same = {f.name: getattr(source, f.name) for f in fields(TargetConfig) if hasattr(source, f.name)}
    if isinstance(rank, int):
        return LoraConfig(**same, r=rank, lora_alpha=rank), tensors
    return LoraConfig(**same, r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=dict(ranks)), tensors


def save_as_lora(
    path: str | Path,
    model: PeftModel,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` gives as an adapter file with its configuration.

    Raises:
        CheckpointError: the path is a file.
        AdapterError: as `convert_to_lora`.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    write_weights(tensors, path)
    config.save_pretrained(path)
