"""Finding the layers that a configuration means, and putting adapters on them: first everything is matched and built,
then the model is changed, so a refused configuration leaves nothing behind."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workbench.errors import ConfigError, NoMatchingPeftModuleError, TargetError

from . import base_ops, defaults
from .adapter import Adapter
from .config import PeftConfig, TaskType, name_set, pattern_value
from .empty import init_empty_weights
from .experts import layers_of_parameters, target_stacked
from .matching import (
    Site,
    get_model_config,
    input_embedding,
    is_excluded,
    is_target,
    minimal_names,
    named,
    sites,
    unique,
)
from .methods.modules_to_save import ModulesToSave
from .methods.trainable_tokens import TrainableTokens, TrainableTokensConfig, check_indices
from .registry import Method, by_peft_type
from .tuner_layer import AdapterState, TunerLayer
from .tying import tie, tie_tokens, tied_group
from .virtual_tokens import PromptLearningConfig

HEADS = ("classifier", "score")  # how transformers names the heads of classification models
ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter on no layer: the head or `modules_to_save` alone train
LONG_LIST = 20  # from so many target modules on, a shorter list is looked for


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
    outputs = {id(output), *(id(site.module) for site in tied_group(model))}
    return {
        site.path
        for site in sites(model)
        if isinstance(site.module, (nn.Linear, Conv1D)) and id(site.module) not in outputs and site.path not in heads
    }


def include_all_linear(config: Any, model: nn.Module) -> Any:
    """The configuration, with the paths of all linear layers in place of "all-linear"."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config.target_modules = all_linear(model, config.task_type)
    return config


def fill_defaults(config: Any, method: Method, model: nn.Module) -> None:
    """Set what the configuration leaves to the architecture: target modules, their defaults, and "all-linear"; sizes of
    a prompt."""
    if isinstance(config, PromptLearningConfig):
        config.fill_sizes(getattr(model, "config", None))
        return
    model_type = get_model_config(model).get("model_type")
    stacked = layers_of_parameters(model) if method.parameters is not None else {}
    names = target_names(model, config, stacked) if stacked and config.target_modules else set()
    if names:
        target_stacked(config, names, stacked)
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
                f"{type(model).__name__}. The model has {suggestions(model, method)}.",
                "target_modules",
            )
        config.target_modules = name_set(method.targets[model_type], "target_modules")
    include_all_linear(config, model)
    if hasattr(config, "fill_defaults"):
        config.fill_defaults(model_type)


def target_names(model: nn.Module, config: Any, stacked: dict[str, tuple[str, ...]]) -> set[str]:
    """The last names of the modules that a configuration targets, among them layers that became parameters
    (`experts`)."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return targets
    if targets.lower() == ALL_LINEAR:
        paths = all_linear(model, config.task_type).union(*stacked.values())
    else:
        paths = set()
        for site in sites(model):
            own = [name for name, _ in site.module.named_parameters(recurse=False)]
            layers = [name for parameter in own for name in stacked.get(parameter, ())]
            paths |= {site.path, *(f"{site.path}.{name}" for name in own + layers)}
        paths = {path for path in paths if is_target(config, path)}
    return {path.rpartition(".")[2] for path in paths}


def suggestions(model: nn.Module, method: Method) -> str:
    """Names that would match, for an error message."""
    found = {site.name for site in sites(model) if base_ops.kind_of(site.module) in method.kinds}
    names = {name for name in found if not name.isdigit()} or found
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
    shorten(config, everything)
    targets = choose(config, everything)
    if get_model_config(model).get("model_type") in defaults.MAMBA_MODELS:
        check_mamba(targets, config)
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
    on_nothing = getattr(config, "target_modules", None) == NO_TARGETS
    if not targets and not of_parameters and method.kinds and not on_nothing:
        raise no_match(model, config, method, everything)
    excluded = getattr(config, "exclude_modules", None)
    if excluded and not any(named(site.path, excluded) for site in everything):
        warnings.warn(
            f"You have passed exclude_modules={excluded} but no modules were excluded. Please check that "
            "exclude_modules was set correctly.",
            stacklevel=2,
        )
    found = [(site, "target") for site in unique(targets)]
    found += [(site, "parameters") for site in unique(of_parameters)]
    taken = {id(site.module) for site, _ in found}

    for name in token_targets(model, config):
        matched = [s for s in everything if s.path.endswith(name) and base_ops.kind_of(s.module) in TOKEN_KINDS]
        if not matched:
            raise NoMatchingPeftModuleError(
                f"Target modules { ({name}) } not found in the base model.", "trainable_token_indices"
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
        role = next((role for other, role in found if other.module is site.module), None)
        if role is not None:
            what = "The embedding layer is" if role == "tokens" else "It is adapted, but"
            raise ConfigError(
                f"{what} already marked to be trained fully: {site.path} is in `modules_to_save`; choose one.",
                "modules_to_save",
            )
        found.append((site, "save"))
    return found


def shorten(config: Any, everything: list[Site]) -> None:
    """Replace a long list of target modules by a few suffixes, since each is compared with every module."""
    targets = getattr(config, "target_modules", None)
    # (IA)3 looks for its `feedforward_modules` among the targets
    if not isinstance(targets, set) or len(targets) < LONG_LIST or getattr(config, "feedforward_modules", None):
        return
    chosen = minimal_names(targets, {site.path for site in everything if not named(site.path, targets)})
    if len(chosen) < len(targets):
        config.target_modules = chosen


def no_match(model: nn.Module, config: Any, method: Method, everything: list[Site]) -> NoMatchingPeftModuleError:
    """The error of a configuration that no module matches."""
    excluded = [site for site in everything if is_excluded(config, site.path)]
    if excluded and len(excluded) == len(everything):
        what = f"All modules were excluded{_narrowed(config)}."
    elif excluded:
        what = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            f"modules and excluded modules: target_modules={config.target_modules}{_narrowed(config)}."
        )
    else:
        what = f"Target modules {config.target_modules} not found in the base model{_narrowed(config)}."
    return NoMatchingPeftModuleError(f"{what} The model has {suggestions(model, method)}.", "target_modules")


def check_mamba(targets: list[Site], config: Any) -> None:
    """Refuse modules of a Mamba layer that it does not run."""
    for site in targets:
        if site.name in defaults.MAMBA_MODULES:
            raise TargetError(
                f"[PEFT:{config.peft_type}] Module '{site.path}' is incompatible with Mamba-based models, which use "
                "its weight without running it. Please remove it from `target_modules`.",
                "target_modules",
            )


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
        raise NoMatchingPeftModuleError(
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
    with init_empty_weights() if low_cpu_mem_usage else nullcontext():
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
                adapter.prefix, adapter.exclusive = "token_adapter.", True
            made.append((site, adapter))
    check_patterns(config, [site.path for site, _ in made])
    made = tie_tokens(model, config, made)
    with init_empty_weights() if low_cpu_mem_usage else nullcontext():
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


def inject(model: nn.Module, state: AdapterState, name: str, made: list[tuple[Site, Adapter]]) -> None:
    """Put built adapters on the model, wrapping layers that have no wrapper yet."""
    for site, adapter in made:
        wrapper = site.wrapper
        if wrapper is None:
            wrapper = TunerLayer(site.module, state)
            wrapper.train(site.module.training)
            setattr(site.parent, site.name, wrapper)
        wrapper.add(name, adapter)
