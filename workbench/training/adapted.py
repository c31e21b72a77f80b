"""A base with one adapter on it: put on, taken off, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from workbench.adapters import PeftConfig, PeftModel, get_peft_model
from workbench.adapters.checkpoint import base_path, base_slots, load_peft_weights, write_weights
from workbench.adapters.matching import sites

from .base import Base


@contextmanager
def adapted(base: Base, config: PeftConfig, seed: int) -> Iterator[PeftModel]:
    """The base model with a new adapter, drawn from the seed, and the plain base again afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.delete_adapter(list(model.peft_config))
        base.model.requires_grad_(False)


def save_adapter(model: PeftModel, base: Base, folder: Path) -> int:
    """Write the adapter, and with it the weights that were drawn from the seed since the base's own files lack them,
    such as a pooler: whoever puts the adapter on the base gets the model that was measured.

    Returns:
        the size of the adapter's files in bytes.
    """
    model.save_pretrained(folder, save_embedding_layers=False)
    paths, prefix = {s.path: base_path(s) for s in sites(model.get_base_model())}, model.base_model.key_prefix
    tensors = load_peft_weights(folder)
    own = base_slots(model.get_base_model())
    for name in base.fresh:
        path, _, leaf = name.rpartition(".")
        key = f"{paths[path]}.{leaf}"
        if prefix + name not in tensors:  # the adapter has trained a copy of its own
            tensors[prefix + key] = getattr(*own[key]).detach().cpu()
    write_weights(tensors, folder)
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))
