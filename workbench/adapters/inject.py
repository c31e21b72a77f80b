"""Finding the layers that a configuration means, and putting adapters on them: first everything is matched and built,
then the model is changed, so a refused configuration leaves nothing behind."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.errors import ConfigError, TargetError

from . import base_ops
from .adapter import Adapter
from .config import PeftConfig, TaskType, name_set, pattern_value
from .methods.modules_to_save import ModulesToSave
from .methods.trainable_tokens import TiedTokens, TrainableTokens, TrainableTokensConfig, check_indices
from .registry import Method, by_peft_type
from .tuner_layer import AdapterState, TunerLayer
from .virtual_tokens import PromptLearningConfig

HEADS = ("classifier", "score")  # how transformers names the heads of classification models
ALL_LINEAR = "all-linear"


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
    """Every module of the base model, each under every path that leads to it, looking through wrappers."""

    def walk(parent: nn.Module, prefix: str) -> Iterator[Site]:
        for name, child in parent.named_children():
            bare = child.base_layer if isinstance(child, TunerLayer) else child
            site = Site(f"{prefix}{name}", parent, name, bare)
            yield site
            yield from walk(bare, f"{site.path}.")

    return walk(model, "")


def named(path: str, names: Any) -> bool:
    """Whether a path is meant by names: one regular expression for whole paths, or exact names and suffixes."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def layer_index(path: str, patterns: list[str] | str | None) -> int | None:
    """The number of the transformer layer that a module lies in; the first number counts, not that of an expert."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]*"]:
        prefix = r"(?:^|.*?\.)" if patterns else r".*?\."
        match = re.match(rf"{prefix}{pattern}\.(\d+)\.", path)
        if match:
            return int(match[1])
    return None


def is_target(config: Any, path: str) -> bool:
    """Whether the configuration names this module as a target and does not exclude it."""
    if getattr(config, "target_modules", None) is None:
        return False
    if getattr(config, "exclude_modules", None) and named(path, config.exclude_modules):
        return False
    saved = getattr(config, "modules_to_save", None) or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
        return False
    if not named(path, config.target_modules):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == [] or path in config.target_modules:
        return True
    return layer_index(path, config.layers_pattern) in ([wanted] if isinstance(wanted, int) else wanted)


def choose(config: Any, everything: list[Site]) -> list[Site]:
    """The modules that the configuration names as targets, or chooses by a rule of its own."""
    if hasattr(config, "choose"):
        return config.choose(everything)
    return [site for site in everything if is_target(config, site.path)]


def all_linear(model: nn.Module, task_type: str | None) -> set[str]:
    """Paths of all linear layers but the output layer, or the head of a classification model."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(output, TunerLayer):
        output = output.base_layer
    heads = (
        {head for head in HEADS if hasattr(model, head)} if output is None and task_type == TaskType.SEQ_CLS else set()
    )
    return {
        site.path
        for site in sites(model)
        if isinstance(site.module, (nn.Linear, Conv1D)) and site.module is not output and site.path not in heads
    }


def fill_defaults(config: Any, method: Method, model: nn.Module) -> None:
    """Set what the configuration leaves to the architecture: target modules, their defaults, and "all-linear"; sizes of
    a prompt."""
    if isinstance(config, PromptLearningConfig):
        config.fill_sizes(getattr(model, "config", None))
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = getattr(config, "target_modules", None)
    if isinstance(config, TrainableTokensConfig):
        if targets is None:
            config.target_modules = input_embedding(model).path
    elif targets is None:
        if model_type not in method.targets and getattr(config, "target_parameters", None):
            return
        if model_type not in method.targets:
            raise TargetError(
                "Please specify `target_modules` in `peft_config`: there is no default for "
                f"{model_type or type(model).__name__}. The model has {suggestions(model, method)}.",
                "target_modules",
            )
        config.target_modules = name_set(method.targets[model_type], "target_modules")
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config.target_modules = all_linear(model, config.task_type)
    if hasattr(config, "fill_defaults"):
        config.fill_defaults(model_type)


def input_embedding(model: Any) -> Site:
    """Where the model's input embedding lies."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if isinstance(embedding, TunerLayer):
        embedding = embedding.base_layer
    for site in sites(model):
        if site.module is embedding or (embedding is None and site.name == "embed_tokens"):
            return site
    raise TargetError(
        "The model has no input embedding that can be found; name it in `target_modules`.", "target_modules"
    )


def tied_layers(model: nn.Module, embedding: base_ops.Layer) -> list[Site]:
    """The other layers that share the weight of an embedding, in models that declare them tied."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not (getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)):
        return []
    return [
        site
        for site in sites(model)
        if isinstance(site.module, (nn.Linear, nn.Embedding))
        and site.module.weight is embedding.weight
        and site.module is not embedding
    ]


def suggestions(model: nn.Module, method: Method) -> str:
    """Names that would match, for an error message."""
    names = {
        site.name for site in sites(model) if base_ops.kind_of(site.module) in method.kinds and not site.name.isdigit()
    }
    return ", ".join(sorted(names)[:20]) or "no layer that this method can adapt"


