"""EVA: A starts with the principal directions of each layer's inputs on the data, and the ranks go to the layers whose
directions explain most (Paischer et al. 2024, arXiv:2410.07170, algorithm 1)."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import cycle
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import ConfigError

from ..config import pattern_value
from ..incremental_pca import IncrementalPCA
from ..matching import is_target, sites
from .lora import LoraConfig
from .lora_variants import build

PrepareLayer: TypeAlias = Callable[[Any, Any, str], Tensor]


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions that count, `(positions, 2)`: those of the attention mask whose label is not ignored."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    options: Any = peft_config.eva_config
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """A layer's input `(rows, length, in)` at the positions that count, `(positions, in)`."""
    return _first(layer_input)[model_input.T.unbind()]


def prepare_layer_inputs_fn_default(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """A layer's input at every position, `(positions, in)`."""
    return _first(layer_input).flatten(0, -2)


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a batch that is a mapping."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | dict[str, PrepareLayer] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The initial A of each target layer, `(rank, in)`, by module name; some get rank 0.

    Args:
        model: a base model, or one with a LoRA adapter, whose adapters are disabled meanwhile.
        dataloader: batches, gone through as often as it takes for the directions to settle.
        peft_config: the configuration, for a model that has none.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: makes of batch and configuration what `prepare_layer_inputs_fn` gets.
        prepare_layer_inputs_fn: makes of a layer's input, that and the layer's name a matrix `(samples, in)`; one
            function or one for each name; None takes every position.
        adapter_name: whose configuration to use.
        gather_distributed_inputs: put the inputs of all processes together.
        show_progress_bar: show how many layers have settled.

    Raises:
        ConfigError: there is no configuration, no data, or a name in `prepare_layer_inputs_fn` that is no target.
    """
    adapted = hasattr(model, "peft_config")
    config: Any = peft_config or (model.peft_config[adapter_name] if adapted else None)  # type: ignore[index]
    if config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    batches = list(dataloader)
    if not batches:
        raise ConfigError("dataloader is empty")
    layers = _target_layers(model, config, adapted)
    prepare = _by_name(prepare_layer_inputs_fn, layers)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    training = model.training
    inputs: dict[str, Tensor] = {}

    def run(batch: Any, names: Iterable[str]) -> None:
        """Fill `inputs` with those of the named layers for one batch."""
        batch = _move(batch, device)
        seen = prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn else copy.deepcopy(batch)

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: Any, output: Any) -> None:
                inputs[name] = _gathered(prepare[name](given, seen, name), gather_distributed_inputs)

            return hook

        inputs.clear()
        with _hooks({layers[name]: keep(name) for name in names}):
            forward_fn(model, batch)

    model.eval()
    try:
        with model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
            return _settle(run, inputs, batches, list(layers), config, show_progress_bar)
    finally:
        model.train(training)


def _settle(
    run: Callable[..., None], inputs: dict[str, Tensor], batches: list[Any], names: list[str], config: Any, show: bool
) -> dict[str, Tensor]:
    """Run batches until the directions that get a rank no longer move."""
    options = config.eva_config
    rank = {name: pattern_value(config.rank_pattern, name, config.r) for name in names}
    most = {name: round(r * options.rho) for name, r in rank.items()}
    run(batches[0], names)
    source: dict[str, str] = {}  # layers with the same input share one decomposition, that of the first of them
    first_with: dict[bytes, str] = {}
    for name in names:
        source[name] = first_with.setdefault(inputs[name].float().cpu().numpy().tobytes(), name)
    for name in names:
        most[name] = max(most[other] for other in names if source[other] == source[name])
    pcas = {name: IncrementalPCA(most[name], lowrank=True, lowrank_seed=42) for name in dict.fromkeys(source.values())}
    settled = {name: torch.zeros(most[name], dtype=torch.bool) for name in pcas}
    ranks = dict(most)
    progress = tqdm(cycle(batches), leave=False, disable=not show)
    for batch in progress:
        moving = [name for name in pcas if not settled[name][: ranks[name]].all()]
        progress.set_description(f"{len(pcas) - len(moving)}/{len(pcas)} layer inputs have converged")
        if not moving:
            break
        run(batch, moving)
        for name in moving:
            if len(inputs[name]) < most[name]:
                warnings.warn(f"A batch has too few samples for {most[name]} directions of {name}.", stacklevel=4)
                continue
            before = getattr(pcas[name], "components_", None)
            now = pcas[name].partial_fit(inputs[name].float()).components_
            if before is not None:
                settled[name] = torch.cosine_similarity(now, before).cpu() >= options.tau
        if all(hasattr(pca, "components_") for pca in pcas.values()):
            ranks = _share_out(pcas, source, most, sum(rank.values()))
    progress.close()
    found = {}
    for name, r in ranks.items():
        pca = pcas[source[name]]
        directions = pca.components_[:r]
        found[name] = directions / pca.singular_values_[:r, None].sqrt() if options.whiten else directions.clone()
    return found


def _share_out(
    pcas: dict[str, IncrementalPCA], source: dict[str, str], most: dict[str, int], budget: int
) -> dict[str, int]:
    """The rank of each layer: the budget goes to the directions that explain most, whatever layer they are of."""
    # those with a decomposition of their own come first, which settles ties
    order = [*pcas, *(name for name in source if name not in pcas)]
    ratios = [(name, share) for name in order for share in pcas[source[name]].explained_variance_ratio_[: most[name]]]
    best = torch.stack([share for _, share in ratios]).argsort(descending=True)[:budget]
    counts = Counter(ratios[int(i)][0] for i in best)
    ranks = {name: counts[name] for name in order}
    for name in order[len(pcas) :]:  # among layers with one input, the first has the most, as its directions are kept
        if ranks[source[name]] < ranks[name]:
            ranks[source[name]], ranks[name] = ranks[name], ranks[source[name]]
    return ranks


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | dict[str, PrepareLayer] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter made with `init_lora_weights="eva"` from data, or from what `get_eva_state_dict` gave.

    Ranks move between layers; layers that get none lose the adapter. The configuration is changed to match. For the
    arguments see `get_eva_state_dict`.

    Raises:
        ConfigError: the adapter was not made for EVA, is not the only active one, or neither data nor state is given.
    """
    if not hasattr(model, "peft_config"):
        raise ConfigError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _start_from(model.base_model, eva_state_dict, adapter_name)


def _start_from(tuner: Any, directions: dict[str, Tensor], adapter_name: str) -> None:
    config: LoraConfig = tuner.peft_config[adapter_name]
    options: Any = config.eva_config
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    left_out, kept = [], []
    for path, layer in list(tuner.layers_of(adapter_name)):
        old: Any = layer.adapter(adapter_name)
        A = directions.get(f"base_model.model.{path}", directions.get(path))
        r = old.r if A is None else len(A)
        if r == 0:
            tuner.take_off(adapter_name, [path])
            continue
        kept.append(path)
        if A is None:
            left_out.append(path)
        alpha = old.lora_alpha * r / old.r if options.adjust_scaling_factors else old.lora_alpha
        if r != config.r:
            ranks[path] = r
        if alpha != config.lora_alpha:
            alphas[path] = alpha
        if A is None:
            continue
        if r != old.r:
            like = next(old.parameters())
            new = build(layer.base_layer, replace(config, rank_pattern={path: r}, alpha_pattern={path: alpha}), path)
            layer.add(adapter_name, new)
            new.to(like.device, like.dtype).requires_grad_(like.requires_grad).train(old.training)
            old = new
        old.lora_A.weight.data = A.to(old.lora_A.weight.device, old.lora_A.weight.dtype, copy=True)
    config.target_modules, config.rank_pattern, config.alpha_pattern = set(kept), ranks, alphas  # type: ignore[assignment]
    if left_out:
        warnings.warn(f"EVA has no directions for {left_out}, which start as usual.", stacklevel=3)


def _target_layers(model: nn.Module, config: LoraConfig, adapted: bool) -> dict[str, nn.Module]:
    """The linear layers of the configuration, by module name; on an adapted model, those that have an adapter."""
    if adapted:
        layers = model.base_model.adapted_layers()  # type: ignore[operator,union-attr]
        found = {f"base_model.model.{path}": layer for path, layer in layers}
        return {name: layer for name, layer in found.items() if isinstance(layer.base_layer, (nn.Linear, Conv1D))}
    return {
        site.path: site.module
        for site in sites(model)
        if isinstance(site.module, (nn.Linear, Conv1D))
        and (config.target_modules is None or is_target(config, site.path))
    }


def _by_name(given: PrepareLayer | dict[str, PrepareLayer] | None, names: Iterable[str]) -> dict[str, PrepareLayer]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given or prepare_layer_inputs_fn_default)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{unknown}"
        )
    return {name: given.get(name, prepare_layer_inputs_fn_default) for name in names}


@contextmanager
def _hooks(hooks: dict[nn.Module, Callable[..., None]]) -> Any:
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(layer_input: Any) -> Tensor:
    return layer_input if isinstance(layer_input, Tensor) else layer_input[0]


def _move(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _move(value, device) for name, value in inputs.items()}
    return type(inputs)(_move(value, device) for value in inputs) if isinstance(inputs, (list, tuple)) else inputs


def _gathered(x: Tensor, gather: bool) -> Tensor:
    if not (gather and dist.is_available() and dist.is_initialized()):
        return x
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)
