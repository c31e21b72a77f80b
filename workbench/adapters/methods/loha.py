"""LoHa: W + s (A1 B1) * (A2 B2), the elementwise product of two low-rank matrices, whose rank is up to r squared
(FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 1; as an adapter Yeh et al. 2023, arXiv:2309.14859), with
s = alpha / r."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .. import base_ops
from .lycoris import Lycoris, LycorisConfig


@dataclass
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa: the options of `LycorisConfig`."""

    peft_type: str | None = "LOHA"

    init_weights: bool = True


class LoHa(Lycoris):
    """`hada_w1_a`, `hada_w2_a`: (out, r); `hada_w1_b`, `hada_w2_b`: (r, in * kernel). With a core `hada_t1`, `hada_t2`
    of (r, r, *kernel) they are (r, out) and (r, in)."""

    views = (*Lycoris.views, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    letters = "hada"

    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor

    def __init__(self, layer: base_ops.Layer, config: LoHaConfig, path: str):
        super().__init__(layer, config, path)
        out, inner, *kernel = self.shape
        self.low_rank = not kernel and self.r**2 * (out + inner) < out * inner
        for number in (1, 2):
            self.add_factors(number, out, inner, *kernel)
        self.reset(*["hada_w2_b"] if config.init_weights else [])

    def delta(self) -> Tensor:
        return (self.product(1) * self.product(2) * self.scaling).view(self.shape)

    def update(self, x: Tensor) -> Tensor:
        """Of a linear layer, where that is less work: as a product of rank r squared, never a matrix (out, in)."""
        if not self.low_rank:
            return super().update(x)
        down = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return F.linear(F.linear(x.to(down.dtype), down), up) * self.scaling
