"""How LoRA's factors start: one function for each value of `init_lora_weights` that reads the base layer's weight.

Each takes the layer, the rank r, the scaling s and the configuration, and gives A `(r, in)` and B `(out, r)` in
float32. Those that move a part of the weight W into the adapter also give what remains of it, `W - s B A`, so that the
start is the base model itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from workbench.errors import ConfigError

from .. import base_ops


@dataclass
class LoftQConfig:
    """Options of "loftq". Args: loftq_bits: 4 (NF4) or 8. loftq_iter: alternations of quantising and factorising."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """Options of "eva"; see `methods.eva`.

    Args:
        rho: a layer gets at most rho * r of the ranks that are shared out (>= 1; 1 keeps r everywhere).
        tau: a direction has converged if its cosine with that of the step before is at least this.
        use_label_mask: leave out positions whose label is `label_mask_value`.
        label_mask_value: the label of ignored positions.
        whiten: divide the directions by the roots of their singular values.
        adjust_scaling_factors: keep each layer's scaling as the ranks move.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ConfigError("`rho` must be >= 1.0", "eva_config")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError("`tau` must be between 0.0 and 1.0.", "eva_config")


@dataclass
class CordaConfig:
    """Options of "corda"; see `methods.corda`.

    Args:
        cache_file: safetensors file that keeps the decompositions.
        covariance_file: safetensors file that keeps the covariances.
        corda_method: "ipm" adapts the directions that matter most to the data, "kpm" those that matter least.
        verbose: report progress.
        use_float16_for_covariance: half the memory, less precision.
        prune_temporary_fields: drop covariances and counts when the decompositions are there.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """Options of "lora_ga"; see `methods.lora_ga`.

    Args:
        direction: which of the gradient's first 2r singular directions A and B get.
        scale: how large they start: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: gamma of "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


class Start(NamedTuple):
    """Initial factors, and the base layer's new canonical weight where it changes."""

    A: Tensor
    B: Tensor
    base: Tensor | None = None


Initialisation: TypeAlias = Callable[[base_ops.Layer, int, float, Any], Start | None]


def pissa(layer: base_ops.Layer, r: int, s: float, config: Any, niter: int | None = None) -> Start:
    """The r largest singular values and their vectors (PiSSA, Meng et al. 2024, arXiv:2404.02948, eq. 2-4).

    `niter`: subspace iterations of a fast, randomised SVD instead of the exact one.
    """
    W = _weight(layer, r)
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.T
    return _split(W, U[:, :r], S[:r], Vh[:r], s)


