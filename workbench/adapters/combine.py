"""`add_weighted_adapter`: a new adapter out of others, by weighted sums, concatenation, or sparse merging."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import AdapterNameError, ConfigError

if TYPE_CHECKING:
    from .tuner import Tuner
    from .tuner_layer import TunerLayer

Sign = Literal["total", "frequency"]
MERGES = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
KINDS = (*MERGES, "cat", "svd", *(f"{kind}_svd" for kind in MERGES if kind != "linear"))


def add_weighted_adapter(
    tuner: Tuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Sign = "total",
) -> None:
    """Add an adapter that combines LoRA adapters (or (IA)3 adapters, whose factors are summed).

    Args:
        adapters: names of the adapters to combine.
        weights: a factor for each; negative ones subtract.
        adapter_name: name of the new adapter, which is neither active nor trained.
        combination_type: linear (sums of A and of B, ranks equal), cat (exact; the ranks add up), svd (the summed
            update, cut to `svd_rank`), and ties (Yadav et al. 2023, arXiv:2306.01708), dare_linear, dare_ties (Yu et
            al. 2023, arXiv:2311.03099) and magnitude_prune, each on A and B or, with `_svd`, on the update.
        svd_rank: rank of the new adapter for the svd kinds; default: the largest rank combined.
        svd_clamp: quantile to which the svd's factors are clamped.
        svd_full_matrices: passed to `torch.linalg.svd`.
        svd_driver: passed to `torch.linalg.svd`; CUDA only.
        density: share of the values that ties, dare and magnitude_prune keep.
        majority_sign_method: how ties finds the sign that counts: "total" of the values or "frequency" of the signs.

    Raises:
        AdapterNameError: an adapter does not exist, or the new name is taken.
        ConfigError: the adapters cannot be combined in this way.
    """
    tuner.check_known(adapters)
    if not adapters or len(adapters) != len(weights):
        raise AdapterNameError(f"add_weighted_adapter needs a weight for each adapter, got {adapters} and {weights}.")
    check_one_each(tuner, adapters)
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    if any(getattr(config, "target_parameters", None) for config in configs):
        raise ConfigError("add_weighted_adapter does not support targeting nn.Parameter.", "target_parameters")
    changed: dict[str, Any] = {"target_modules": union([config.target_modules for config in configs])}
    factors = dict(zip(adapters, weights, strict=True))
    if configs[0].peft_type == "IA3":
        changed["feedforward_modules"] = union([config.feedforward_modules for config in configs])
        tuner.add(adapter_name, replace(configs[0], **changed))
        for layer, present in layers_with(tuner, adapter_name, factors):
            total = sum(layer.ia3_l[name].detach() * weight for name, weight in present.items())
            layer.ia3_l[adapter_name].data.copy_(total)
        return
    if configs[0].peft_type != "LORA":
        raise ConfigError(f"Adapters of type {configs[0].peft_type} cannot be combined.")
    kind = "linear" if len(adapters) == 1 else combination_type
    thins_out = kind.removesuffix("_svd") in MERGES and kind != "linear"
    if thins_out and (density is None or density < 0):
        raise ConfigError(f"combination_type {kind} needs a density from 0 to 1, not {density}.", "density")
    rank = new_rank(kind, [max([config.r, *config.rank_pattern.values()]) for config in configs], svd_rank)
    changed |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    tuner.add(adapter_name, replace(configs[0], **changed))
    for layer, present in layers_with(tuner, adapter_name, factors):
        down, up = low_rank_parts(layer, adapter_name)
        if kind == "cat":
            new_down, new_up = concatenated(layer, present)
        elif kind.endswith("svd"):
            delta = merge(
                [delta_of(layer, name) for name in present],
                list(present.values()),
                kind.removesuffix("_svd") if kind != "svd" else "linear",
                density,
                majority_sign_method,
            )
            new_down, new_up = truncated_svd(delta, rank, svd_clamp, svd_full_matrices, svd_driver)
        else:
            new_down, new_up = merged_parts(layer, present, kind, density, majority_sign_method)
        write_part(down, new_down.to(down.dtype), rows=True)
        write_part(up, new_up.to(up.dtype), rows=False)


def check_one_each(tuner: Tuner, adapters: list[str]) -> None:
    """Refuse modules that several of the adapters train as a whole."""
    shared = [
        path
        for path, layer in tuner.adapted_layers()
        if sum(name in layer.adapters and layer.adapter(name).replaces for name in adapters) > 1
    ]
    if shared:
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s). Several of them train {', '.join(shared)}.",
            "modules_to_save",
        )


def union(targets: list[set[str] | str]) -> set[str] | str:
    """The modules that any of the configurations means."""
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    if any(isinstance(target, str) for target in targets):
        raise ConfigError(
            "all adapter configs should follow the same target modules type: either lists of names or regular "
            "expressions.",
            "target_modules",
        )
    return set().union(*targets)


def new_rank(kind: str, ranks: list[int], svd_rank: int | None) -> int:
    """The rank of the combined adapter."""
    if kind not in KINDS:
        raise ConfigError(f"Invalid combination_type: {kind}; known are {', '.join(KINDS)}.")
    if kind == "cat":
        return sum(ranks)
    if kind.endswith("svd"):
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise ConfigError(f"All adapters must have the same r value when using combination_type {kind}, not {ranks}.")
    return ranks[0]


def layers_with(tuner: Tuner, new: str, factors: dict[str, float]) -> list[tuple[TunerLayer, dict[str, float]]]:
    """The layers that the new adapter adapts, each with those of the combined adapters that are on it too."""
    found = []
    for _, layer in tuner.adapted_layers():
        if new in layer.adapters and not layer.adapter(new).exclusive:
            found.append((layer, {name: weight for name, weight in factors.items() if name in layer.adapters}))
    return found


def low_rank_parts(layer: TunerLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in, ...) and B (out, r, ...) of an adapter."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def delta_of(layer: TunerLayer, name: str) -> Tensor:
    """The update of an adapter as a canonical weight (out, in, ...)."""
    adapter: Any = layer.adapter(name)
    return adapter.delta().detach()


def concatenated(layer: TunerLayer, factors: dict[str, float]) -> tuple[Tensor, Tensor]:
    """A and B side by side, so that their product is the exact sum."""
    parts = {name: low_rank_parts(layer, name) for name in factors}
    downs = [parts[name][0].detach() * weight * layer.scaling[name] for name, weight in factors.items()]
    return torch.cat(downs, dim=0), torch.cat([up.detach() for _, up in parts.values()], dim=1)


def merged_parts(
    layer: TunerLayer, factors: dict[str, float], kind: str, density: float | None, sign: Sign
) -> tuple[Tensor, Tensor]:
    """A and B merged each for itself; either gets the square root of the weight, A its sign."""
    scaled = {name: weight * layer.scaling[name] for name, weight in factors.items()}
    roots = [abs(value) ** 0.5 for value in scaled.values()]
    signed = [root if value >= 0 else -root for root, value in zip(roots, scaled.values(), strict=True)]
    parts = [low_rank_parts(layer, name) for name in factors]
    down = merge([down.detach() for down, _ in parts], signed, kind, density, sign)
    return down, merge([up.detach() for _, up in parts], roots, kind, density, sign)


def merge(tensors: list[Tensor], weights: list[float], kind: str, density: float | None, sign: Sign) -> Tensor:
    """A weighted sum of tensors of one shape; ties, dare and magnitude_prune thin them out first."""
    if kind != "linear":
        tensors = [prune(tensor, density or 0.0, random=kind.startswith("dare")) for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * torch.tensor(weights, device=stacked.device).to(stacked.dtype).view(
        -1, *[1] * tensors[0].dim()
    )
    if "ties" not in kind:
        return weighted.sum(0)
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def prune(tensor: Tensor, density: float, random: bool) -> Tensor:
    """Keep this share of the values: the largest, or random ones that are scaled up to keep the expected value."""
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2
        )
        return tensor
    if random:
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def truncated_svd(
    delta: Tensor, rank: int, clamp: float | None, full_matrices: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    """A (rank, in * kernel) and B (out, rank) of the best approximation of an update."""
    u, s, vh = torch.linalg.svd(delta.flatten(1).float(), full_matrices=full_matrices, driver=driver)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), clamp)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return down, up


@torch.no_grad()
def write_part(parameter: nn.Parameter, value: Tensor, rows: bool) -> None:
    """Fill a parameter with a part that may have a smaller rank; what is left is zero."""
    parameter.zero_()
    if rows:
        parameter[: value.shape[0]] = value.reshape(value.shape[0], *parameter.shape[1:])
    else:
        parameter[:, : value.shape[1]] = value.reshape(*value.shape[:2], *parameter.shape[2:])
