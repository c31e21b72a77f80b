"""A base with one adapter on it: put on, taken off, and saved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyarrow.parquet import write_table
from torch import Tensor, nn

from workbench.adapters import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from workbench.adapters.checkpoint import base_path, base_slots, write_weights
from workbench.adapters.config import CONFIG_NAME
from workbench.adapters.matching import sites
from workbench.adapters.methods.modules_to_save import ModulesToSave
from workbench.adapters.quantised import size

from .base import Base
from .data import Split
from .examples import table
from .loop import Measured

ADAPTER, PREDICTIONS = "adapter", "predictions"  # folders of a trial's results
KINDS = {torch.bfloat16: "BF", torch.int32: "I", torch.int64: "I", torch.uint8: "U"}  # safetensors' names; else floats


def new_adapter(base: Base, config: PeftConfig, seed: int, new_head: bool = False) -> PeftModel:
    """The base model with a new adapter, drawn from the seed.

    Args:
        new_head: draw anew what trains of the weights that were drawn with the base, such as a task head; else all
            trials begin with the same.
    """
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base.model, config)
        if new_head:
            for path, layer in model.base_model.adapted_layers():
                for adapter in layer.named_adapters().values():
                    if isinstance(adapter, ModulesToSave):
                        redraw(base, path, adapter.modules_to_save)
    except BaseException:  # memory may run out when some layers are wrapped already
        strip(base)
        raise
    return model


def strip(base: Base) -> None:
    """Take off the wrappers of an adapter that was not finished."""
    for site in sites(base.model):
        if site.wrapper is not None:
            site.wrapper.restore()
            setattr(site.parent, site.name, site.wrapper.base_layer)
    base.model.requires_grad_(False)


def redraw(base: Base, path: str, module: nn.Module) -> None:
    """Draw the weights of a copy of a module anew that the base's own files lack."""
    for name, part in module.named_modules(prefix=path):
        drawn = [p for leaf, p in part.named_parameters(recurse=False) if f"{name}.{leaf}" in base.fresh]
        for parameter in drawn:
            parameter._is_hf_initialized = False  # else it would be left as it is
        if drawn:
            base.model._init_weights(part)


@contextmanager
def adapted(base: Base, config: PeftConfig, seed: int, new_head: bool = False) -> Iterator[PeftModel]:
    """The same, and the plain base again afterwards."""
    with torch.random.fork_rng():
        model = new_adapter(base, config, seed, new_head)
    try:
        yield model
    finally:
        model.delete_adapter(list(model.peft_config))
        base.model.requires_grad_(False)


def count(model: PeftModel) -> tuple[int, int]:
    """The numbers that train, and all of the model as it runs: where a copy of a module runs, its original does not."""
    layers = [layer for _, layer in model.base_model.adapted_layers()]
    replaced = [layer.base_layer for layer in layers if any(a.replaces for a in layer.named_adapters().values())]
    idle = {id(module) for original in replaced for module in original.modules()}
    running = {id(p): p for m in model.modules() if id(m) not in idle for p in m.parameters(recurse=False)}
    sizes = [(size(p), p.requires_grad) for p in running.values()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def save_adapter(model: PeftModel, base: Base, folder: Path) -> int:
    """Write the adapter, and with it the weights that were drawn from the seed since the base's own files lack them,
    such as a pooler: whoever puts the adapter on the base gets the model that was measured.

    Returns:
        the size of the adapter's files in bytes.
    """
    model.save_pretrained(folder, save_embedding_layers=False)
    if base.fresh:
        write_weights(adapter_tensors(model, base), folder)
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))


def save_results(model: PeftModel, base: Base, split: Split, measured: Measured, folder: Path) -> int:
    """Write what a trial comes to: `adapter/` (`save_adapter`) and `predictions/validation.parquet` (`examples.table`).

    Returns:
        the size of the adapter's files in bytes.
    """
    (folder / PREDICTIONS).mkdir(parents=True, exist_ok=True)
    write_table(table(base, split, measured), folder / PREDICTIONS / "validation.parquet")
    return save_adapter(model, base, folder / ADAPTER)


def adapter_tensors(model: PeftModel, base: Base) -> dict[str, Tensor]:
    """What `save_adapter` writes."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    paths, prefix = {s.path: base_path(s) for s in sites(model.get_base_model())}, model.base_model.key_prefix
    own = base_slots(model.get_base_model())
    for name in base.fresh:
        path, _, leaf = name.rpartition(".")
        key = f"{paths[path]}.{leaf}"
        if prefix + name not in tensors:  # the adapter has trained a copy of its own
            tensors[prefix + key] = getattr(*own[key]).detach()
    return tensors


def adapter_size(model: PeftModel, base: Base) -> int:
    """The size in bytes of the files that `save_adapter` would write; also of tensors without data."""
    with tempfile.TemporaryDirectory() as folder:
        model.saved_config("default").save_pretrained(folder)
        config = Path(folder, CONFIG_NAME).stat().st_size
    return config + safetensors_size(adapter_tensors(model, base))


def safetensors_size(tensors: Mapping[str, Tensor]) -> int:
    """The size in bytes of a safetensors file of these: 8 for the length of the header, the header, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": f"{KINDS.get(tensor.dtype, 'F')}{8 * tensor.element_size()}",
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end