def plan(model: nn.Module, config: Any) -> list[tuple[Site, str]]:
    """The modules that a configuration means, each with what is put there: "target", "parameters", "tokens" or
    "save".

    Fills in the configuration's architecture defaults. Changes nothing in the model.

    Raises:
        TargetError: nothing matches, or a match is of a kind that the method cannot adapt.
        ConfigError: a default is missing, or one module is meant twice.
    """
    method = by_peft_type(config.peft_type)
    fill_defaults(config, method, model)
    everything = list(sites(model))
    targets = choose(config, everything)
    for site in targets:
        if base_ops.kind_of(site.module) not in method.kinds:
            raise TargetError(
                f"Target module {site.path} is a {type(site.module).__name__}, which {method.title} is not "
                f"supported on "
                f"(it adapts {', '.join(sorted(method.kinds))}). The model has {suggestions(model, method)}.",
                "target_modules",
            )
    of_parameters = [site for site in everything if parameter_names(site, config)]
    check_parameters(model, config, targets, of_parameters)
    if not targets and not of_parameters and method.kinds:
        raise TargetError(
            f"Target modules {config.target_modules} not found in the base model"
            f"{_narrowed(config)}. The model has {suggestions(model, method)}.",
            "target_modules",
        )
    found = [(site, "target") for site in unique(targets)]
    found += [(site, "parameters") for site in unique(of_parameters)]
    taken = {id(site.module) for site, _ in found}

    for name in token_targets(model, config):
        matched = [s for s in everything if s.path.endswith(name) and base_ops.kind_of(s.module) in TOKEN_KINDS]
        if not matched:
            raise TargetError(
                f"Target modules {name!r} of trainable_token_indices not found in the base model.",
                "trainable_token_indices",
            )
        if any(id(s.module) in taken for s in matched):
            raise ConfigError(
                f"{name} is meant by `target_modules` and by `trainable_token_indices`; adapt it in one way only.",
                "trainable_token_indices",
            )
        found += [(site, "tokens") for site in unique(matched)]
        taken |= {id(s.module) for s in matched}

    saved = getattr(config, "modules_to_save", None) or ()
    for site in unique([s for s in everything if any(s.path.endswith(suffix) for suffix in saved)]):
        if id(site.module) in taken:
            raise ConfigError(
                f"{site.path} is in `modules_to_save` and adapted as well; choose one.", "modules_to_save"
            )
        found.append((site, "save"))
    return found


def parameter_names(site: Site, config: Any) -> list[str]:
    """The module's own parameters that `target_parameters` means, in the module's order."""
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return []
    own = [*dict(site.module.named_parameters(recurse=False)), *getattr(site.module, "parametrizations", ())]
    return [name for name in own if named(f"{site.path}.{name}", wanted)]


def check_parameters(model: nn.Module, config: Any, targets: list[Site], of_parameters: list[Site]) -> None:
    """Refuse target parameters that cannot be adapted; warn if some of the configuration's targets match nothing."""
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return
    for name, _ in model.named_parameters(recurse=False):
        if name in wanted:
            raise TargetError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{name}'): wrap the "
                "model in another module.",
                "target_parameters",
            )
    for site in of_parameters:
        if any(site.module is target.module for target in targets):
            raise TargetError(
                f"Trying to wrap an `nn.Parameter` of layer '{site.path}' of type {type(site.module).__name__}, which "
                "is not a valid target. Make sure that this layer is not also targeted with `target_modules`.",
                "target_parameters",
            )
    if not targets and not of_parameters and not config.target_modules:
        raise TargetError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments.",
            "target_parameters",
        )
    if config.target_modules and not targets and of_parameters:
        warnings.warn(
            f"target_modules={config.target_modules} were set but no module was matched.", RuntimeWarning, stacklevel=2
        )
    if targets and not of_parameters:
        warnings.warn(
            f"target_parameters={wanted} were set but no parameter was matched.", RuntimeWarning, stacklevel=2
        )


TOKEN_KINDS = {base_ops.EMBEDDING, base_ops.LINEAR}


def _narrowed(config: Any) -> str:
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    used = [f"{name}={getattr(config, name)!r}" for name in limits if getattr(config, name, None)]
    return f" (with {', '.join(used)})" if used else ""


def unique(found: list[Site]) -> list[Site]:
    """The first site of each module."""
    return list({id(site.module): site for site in reversed(found)}.values())[::-1]


def token_targets(model: nn.Module, config: PeftConfig) -> dict[str, list[int]]:
    """`trainable_token_indices` as a dict from module name to ids."""
    indices = getattr(config, "trainable_token_indices", None)
    if indices is None:
        return {}
    targets = indices if isinstance(indices, dict) else {input_embedding(model).path: indices}
    for ids in targets.values():
        check_indices(ids, "trainable_token_indices")
    return targets


