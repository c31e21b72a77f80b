"""Adapter files: safetensors with peft's keys, written and read. Pickled checkpoints are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.errors import CheckpointError, MismatchError

from .adapter import Slot
from .hub import locate
from .injected import tuner_of
from .matching import Site, input_embedding, is_target, sites
from .sharded import values_from
from .tuner import Tuner
from .tuner_layer import TunerLayer

WEIGHTS_NAME = "adapter_model.safetensors"
OTHER_BASE = (
    "The adapter was made for another base model, with another configuration, or for resized embeddings; resize those "
    "of this model first."
)
EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # the layers that peft looks for when it saves embeddings by itself


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`, by checkpoint key.

    Args:
        model_id: folder or hub id of the adapter.
        device: where they are read to; default: CPU.
        key_mapping: regular expressions; of those that occur in the base model's path the first is replaced by its
            value.
        hub: `subfolder`, and what `hf_hub_download` takes.

    Raises:
        CheckpointError: the file is missing, pickled or damaged.
    """
    tensors = read_file(locate(model_id, WEIGHTS_NAME, **hub), device or "cpu")
    return {_mapped(key, key_mapping or {}): tensor for key, tensor in tensors.items()}


def _mapped(key: str, key_mapping: dict[str, str]) -> str:
    prefix = next((start for start in ("base_model.model.", "base_model.") if key.startswith(start)), "")
    path = key.removeprefix(prefix)
    names = (re.subn(pattern, value, path) for pattern, value in key_mapping.items())
    return prefix + next((name for name, count in names if count), path)


