"""Whether a saved adapter fits a model, found out before it takes memory: the adapter of its configuration is made
without values, and its shapes are held against those that the file names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import AdapterError, CheckpointError, ConfigError, MismatchError

from .adapter import Part
from .checkpoint import OTHER_BASE
from .config import PeftConfig
from .empty import init_empty_weights
from .inject import build, fill_defaults
from .matching import embedding_of
from .registry import by_peft_type
from .tuner import Tuner


def check_fits(model: nn.Module, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse files that do not belong together, or not to this model. The model is not changed.

    Args:
        tensors: the file's, by checkpoint key; only their shapes are looked at.

    Raises:
        CheckpointError: the file lacks tensors of the adapter, or some are of another shape.
        ConfigError: no adapter can be made from the configuration.
    """
    if getattr(config, "layer_replication", None):  # what it is for is not there before the model is rebuilt
        return
    missing, mismatched = [], ""
    for start, part in empty_parts(model, config):
        for name, slot in part.slots().items():
            key, here = start + name, tuple(getattr(*slot).shape)
            if key not in tensors:
                missing.append(key)
            elif (there := tuple(part.restored(name, tensors[key].to("meta")).shape)) != here:
                mismatched += f"\n- size mismatch for {key}: {there} in the file, {here} here"
    if mismatched:
        raise MismatchError(OTHER_BASE + mismatched)
    if missing:
        raise CheckpointError(
            f"The file lacks {len(missing)} of the adapter's tensors, e.g. {missing[0]}; it was made for another base "
            "model, or its configuration was changed."
        )


def empty_parts(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, Part]]:
    """What an adapter of this configuration will hold, without values and without copies of the model's own modules,
    each with what its keys in a checkpoint start with.

    Raises:
        AdapterError: as `inject.build`; whatever else a method raises of a wrong value is a ConfigError.
    """
    plain: Any = copy.deepcopy(config)
    plain.inference_mode = True  # a file will bring the values
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = True
    if getattr(plain, "modules_to_save", None):
        plain.modules_to_save = None
    method = by_peft_type(plain.peft_type)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # they are given when the adapter is made in earnest
            if method.encoder is not None:
                fill_defaults(plain, method, model)
                with init_empty_weights():
                    yield "", method.encoder(plain, embedding_of(model))
            for site, adapter in build(model, plain, low_cpu_mem_usage=True) if method.kinds else ():
                yield f"{Tuner.key_prefix}{site.path}.", adapter
    except AdapterError:
        raise
    except Exception as error:
        raise ConfigError(
            f"No {method.title} adapter can be made from this configuration: {type(error).__name__}: {error}"
        ) from error
