"""Which modules of a model names mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, cast

from torch import nn

from workbench.errors import ConfigError, NoMatchingPeftModuleError

from . import base_ops
from .sharded import WRAPPERS
from .tuner_layer import TunerLayer

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


@dataclass(frozen=True)
class Site:
    """A module of the base model: its path without wrappers, what holds it, and itself (bare, without wrapper)."""

    path: str
    parent: nn.Module
    name: str
    module: base_ops.Layer

    @property
    def wrapper(self) -> TunerLayer | None:
        """The wrapper that stands there already, if any."""
        held = getattr(self.parent, self.name)
        return held if isinstance(held, TunerLayer) else None


def sites(model: nn.Module) -> Iterator[Site]:
    """Every module of the base model, each under every path that leads to it, looking through wrappers, torch's too."""

    def walk(parent: nn.Module, prefix: str) -> Iterator[Site]:
        for name, child in parent.named_children():
            if name in WRAPPERS:
                yield from walk(child, prefix)
                continue
            bare = child.base_layer if isinstance(child, TunerLayer) else child
            site = Site(f"{prefix}{name}", parent, name, bare)
            yield site
            yield from walk(bare, f"{site.path}.")

    return walk(model, "")


def submodule(model: nn.Module, path: str) -> tuple[nn.Module, nn.Module, str]:
    """What holds a module of this path, the module, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(path), name


def named(path: str, names: Any) -> bool:
    """Whether a path is meant by names: one regular expression for whole paths, or exact names and suffixes."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def layer_index(path: str, patterns: list[str] | str | None) -> int | None:
    """The number of the transformer layer that a module lies in; the first number counts, not that of an expert."""
    patterns = [patterns] if patterns and isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]*"]:
        prefix = r"(?:^|.*?\.)" if patterns else r".*?\."
        match = re.match(rf"{prefix}{pattern}\.(\d+)\.", path)
        if match:
            return int(match[1])
    return None


def is_excluded(config: Any, path: str) -> bool:
    """Whether the configuration keeps adapters off this module: it excludes it, or trains it as a whole."""
    if getattr(config, "exclude_modules", None) and named(path, config.exclude_modules):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved)


def is_target(config: Any, path: str) -> bool:
    """Whether the configuration names this module as a target and does not keep adapters off it."""
    if getattr(config, "target_modules", None) is None:
        return False
    if is_excluded(config, path) or not named(path, config.target_modules):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == [] or path in config.target_modules:
        return True
    return layer_index(path, config.layers_pattern) in ([wanted] if isinstance(wanted, int) else wanted)


def minimal_names(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """A few suffixes that mean the targets and none of the other modules.

    Raises:
        ConfigError: no targets, one without a name, or a module is on both sides.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ConfigError("target_modules should be a list or set of strings.", "target_modules")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise ConfigError("target_modules should not contain an empty string.", "target_modules")
    if targets & others:
        raise ConfigError(
            f"target_modules and other_module_names contain common elements: {sorted(targets & others)}.",
            "target_modules",
        )
    taken = {suffix for path in others for suffix in suffixes(path)}
    chosen: set[str] = set()
    for path in sorted(targets, key=suffixes):
        if not named(path, chosen):
            chosen |= set([suffix for suffix in suffixes(path) if suffix not in taken][:1])
    return chosen


def suffixes(path: str) -> list[str]:
    """What a path ends with, from its last name to all of it."""
    names = path.split(".")
    return [".".join(names[start:]) for start in reversed(range(len(names)))]


def get_model_config(model: Any) -> dict[str, Any]:
    """A model's configuration as a dict, whatever it is kept as; that of a custom model where it has none."""
    config = getattr(model, "config", DUMMY_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return asdict(cast(Any, config)) if is_dataclass(config) else config


def embedding_of(model: Any) -> Any:
    """The input embedding, if the model says which one that is."""
    try:
        return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # how transformers says that the input is no text
        return None


def input_embedding(model: Any) -> Site:
    """Where the model's input embedding lies."""
    embedding = embedding_of(model)
    if isinstance(embedding, TunerLayer):
        embedding = embedding.base_layer
    for site in sites(model):
        if site.module is embedding or (embedding is None and site.name == "embed_tokens"):
            return site
    raise NoMatchingPeftModuleError(
        "Target modules embed_tokens not found in the base model. It does not say which module its input embedding is; "
        "name that in `target_modules`.",
        "target_modules",
    )


def unique(found: Iterable[Site]) -> list[Site]:
    """The first site of each module."""
    first: dict[int, Site] = {}
    for site in found:
        first.setdefault(id(site.module), site)
    return list(first.values())