def olora(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start:
    """The first r columns and rows of the QR decomposition (OLoRA, Büyükakyüz 2024, arXiv:2406.01775, alg. 1)."""
    W = _weight(layer, r)
    Q, R = torch.linalg.qr(W)
    A, B = R[:r], Q[:, :r]
    return Start(A, B, W - s * B @ A)


def mica(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start:
    """B: the left singular vectors of the r smallest singular values, frozen; A: zero (MiCA, arXiv:2604.01694)."""
    W = _weight(layer, r, "MiCA")
    U, _, _ = torch.linalg.svd(W, full_matrices=False)
    return Start(torch.zeros(r, W.shape[1], device=W.device), U[:, -r:])


def orthogonal(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start:
    """Both factors random and B A = 0, since A's rows and B's columns are built on orthogonal halves of a rotation."""
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.", "r")
    inner, out = base_ops.features(layer)
    Q, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
    A = (torch.randn(inner, r // 2, device="cpu") @ Q[0::2]).T / 10
    B = torch.randn(r // 2, out, device="cpu").T @ Q[1::2] / 10
    return Start(A, B)


def low_rank(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)`, of whose products B A is nearest to W, and which share its singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def loftq(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start:
    """The base layer is quantised, and the factors make up for the error (LoftQ, Li et al. 2023, arXiv:2310.08659,
    alg. 1). The quantised weight is kept as floating-point numbers."""
    W = _weight(layer, r)
    options = LoftQConfig(**config.loftq_config)
    product = torch.zeros_like(W)
    for _ in range(options.loftq_iter):
        quantised = nf4(W - product) if options.loftq_bits == 4 else int8(W - product)
        A, B = low_rank(W - quantised, r)
        product = B @ A
    return Start(A, B, quantised)


def corda(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start:
    """Directions ranked by what the data make of them (CorDA, Yang et al. 2024, arXiv:2406.05223, eq. 4-6): those that
    `preprocess_corda` left on the layer, which are used up."""
    if not hasattr(layer, "eigens"):
        raise ConfigError("`eigens` attribute not found for layer, please run `preprocess_corda` first.")
    W, eigens = _weight(layer, r), layer.eigens
    if eigens.U_WC.shape != (W.shape[0], r) or eigens.V_WC.shape != (W.shape[1], r):
        raise ConfigError(
            f"CorDA was prepared for factors of shape {tuple(eigens.U_WC.shape)} and {tuple(eigens.V_WC.shape)}, but "
            f"{(W.shape[0], r)} and {(W.shape[1], r)} are asked for: use one configuration in `preprocess_corda` and "
            "`get_peft_model`, and no cache of another rank.",
            "r",
        )
    del layer.eigens
    return _split(W, eigens.U_WC, eigens.S_WC, eigens.V_WC.T, s)


def lora_ga(layer: base_ops.Layer, r: int, s: float, config: Any) -> Start | None:
    """Directions of the gradient that `preprocess_loraga` left on the layer, which is used up (LoRA-GA, Wang et al.
    2024, arXiv:2407.05000, eq. 8 and theorem 3.2). Without one, as when an adapter is loaded, the default start."""
    if not hasattr(layer, "_peft_loraga_grad"):
        return None
    options = config.lora_ga_config
    if options is None:
        raise ConfigError("lora_ga_config must be provided for init_lora_weights='lora_ga'.", "lora_ga_config")
    W = _weight(layer, r)
    gradient = layer._peft_loraga_grad.float()
    gradient = gradient.T if base_ops.kind_of(layer) == base_ops.CONV1D else gradient
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    for_A: Any
    for_B: Any
    if options.direction == "random":
        for_A = for_B = torch.randperm(min(2 * r, len(S)), device="cpu")[:r]
    else:
        first, second = slice(r), slice(r, 2 * r)
        even, odd = slice(0, 2 * r, 2), slice(1, 2 * r, 2)
        for_A, for_B = {"ArBr": (odd, even), "A2rBr": (second, first), "ArB2r": (first, second)}[options.direction]
    A, B, strength = V.T[for_A], U[:, for_B] * S[for_B], S[for_B]
    if len(A) != r or B.shape[1] != r:
        raise ConfigError(f"LoRA-GA splits 2r directions, but the layer has only {len(S)}; choose r <= {len(S) // 2}.")
    if options.scale == "stable":
        B = B * W.shape[0] ** 0.25 / options.stable_gamma**0.5
    elif options.scale == "weight_svd" and strength[0] > 0:
        B = B * torch.svd_lowrank(W, q=r, niter=4)[1][0] / strength[0]
    elif options.scale == "gd_scale":
        A, B = A / s, B / s
    dtype = base_ops.read_weight(layer).dtype
    A, B = A.to(dtype).float(), B.to(dtype).float()  # what is taken off the base is what the adapter can hold
    del layer._peft_loraga_grad
    return Start(A, B, W - s * B @ A)


INITIALISATIONS: dict[str, Initialisation] = {
    "pissa": pissa,
    "olora": olora,
    "mica": mica,
    "orthogonal": orthogonal,
    "loftq": loftq,
    "corda": corda,
    "lora_ga": lora_ga,
}
PLAIN = ("gaussian", "eva")  # read no weight
SPLITTING = ("pissa", "olora", "corda", "lora_ga")  # move a part of the base weight into the adapter, restorably
TITLES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
FIXED_B = ("mica",)  # only A trains
ON_EMBEDDINGS = ("mica",)  # the others start embeddings as `init_lora_weights=True` does


def changes_base(name: Any) -> str | None:
    """The title of an initialisation that changes the base weights; None for others."""
    return next((title for start, title in TITLES.items() if str(name).lower().startswith(start)), None)


def known(name: Any) -> bool:
    """Whether this is a value of `init_lora_weights` with a name."""
    return isinstance(name, str) and (name.lower() in (*PLAIN, *INITIALISATIONS) or _iterations(name) is not None)


def named(name: str) -> Initialisation:
    """The initialisation of this name; "pissa_niter_N" is PiSSA with N iterations."""
    niter = _iterations(name)
    return INITIALISATIONS[name.lower()] if niter is None else partial(pissa, niter=niter)


def _iterations(name: str) -> int | None:
    match = re.fullmatch(r"pissa_niter_(\d+)", name)
    return int(match[1]) if match else None


def nf4(weight: Tensor, block: int = 64) -> Tensor:
    """The weight rounded to 4-bit normal floats with one scale a block of 64 (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314, section 3 and appendix E), as floating-point numbers."""
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    tail = 1 - (1 / 32 + 1 / 30) / 2  # the outermost quantile: the mean of those of 16 and of 15 levels
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64, device="cpu")[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64, device="cpu")[:-1])
    levels = torch.cat([negative, positive.new_zeros(1), positive.flip(0)]) / positive.max()
    levels = levels.to(flat)
    nearest = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


def int8(weight: Tensor) -> Tensor:
    """The weight `(out, in)` rounded to 8 bits with one scale a row, as floating-point numbers."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


def _split(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Start:
    """Half of each singular value into either factor; the base loses their product."""
    root = (S / s).sqrt()
    A, B = root[:, None] * Vh, U * root
    return Start(A, B, W - s * B @ A)


def _weight(layer: base_ops.Layer, r: int, title: str = "This init_lora_weights") -> Tensor:
    """The canonical weight in float32.

    Raises:
        ConfigError: it is not a matrix of floating-point numbers, or has fewer than r directions.
    """
    W = base_ops.read_weight(layer).detach()
    if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"{title} requires a floating-point base layer, not {layer.weight.dtype}.")
    if r > min(W.shape):
        raise ConfigError(
            f"{title} requires `r` <= min(in_features, out_features), not r={r} for a weight {tuple(W.shape)}.",
            "r",
        )
    return W.float()
