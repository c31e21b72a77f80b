"""BD-LoRA: LoRA in which A or B is block-diagonal, so that an inference engine that splits a layer over devices can
split its adapters in the same way (Wang et al. 2025, arXiv:2510.23346, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from .lora import Lora, LoraConfig


class BlockDiagonalLinear(nn.Module):
    """A linear layer without bias whose weight is block-diagonal; `weight`, (out, in / nblocks), holds the blocks one
    below the other.

    Raises:
        ConfigError: the blocks do not divide both sides.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int):
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ConfigError(
                f"self.in_features={in_features} or self.out_features={out_features} not divisible by {nblocks}",
                "use_bdlora",
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        blocks = self.weight.unflatten(0, (self.nblocks, -1))
        return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (self.nblocks, -1)), blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """The weight with its zeros, (out, in)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))


class BdLora(Lora):
    """LoRA whose `lora_A` or `lora_B` is a `BlockDiagonalLinear`, as the configuration says for the layer's path."""

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        options: Any = config.use_bdlora
        in_a = any(name in path for name in options.target_modules_bd_a or ())
        in_b = any(name in path for name in options.target_modules_bd_b or ())
        if in_a and in_b:
            raise ConfigError(f"Target {path} matches both A and B block-diagonal patterns", "use_bdlora")
        if options.match_strict and not (in_a or in_b):
            raise ConfigError(
                f"Target {path} matches neither A nor B block-diagonal patterns. If this is intentional, set "
                "match_strict=False in BdLoraConfig during initialization.",
                "use_bdlora",
            )
        inner, out = base_ops.features(layer)
        if in_a:
            self.lora_A = BlockDiagonalLinear(inner, self.r, options.nblocks)
        elif in_b:
            self.lora_B = BlockDiagonalLinear(self.r, out, options.nblocks)
            nn.init.zeros_(self.lora_B.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return dense(self.lora_B), dense(self.lora_A)


def dense(factor: Any) -> Tensor:
    """The weight of a factor, with the zeros of a block-diagonal one."""
    return factor.weight_as_blockdiagonal_matrix() if isinstance(factor, BlockDiagonalLinear) else factor.weight
