"""Adapter files: safetensors with peft's keys, written and read. Pickled checkpoints are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.errors import CheckpointError

from .adapter import Slot
from .inject import input_embedding, is_target, sites
from .tuner_layer import TunerLayer

if TYPE_CHECKING:
    from .model import PeftModel
    from .tuner import Tuner

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # the layers that peft looks for when it saves embeddings by itself


def locate(source: str | Path, name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The path of one file of an adapter, in a folder or, downloaded, in a hub repository.

    Raises:
        CheckpointError: there is no such file.
    """
    folder = Path(source, subfolder or "")
    if (folder / name).is_file():
        return folder / name
    if folder.is_dir() or os.path.isabs(source):
        raise CheckpointError(f"Can't find '{name}' at '{folder}'.{_pickle_hint(folder)}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub))
    except Exception as error:
        raise CheckpointError(
            f"Can't find '{name}' at '{source}': not a folder here, and the hub says: {error}"
        ) from error


def _pickle_hint(folder: Path) -> str:
    if not (folder / PICKLE_NAME).exists():
        return ""
    return f" The pickled {PICKLE_NAME} is not loaded, since it could run code: save it as safetensors first."


def read_weights(source: str | Path, device: str = "cpu", **hub: Any) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`.

    Raises:
        CheckpointError: the file is missing, pickled or damaged.
    """
    return read_file(locate(source, WEIGHTS_NAME, **hub), device)


def read_file(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def write_weights(tensors: dict[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter_model.safetensors`, so that a crash leaves the old file or the new one, never half of one."""
    path = Path(folder, WEIGHTS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory, as tied layers do
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)
    return path


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by their names in a checkpoint (which hold no adapter name).

    Args:
        save_embedding_layers: also save the embedding layers; "auto": if they are targets, or the vocabulary was
            resized.
    """
    tuner: Tuner = (getattr(model, "_orig_mod", model) if unwrap_compiled else model).base_model
    tuner.check_known([adapter_name])
    tensors: dict[str, Tensor] = {}
    for start, part in tuner.parts(adapter_name):
        tensors |= {start + name: tensor for name, tensor in part.saved().items()}
    tensors |= {tuner.key_prefix + path: bias.data for path, bias in tuner.trained_biases(adapter_name).items()}
    if save_embedding_layers == "auto":
        save_embedding_layers = _embeddings_changed(tuner, adapter_name)
    if save_embedding_layers:
        tensors |= {tuner.key_prefix + name: tensor for name, tensor in _embedding_tensors(tuner, adapter_name).items()}
    if state_dict is not None:
        tensors = {key: state_dict.get(key, tensor) for key, tensor in tensors.items()}
    return tensors


def _targets_embedding(tuner: Tuner, adapter_name: str) -> bool:
    config: Any = tuner.peft_config[adapter_name]
    return any(s.name in EMBEDDING_NAMES and is_target(config, s.path) for s in sites(tuner.model))


def _embeddings_changed(tuner: Tuner, adapter_name: str) -> bool:
    config: Any = tuner.peft_config[adapter_name]
    tokens_only = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None
    if not tokens_only and _targets_embedding(tuner, adapter_name):
        return True
    source, model_config = config.base_model_name_or_path, cast(Any, getattr(tuner.model, "config", None))
    if not source or not getattr(model_config, "vocab_size", None):
        return False
    try:
        base = type(model_config).from_pretrained(source, local_files_only=True)
    except Exception:  # no configuration to compare with: the vocabulary counts as unchanged
        return False
    return base.vocab_size != model_config.vocab_size


def _embedding_tensors(tuner: Tuner, adapter_name: str) -> dict[str, Tensor]:
    """Weights of the input and output embedding; where embeddings are targets, only of those that are."""
    targeted = _targets_embedding(tuner, adapter_name)
    embeddings = [input_embedding(tuner.model).module]
    model: Any = tuner.model
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        embeddings.append(output.base_layer if isinstance(output, TunerLayer) else output)
    tensors: dict[str, Tensor] = {}
    for site in sites(tuner.model):
        if any(site.module is layer for layer in embeddings) and (site.wrapper is not None or not targeted):
            path = f"{site.path}.base_layer" if site.wrapper is not None else site.path
            tensors |= {f"{path}.{name}": tensor for name, tensor in site.module.state_dict().items()}
    return tensors


class LoadResult:
    """Keys that the adapter has but the file lacks, and the reverse; as torch's `load_state_dict` answers."""

    def __init__(self, missing_keys: list[str], unexpected_keys: list[str]):
        self.missing_keys, self.unexpected_keys = missing_keys, unexpected_keys


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> LoadResult:
    """Load checkpoint tensors into an adapter of the model.

    Raises:
        CheckpointError: a tensor has another shape than its parameter. Nothing is loaded then.
    """
    places, result = match_slots(model.base_model, peft_model_state_dict, adapter_name)
    for slot, tensor in places:
        fill(slot, tensor)
    return result


def match_slots(
    tuner: Tuner, tensors: dict[str, Tensor], adapter_name: str
) -> tuple[list[tuple[Slot, Tensor]], LoadResult]:
    """The places in the model of checkpoint tensors, with what belongs there, and the keys on either side that have no
    counterpart.

    Besides the adapter's own parameters these are trained biases, saved embeddings, and heads and poolers that a file
    stores under their names in the base model.
    """
    tuner.check_known([adapter_name])
    own: dict[str, Slot] = {}
    values = dict(tensors)
    tied: set[str] = set()
    for start, part in tuner.parts(adapter_name):
        for name, slot in part.slots().items():
            own[start + name] = slot
            if start + name in tensors:
                values[start + name] = part.restored(name, tensors[start + name])
        tied |= {start + name for name in part.saved()}
    known = {tuner.key_prefix + name: slot for name, slot in base_slots(tuner.model).items()} | own
    places = {key: known[key] for key in tensors if key in known}
    for key, (owner, leaf) in places.items():
        here, there = tuple(getattr(owner, leaf).shape), tuple(values[key].shape)
        if here != there:
            raise CheckpointError(
                f"{key} has shape {there} in the file but {here} here: the adapter was made for another base model, "
                "with another configuration, or for resized embeddings; resize those of this model first."
            )
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in known and key not in tied]
    return [(slot, values[key]) for key, slot in places.items()], LoadResult(missing, unexpected)


@torch.no_grad()
def fill(slot: Slot, tensor: Tensor) -> None:
    """Copy a tensor into its place; a parameter on the meta device is replaced."""
    owner, leaf = slot
    place = getattr(owner, leaf)
    if place.is_meta:
        setattr(owner, leaf, nn.Parameter(tensor.clone(), requires_grad=place.requires_grad))
    else:
        place.copy_(tensor)


def base_slots(model: nn.Module) -> dict[str, Slot]:
    """Parameters and buffers of the base model by their paths; those of wrapped layers under `base_layer.`."""
    slots: dict[str, Slot] = {}
    for site in sites(model):
        path = f"{site.path}.base_layer" if site.wrapper is not None else site.path
        slots |= {f"{path}.{name}": (site.module, name) for name, _ in site.module.named_parameters(recurse=False)}
        slots |= {f"{path}.{name}": (site.module, name) for name, _ in site.module.named_buffers(recurse=False)}
    return slots
