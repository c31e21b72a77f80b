"""LoKr: W + s W1 (x) W2, a Kronecker product with W2, and if asked W1, of low rank (Yeh et al. 2023, arXiv:2309.14859;
Edalati et al. 2022, arXiv:2212.10650), with s = alpha / r."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from .lycoris import Lycoris, LycorisConfig


@dataclass
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, beside the options of `LycorisConfig`.

    Args:
        decompose_both: give W1 low rank too.
        decompose_factor: the smaller factor of `in` and `out`, which W1 is made of; -1: as near the root as possible.
        rank_dropout_scale: scale the features that `rank_dropout` keeps to make up for the others.
        init_weights: true: W1 starts at zero; "lycoris": W2 does; false: all random.
    """

    peft_type: str | None = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init_weights, bool) and self.init_weights != "lycoris":
            raise ConfigError(
                f"init_weights must be true, false or lycoris, not {self.init_weights!r}.", "init_weights"
            )
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(
                f"decompose_factor must be -1 or a positive whole number, not {self.decompose_factor!r}.",
                "decompose_factor",
            )


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two whole numbers whose product is the dimension, the smaller first.

    With a `factor` that divides the dimension that is one of them; otherwise the pair nearest to the root, of which the
    smaller number is at most `factor` (-1: any).
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = min(math.isqrt(dimension), factor if factor > 0 else dimension)
    small = next(m for m in range(limit, 0, -1) if dimension % m == 0)
    return small, dimension // small


class LoKr(Lycoris):
    """With out = a b and in = c d: `lokr_w1`: (a, c), or `lokr_w1_a`: (a, r) and `lokr_w1_b`: (r, c); `lokr_w2`: (b, d,
    *kernel), or `lokr_w2_a`: (b, r) and `lokr_w2_b`: (r, d * kernel), or with a core `lokr_t2`: (r, r, *kernel) these
    are (r, b) and (r, d)."""

    views = (
        *Lycoris.views,
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )
    letters = "lokr"

    def __init__(self, layer: base_ops.Layer, config: LoKrConfig, path: str):
        super().__init__(layer, config, path)
        self.rank_dropout_scale = config.rank_dropout_scale
        out, inner, *kernel = self.shape
        a, b = factorization(out, config.decompose_factor)
        c, d = factorization(inner, config.decompose_factor)
        if config.decompose_both and self.r < max(a, c) / 2:
            self.add_factors(1, a, c)
        else:
            self.lokr_w1 = nn.Parameter(torch.empty(a, c))
        if self.r < max(b, d) / 2:
            self.add_factors(2, b, d, *kernel)
        else:
            self.lokr_w2 = nn.Parameter(torch.empty(b, d, *kernel))
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}
        self.reset(*zero[config.init_weights])

    def factors(self) -> tuple[Tensor, Tensor]:
        """W1 `(a, c)` and W2 `(b, d * kernel)`, or W2 `(b, d, *kernel)` where it is a parameter of its own."""
        w1, w2 = getattr(self, "lokr_w1", None), getattr(self, "lokr_w2", None)
        return self.product(1) if w1 is None else w1, self.product(2) if w2 is None else w2

    def delta(self) -> Tensor:
        w1, w2 = self.factors()
        if w2.dim() == 4:
            w2 = w2.flatten(1)
        # (b, d, kernel) stays, though it then multiplies other elements than (b, d * kernel): peft's files mean that
        return (torch.kron(w1, w2) * self.scaling).reshape(self.shape)

    def update(self, x: Tensor) -> Tensor:
        """Of a linear layer: with x as a matrix (c, d) it is W1 x W2^T, so no matrix (out, in) is made."""
        if len(self.shape) > 2:
            return super().update(x)
        w1, w2 = self.factors()
        x = x.to(w1.dtype).unflatten(-1, (-1, w2.shape[1]))
        return (w1 @ (x @ w2.T)).flatten(-2) * self.scaling