def read_file(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of one safetensors file. On the CPU they are mapped: memory is taken when their numbers are read, so
    their shapes can be looked at first.

    Raises:
        CheckpointError: it is not one.
    """
    tensors, _ = read_whole(path)
    return tensors if device == "cpu" else {name: tensor.to(device) for name, tensor in tensors.items()}


def read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file, mapped, and what else it says.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise OSError("it is no file")
        with safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def write_weights(tensors: dict[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter_model.safetensors`, so that a crash leaves the old file or the new one, never half of one."""
    path = Path(folder, WEIGHTS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory, as tied layers do
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # through a link it would be written elsewhere
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)
    return path


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by their names in a checkpoint (which hold no adapter name).

    Args:
        state_dict: values to take instead of the model's own, by the names in `model.state_dict()`.
        save_embedding_layers: also save the embedding layers; "auto": if they are targets, or the vocabulary was
            resized.
    """
    tuner = tuner_of(getattr(model, "_orig_mod", model) if unwrap_compiled else model)
    tuner.check_known([adapter_name])
    if state_dict is not None:
        owners = [site.module for site in sites(tuner.model)]
        owners += [owner for _, part in tuner.parts(adapter_name) for owner, _ in part.slots().values()]
        with values_from(state_dict, model, owners):
            return get_peft_model_state_dict(model, None, adapter_name, unwrap_compiled, save_embedding_layers)
    tensors: dict[str, Tensor] = {}
    for start, part in tuner.parts(adapter_name):
        tensors |= {start + name: tensor for name, tensor in part.saved().items()}
    tensors |= {tuner.key_prefix + path: bias.data for path, bias in tuner.trained_biases(adapter_name).items()}
    if save_embedding_layers == "auto":
        save_embedding_layers = _embeddings_changed(tuner, adapter_name)
    if save_embedding_layers and not hasattr(tuner.model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=2
        )
    elif save_embedding_layers:
        tensors |= {tuner.key_prefix + name: tensor for name, tensor in _embedding_tensors(tuner, adapter_name).items()}
    return tensors


def _targets_embedding(tuner: Tuner, adapter_name: str) -> bool:
    config: Any = tuner.peft_config[adapter_name]
    return any(s.name in EMBEDDING_NAMES and is_target(config, s.path) for s in sites(tuner.model))


def _embeddings_changed(tuner: Tuner, adapter_name: str) -> bool:
    config: Any = tuner.peft_config[adapter_name]
    tokens_only = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None) is not None
    if not tokens_only and _targets_embedding(tuner, adapter_name):
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4
        )
        return True
    source, model_config = config.base_model_name_or_path, cast(Any, getattr(tuner.model, "config", None))
    if not source or not getattr(model_config, "vocab_size", None):
        return False
    try:
        base = type(model_config).from_pretrained(source, local_files_only=True)
    except Exception:  # no configuration to compare with: the vocabulary counts as unchanged
        return False
    resized = base.vocab_size != model_config.vocab_size
    if resized:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
            stacklevel=4,
        )
    return resized


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
            tensors |= {f"{base_path(site)}.{name}": tensor for name, tensor in site.module.state_dict().items()}
            tensors |= {f"{site.path}.{name}": tensor for name, tensor in _copy(site, adapter_name).items()}
    return tensors


def _copy(site: Site, adapter_name: str) -> dict[str, Tensor]:
    """What a trained copy of the module holds, under the names that peft gives it besides when it saves embeddings."""
    copies = [] if site.wrapper is None else [a for n, a in site.wrapper.named_adapters().items() if n == adapter_name]
    return {name: tensor for copy in copies if copy.replaces for name, tensor in copy.state_dict().items()}


class LoadResult:
    """Keys that the adapter has but the file lacks, and the reverse; as torch's `load_state_dict` answers."""

    def __init__(self, missing_keys: list[str], unexpected_keys: list[str]):
        self.missing_keys, self.unexpected_keys = missing_keys, unexpected_keys


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Load checkpoint tensors into an adapter of a `PeftModel`, or of a model that the adapter was injected into.

    Args:
        ignore_mismatched_sizes: leave out tensors of another shape than their parameter, with a warning.
        low_cpu_mem_usage: parameters are on the meta device, for which nothing has to be said here.

    Raises:
        MismatchError: a tensor has another shape than its parameter. Nothing is loaded then.
    """
    tuner = tuner_of(model)
    places, result = match_slots(tuner, peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
    fill_all(tuner, adapter_name, places)
    return result


def match_slots(
    tuner: Tuner, tensors: dict[str, Tensor], adapter_name: str, ignore_mismatched_sizes: bool = False
) -> tuple[list[tuple[Slot, Tensor]], LoadResult]:
    """The places in the model of checkpoint tensors, with what belongs there, and the keys on either side that have no
    counterpart.

    Besides the adapter's own parameters these are trained biases, saved embeddings, and heads and poolers that a file
    stores under their names in the base model.
    """
    tuner.check_known([adapter_name])
    if not tuner.key_prefix:  # a file that a PeftModel wrote
        tensors = {key.removeprefix(Tuner.key_prefix): tensor for key, tensor in tensors.items()}
    own: dict[str, Slot] = {}
    values = dict(tensors)
    again: set[str] = set()
    for start, part in tuner.parts(adapter_name):
        for name, slot in part.slots().items():
            own[start + name] = slot
            if start + name in tensors:
                values[start + name] = part.restored(name, tensors[start + name])
        again |= {start + name for name in (*part.saved(), *part.state_dict())}  # the same again
    known = {tuner.key_prefix + name: slot for name, slot in base_slots(tuner.model).items()} | own
    places = {key: known[key] for key in tensors if key in known}
    shapes = {key: (tuple(values[key].shape), tuple(getattr(*slot).shape)) for key, slot in places.items()}
    mismatched = {key: f"{there} in the file, {here} here" for key, (there, here) in shapes.items() if there != here}
    check_kinds({key: (values[key], getattr(*slot)) for key, slot in places.items()})
    said = "".join(f"\n- size mismatch for {key}: {sizes}" for key, sizes in mismatched.items())
    if mismatched and not ignore_mismatched_sizes:
        raise MismatchError(OTHER_BASE + said)
    if mismatched:
        warnings.warn(f"Left out, since `ignore_mismatched_sizes=True`:{said}", stacklevel=3)
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in known and key not in again]
    return [(slot, values[key]) for key, slot in places.items() if key not in mismatched], LoadResult(
        missing, unexpected
    )


def check_kinds(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse numbers of another kind than what they are for, by key: whole or complex ones where fractions belong.

    Raises:
        MismatchError: there are some.
    """
    for key, (value, place) in pairs.items():
        if place.is_floating_point() and (not value.is_floating_point() or value.dtype == torch.float4_e2m1fn_x2):
            raise MismatchError(f"{key} is of {value.dtype} in the file, of {place.dtype} here.")


def fill_all(tuner: Tuner, adapter_name: str, places: list[tuple[Slot, Tensor]]) -> None:
    """Copy an adapter's tensors into their places, and what was on the meta device to where its layers are."""
    for slot, tensor in places:
        fill(slot, tensor)
    for _, layer in tuner.adapted_layers():
        layer.bring(adapter_name)


@torch.no_grad()
def fill(slot: Slot, tensor: Tensor) -> None:
    """Copy a tensor into its place; a parameter on the meta device is replaced."""
    owner, leaf = slot
    place = getattr(owner, leaf)
    if place.is_meta:
        setattr(owner, leaf, nn.Parameter(tensor.to(place.dtype, copy=True), requires_grad=place.requires_grad))
    else:
        place.copy_(tensor)


def base_path(site: Site) -> str:
    """What the names of a module of the base model start with in a checkpoint: they say whether it is wrapped."""
    return site.path if site.wrapper is None else f"{site.path}.{site.wrapper.base_name}"


def base_slots(model: nn.Module) -> dict[str, Slot]:
    """Parameters and buffers of the base model by their names in a checkpoint; see `base_path`."""
    slots: dict[str, Slot] = {}
    for site in sites(model):
        path = base_path(site)
        slots |= {f"{path}.{name}": (site.module, name) for name, _ in site.module.named_parameters(recurse=False)}
        slots |= {f"{path}.{name}": (site.module, name) for name, _ in site.module.named_buffers(recurse=False)}
    return slots
