"""What LoHa and LoKr share, as in LyCORIS (Yeh et al. 2023, arXiv:2309.14859): an update made of low-rank factors,
which in training is dropped as a whole or by output feature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from ..adapter import DeltaAdapter
from ..config import TargetConfig, check_ranks, pattern_value

KINDS = frozenset({base_ops.LINEAR, base_ops.TIME_CONV, base_ops.CONV2D})


@dataclass
class LycorisConfig(TargetConfig):
    """Options of LoHa and LoKr, beside the choice of modules in `TargetConfig`.

    Args:
        r: rank of the factors.
        alpha: the update is scaled by alpha / r.
        rank_dropout: probability of dropping an output feature of the update.
        module_dropout: probability of leaving the update of a layer out.
        use_effective_conv2d: factor convolution kernels larger than 1 with a core of their own (FedPara,
            arXiv:2108.06098, proposition 3).
        init_weights: start with an update of zero; false: random.
        rank_pattern: r for modules whose name matches a key (suffix or regular expression).
        alpha_pattern: alpha for modules whose name matches a key.
    """

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, self.rank_pattern)
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)!r}.", name)


class Lycoris(DeltaAdapter):
    """An update of a linear layer or convolution, of which a method says `delta`.

    Attributes:
        letters: what the names of its parameters begin with.
        rank_dropout_scale: make up for dropped features by scaling those that are kept.
    """

    views: ClassVar[tuple[str, ...]] = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
    letters: ClassVar[str]
    rank_dropout_scale: bool = True

    def __init__(self, layer: base_ops.Layer, config: Any, path: str):
        super().__init__()
        self.r = pattern_value(config.rank_pattern, path, config.r)
        self.alpha = pattern_value(config.alpha_pattern, path, config.alpha)
        self.scaling = self.initial_scaling = self.alpha / self.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.draws = bool(self.rank_dropout or self.module_dropout)
        self.shape = tuple(base_ops.read_weight(layer).shape)
        self.use_effective_conv2d = config.use_effective_conv2d
        self._layer = [layer]  # in a list, so that it is not a part of the adapter

    def add_factors(self, number: int, out: int, inner: int, *kernel: int) -> None:
        """Make the parameters a, b and, with a core, t of a matrix `(out, in * kernel)` of rank r."""
        size = math.prod(kernel)
        shapes: dict[str, tuple[int, ...]]
        if self.use_effective_conv2d and size > 1:
            core = (self.r, self.r, *kernel, 1)[:4]  # two kernel dimensions in any case
            shapes = {f"w{number}_a": (self.r, out), f"w{number}_b": (self.r, inner), f"t{number}": core}
        else:
            shapes = {f"w{number}_a": (out, self.r), f"w{number}_b": (self.r, inner * size)}
        for name, shape in shapes.items():
            self.register_parameter(f"{self.letters}_{name}", nn.Parameter(torch.empty(shape)))

    def product(self, number: int) -> Tensor:
        """The matrix `(out, in * kernel)` of these factors."""
        a, b = (getattr(self, f"{self.letters}_w{number}_{side}") for side in "ab")
        core = getattr(self, f"{self.letters}_t{number}", None)
        return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b).flatten(1)

    def reset(self, *zero: str) -> None:
        """Draw all parameters as `nn.Linear` does its weight, but for those that start at zero."""
        for name, parameter in self.named_parameters():
            if name in zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        delta = self.delta()
        return base_ops.apply(self._layer[0], delta, x.to(delta.dtype))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and self.module_dropout and torch.rand(1) <= self.module_dropout:
            return y
        update = self.update(x)
        if self.training and self.rank_dropout:
            kept = (torch.rand(self.shape[0], device=update.device) > self.rank_dropout).to(update.dtype)
            if self.rank_dropout_scale:
                kept = kept / kept.mean().clamp(min=1 / len(kept))
            update = update * kept.view(base_ops.feature_shape(self._layer[0], len(kept)))
        return y + update
