"""Which modules an adapter acts on, from the names and shapes of its tensors alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

# what the names of adapters' parameters start with, by method (workbench/adapters/registry.py), or of those within them
OWN = re.compile(r"^(lora_|hada_|lokr_|ia3_|trainable_tokens_|token_adapter$|adaption_)")
VIRTUAL = re.compile(r"^(prompt_|prefix_)")
COLUMNS = ["module", "kind", "layer", "part", "tensors", "parameters"]


def layers(header: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a module of the base model that the file has tensors of.

    Columns: module (its path), kind (the path within its layer, such as `attention.self.query`), layer (its number;
    missing outside of the numbered layers), part ("adapter", "virtual tokens", or "whole weights" where the module
    itself was trained, such as the task's head), tensors (names and shapes), parameters.

    Args:
        header: `dtype` and `shape` by key, as `artifacts.header` returns it.
    """
    modules: dict[tuple[str, str], dict[str, list[int]]] = {}
    for key, tensor in header.items():
        module, part, name = _split(key)
        modules.setdefault((module, part), {})[name] = tensor["shape"]
    rows = []
    for (module, part), tensors in modules.items():
        kind, layer = _place(module)
        spelt = ", ".join(f"{name} {shape(sizes)}" for name, sizes in sorted(tensors.items()))
        parameters = sum(math.prod(sizes) for sizes in tensors.values())
        rows.append((module, kind, layer, part, spelt, parameters))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"layer": "Int64"})


def by_kind(modules: pd.DataFrame) -> pd.DataFrame:
    """One row for all modules that are alike in kind and shapes, the adapter first.

    Columns: kind, part, layers (such as "0-3, 7"; "" outside of layers), modules (how many), tensors, each (parameters
    of one of them), parameters (of all).
    """
    groups = modules.groupby(["part", "kind", "tensors"], sort=False)
    rows = [
        {
            "kind": kind,
            "part": part,
            "layers": spans(own["layer"].dropna().astype("int64").tolist()),
            "modules": len(own),
            "tensors": tensors,
            "each": int(own["parameters"].iloc[0]),
            "parameters": int(own["parameters"].sum()),
        }
        for (part, kind, tensors), own in groups
    ]
    columns = ["kind", "part", "layers", "modules", "tensors", "each", "parameters"]
    return pd.DataFrame(rows, columns=columns).sort_values(["part", "kind", "layers"], ignore_index=True)


def shape(sizes: list[int]) -> str:
    """Such as "8x384"."""
    return "x".join(map(str, sizes)) or "1"


def spans(numbers: list[int]) -> str:
    """Such as "0-3, 7"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found)


def _split(key: str) -> tuple[str, str, str]:
    """Module, part and the tensor's own name of a checkpoint key."""
    path = key.removeprefix("base_model.").removeprefix("model.").split(".")
    for place, name in enumerate(path):
        if OWN.match(name):
            own = [part for part in path[place:] if part != "weight"]
            return ".".join(path[:place]) or name, "adapter", ".".join(own)
    if VIRTUAL.match(path[0]):
        return "virtual tokens", "virtual tokens", ".".join(path)
    return ".".join(path[:-1]) or path[0], "whole weights", path[-1]


def _place(module: str) -> tuple[str, int | None]:
    """Kind and number of the layer: the last number in the path is that of an expert or the like if there are several,
    the first one counts layers."""
    path = module.split(".")
    for place, name in enumerate(path):
        if name.isdigit():
            return ".".join(path[place + 1 :]) or path[place - 1], int(name)
    return module, None
