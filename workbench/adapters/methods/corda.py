"""CorDA's preparation: the covariance C of each layer's inputs on sample data, and the SVD of W C, whose directions are
ranked by what the data make of them (Yang et al. 2024, arXiv:2406.05223, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import ConfigError

from .. import base_ops
from ..config import pattern_value
from ..matching import is_target, sites
from .lora import LoraConfig


@dataclass
class CordaEigens:
    """The r chosen directions of a layer: `S_WC` `(r,)`, `U_WC` `(out, r)`, `V_WC` `(in, r)`, C's inverse applied."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave on each target layer, as `layer.eigens`, the directions that `init_lora_weights="corda"` starts from.

    Args:
        model: the base model that will be adapted.
        lora_config: with a `corda_config`, and the target modules by name.
        run_model: runs the model on sample data (256 samples of 2,048 tokens are enough for a width of 4,096); not
            needed where a covariance or cache file exists.
        hooked_model: the model whose inputs are measured, if it is not `model`.

    Raises:
        ConfigError: `run_model` is missing, an option is unknown, or the data give numbers that are not finite.
    """
    from ..checkpoint import read_file

    options: Any = lora_config.corda_config
    if options.corda_method not in ("ipm", "kpm"):
        raise ConfigError(f"corda_method should be 'ipm' or 'kpm', not {options.corda_method!r}.", "corda_config")
    layers = dict(target_layers(model, lora_config))
    if _there(options.cache_file):
        cache = read_file(Path(options.cache_file))
        for name, layer in layers.items():
            parts = {part: cache[f"{name}.eigens.{part}"] for part in ("S_WC", "U_WC", "V_WC")}
            layer.eigens = CordaEigens(**{part: value.to(layer.weight.device) for part, value in parts.items()})
        return
    measure(layers, lora_config, run_model, dict(target_layers(hooked_model or model, lora_config)))
    for name, layer in layers.items():
        if options.verbose:
            print(f"CorDA: decomposing {name}")
        r = pattern_value(lora_config.rank_pattern, name, lora_config.r)
        chosen = slice(r) if options.corda_method == "ipm" else slice(-r, None)
        S, U, V = decompose(base_ops.read_weight(layer).float(), layer.covariance_matrix.float())
        layer.eigens = CordaEigens(S[chosen].clone(), U[:, chosen].clone(), V[:, chosen].clone())
        if options.prune_temporary_fields:
            del layer.covariance_matrix, layer.sample_count
    if options.cache_file is not None:
        parts = {f"{name}.eigens.{part}": t for name, layer in layers.items() for part, t in vars(layer.eigens).items()}
        _save(parts, options.cache_file)


def target_layers(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, Any]]:
    """The linear layers that the configuration means, by path."""
    for site in sites(model):
        if isinstance(site.module, (nn.Linear, Conv1D)) and is_target(config, site.path):
            yield site.path, site.module


def measure(
    layers: dict[str, Any], config: LoraConfig, run_model: Callable[[], Any] | None, hooked: dict[str, Any]
) -> None:
    """Set `covariance_matrix` `(in, in)`, a mean over the calls, and `sample_count` on each layer."""
    from ..checkpoint import read_file

    options: Any = config.corda_config
    if _there(options.covariance_file):
        for name, matrix in read_file(Path(options.covariance_file)).items():
            layers[name].covariance_matrix, layers[name].sample_count = matrix.to(layers[name].weight.device), 1
        return
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    sums: dict[str, Any] = dict.fromkeys(hooked, 0)
    counts = dict.fromkeys(hooked, 0)

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
            x = given[0].detach().flatten(0, -2)
            x = x if options.use_float16_for_covariance else x.float()
            x = x / x.max().abs()
            covariance = x.T @ x
            if not covariance.isfinite().all():
                raise ConfigError(f"The inputs of {name} are not finite; check the sample data.")
            sums[name] = sums[name] + covariance
            counts[name] += 1

        return add

    handles = [layer.register_forward_hook(hook(name)) for name, layer in hooked.items()]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if not counts.get(name):
            raise ConfigError(f"run_model did not use {name}, so there is nothing to measure.")
        layer.covariance_matrix, layer.sample_count = sums[name] / counts[name], counts[name]
    if options.covariance_file is not None:
        _save({name: layer.covariance_matrix for name, layer in layers.items()}, options.covariance_file)


def decompose(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, U and C^-1 V of the SVD U S V^T = W C, with C damped until its inverse is one."""
    damp, eye = 0.01, torch.eye(len(C), device=C.device)
    while True:
        damped = C + eye * C.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    return S, U, (Vh @ inverse).T


def _there(file: str | None) -> bool:
    return file is not None and Path(file).exists() and Path(file).stat().st_size > 0


def _save(tensors: dict[str, Tensor], file: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