def build(model: nn.Module, config: PeftConfig, low_cpu_mem_usage: bool = False) -> list[tuple[Site, Adapter]]:
    """Plan, and make every adapter, without touching the model.

    Raises:
        AdapterError: as `plan`, or a method refuses a layer.
    """
    method = by_peft_type(config.peft_type)
    tokens = token_targets(model, config)
    made: list[tuple[Site, Adapter]] = []
    with torch.device("meta") if low_cpu_mem_usage else nullcontext():
        for site, role in plan(model, config):
            if role == "save":
                made.append((site, ModulesToSave(site.module)))
                continue
            if role == "parameters":
                if method.parameters is None:
                    raise ConfigError(f"{method.title} cannot adapt parameters.", "target_parameters")
                adapter = method.parameters(site.module, parameter_names(site, config), config, site.path)
            elif role == "target":
                adapter = cast(Any, method.adapter)(site.module, config, site.path)
            else:
                indices = next(ids for name, ids in tokens.items() if site.path.endswith(name))
                adapter = TrainableTokens(site.module, TrainableTokensConfig(token_indices=indices), site.path)
                adapter.prefix = "token_adapter."
            made.append((site, adapter))
    check_patterns(config, [site.path for site, _ in made])
    for site, adapter in list(made):
        if isinstance(adapter, TrainableTokens) and isinstance(site.module, nn.Embedding):
            tied = [
                s for s in tied_layers(model, site.module) if not any(s.module is other.module for other, _ in made)
            ]
            made += [(s, TiedTokens(adapter, s.module)) for s in tied]
    with torch.device("meta") if low_cpu_mem_usage else nullcontext():
        return tie(model, config, made)


def check_patterns(config: Any, paths: list[str]) -> None:
    """Warn of `rank_pattern` and `alpha_pattern` keys that name nothing that is adapted."""
    names = paths + [
        f"{path}.{name.rpartition('.')[2]}"
        for path in paths
        for name in getattr(config, "target_parameters", None) or ()
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None) or {}
        # AdaLoRA's patterns name tensors, and what is kept of each
        keys = [key for key, value in patterns.items() if not isinstance(value, list)]
        unmatched = [key for key in keys if all(pattern_value({key: True}, name, None) is None for name in names)]
        if unmatched:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unmatched)}.",
                RuntimeWarning,
                stacklevel=2,
            )


def tie(model: nn.Module, config: Any, made: list[tuple[Site, Adapter]]) -> list[tuple[Site, Adapter]]:
    """Let the layers that share the input embedding's weight share its adapter, or its trained copy, where one of them
    has one and `ensure_weight_tying` asks for it."""
    method, asked = by_peft_type(config.peft_type), getattr(config, "ensure_weight_tying", None)
    group = tied_group(model)
    mine = {id(s.module): (s, a) for s, a in made if any(s.module is member.module for member in group)}
    adapters = [adapter for _, adapter in mine.values()]
    if any(isinstance(adapter, (TrainableTokens, TiedTokens)) for adapter in adapters):
        return made
    if not asked:
        if mine:
            reason = (
                "no implementation exists to tie the adapters"
                if asked is None
                else "`ensure_weight_tying` is not set to True"
            )
            paths = ", ".join(site.path for site, _ in mine.values())
            warnings.warn(f"{paths} shares its weight with other layers, but {reason}: they part ways.", stacklevel=2)
        return made
    if not mine:
        where = "added in either `modules_to_save` or `target_modules`" if group else "were found in the model"
        kind = "no tied modules are" if group else "no tied modules"
        warnings.warn(f"You have requested `ensure_weight_tying`, but {kind} {where}.", stacklevel=2)
        return made
    first, *others = group
    source: Any = mine[id(first.module)][1] if id(first.module) in mine else None
    tied: list[tuple[Site, Adapter]] = []
    if any(isinstance(adapter, ModulesToSave) for adapter in adapters):
        source = source or ModulesToSave(first.module)
        for site in others:
            copied = ModulesToSave(site.module)
            copied.modules_to_save.weight = source.modules_to_save.weight
            tied.append((site, copied))
    else:
        source = source or cast(Any, method.adapter)(first.module, config, first.path)
        tied = [(site, cast(Any, method.tied)(source, site.module)) for site in others]
    return [*(pair for pair in made if id(pair[0].module) not in mine), (first, source), *tied]


def tied_group(model: nn.Module) -> list[Site]:
    """The input embedding and the layers that share its weight; none where there are no others."""
    try:
        embedding = input_embedding(model)
    except TargetError:
        return []
    tied = unique(tied_layers(model, embedding.module))
    return [embedding, *tied] if tied else []


def inject(model: nn.Module, state: AdapterState, name: str, made: list[tuple[Site, Adapter]]) -> None:
    """Put built adapters on the model, wrapping layers that have no wrapper yet."""
    for site, adapter in made:
        wrapper = site.wrapper
        if wrapper is None:
            wrapper = TunerLayer(site.module, state)
            wrapper.train(site.module.training)
            setattr(site.parent, site.name, wrapper)
        wrapper.add(name, adapter)
