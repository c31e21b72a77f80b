"""`replace_lora_weights_loftq`: LoRA that makes up for what quantisation took from a base model that was loaded
quantised (LoftQ, Li et al. 2023, arXiv:2310.08659, algorithm 1 with one alternation)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from workbench.errors import CheckpointError, TargetError

from . import base_ops, quantised
from .checkpoint import read_file
from .methods.lora import Lora
from .methods.lora_init import low_rank
from .model import PeftModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Give the LoRA adapter of each 4-bit layer the best factors for the layer's quantisation error, of which
    `lora_alpha` = r makes their product the update.

    Args:
        peft_model: a model with LoRA on layers that bitsandbytes keeps in four bits.
        model_path: folder or file of the base model's own safetensors; by default where the base model came from.
        adapter_name: the adapter whose factors are replaced.
        callback: called after each layer with the model and the layer's path; a layer for which it is false gets its
            factors back.

    Raises:
        TargetError: no layer is quantised so and has the adapter.
        CheckpointError: the base model's weights are not there.
    """
    found = [
        (path, layer, layer.adapter(adapter_name))
        for path, layer in peft_model.base_model.layers_of(adapter_name)
        if isinstance(quantised.backend(layer.base_layer), quantised.Bnb4bitBackend)
    ]
    if not found:
        raise TargetError("No bnb LoRA module found on the model: no layer with this adapter is quantised in 4 bits.")
    base = peft_model.get_base_model()
    files = weight_files(model_path or base.__dict__.get("name_or_path") or "")
    for path, layer, adapter in found:
        if not isinstance(adapter, Lora):
            raise TargetError(f"The adapter on {path} is no LoRA adapter.")
        whole = read(files, path, getattr(base, "base_model_prefix", ""))
        lost = whole.float() - base_ops.read_weight(layer.base_layer).float().cpu()
        up, down = adapter.factors()
        before = up.clone(), down.clone()
        for factor, value in zip((down, up), low_rank(lost, len(down)), strict=True):
            factor.copy_(value)
        if callback is not None and not callback(peft_model, path):
            up.copy_(before[0])
            down.copy_(before[1])


def weight_files(source: str | Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a base model, by the tensor's name.

    Raises:
        CheckpointError: there is none; hub models must have been downloaded.
    """
    path = Path(source)
    if not path.exists():
        try:
            path = Path(snapshot_download(str(source), local_files_only=True))
        except Exception as error:
            raise CheckpointError(
                f"The base model's own weights are not at {str(source)!r}; pass `model_path`, the folder of its "
                f"{WEIGHTS}: {error}"
            ) from error
    folder = path.parent if path.is_file() else path
    if (folder / INDEX).is_file() and not path.is_file():
        try:
            named = {name: Path(file) for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of weights: {error!r}") from error
        if outside := [str(file) for file in named.values() if file.name != str(file)]:
            raise CheckpointError(f"{folder / INDEX} names {outside[0]!r}, which is not in the folder.")
        return {name: folder / file for name, file in named.items()}
    file = path if path.is_file() else folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"Could not find {WEIGHTS} in {folder}: the weights must be safetensors.")
    return dict.fromkeys(read_file(file), file)


def read(files: dict[str, Path], path: str, base_prefix: str) -> Tensor:
    """The weight of the layer at a path of the model, `(out, in)`."""
    names = (f"{path}.weight", f"{path}.weight".removeprefix(f"{base_prefix}."))
    name = next((name for name in names if name in files), None)
    if name is None:
        raise CheckpointError(f"The base model's files hold no {names[0]}.")
    found = read_file(files[name])
    if name not in found:
        raise CheckpointError(f"{files[name]} holds no {name}, though the index says so.")
    return found[name]
