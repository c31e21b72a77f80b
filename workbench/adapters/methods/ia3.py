"""(IA)3: a learned factor for each output of a layer, or for each input of a feed-forward layer
(Liu et al. 2022, arXiv:2205.05638, section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops, defaults
from ..adapter import Adapter
from ..config import PeftConfig, name_set
from ..groups import Groups

KINDS = frozenset({base_ops.LINEAR, base_ops.CONV1D, base_ops.CONV2D, base_ops.CONV3D})


@dataclass
class IA3Config(PeftConfig):
    """Configuration of (IA)3.

    Args:
        target_modules: names or suffixes of the modules to adapt, a regular expression for whole names, or
            "all-linear"; by default those usual for the architecture.
        exclude_modules: names, suffixes or a regular expression of modules to leave alone.
        feedforward_modules: those of the target modules whose input is scaled instead of their output; [] for none.
        fan_in_fan_out: the layer stores its weight as (in, out); set for `Conv1D` by itself.
        modules_to_save: modules that train as a whole and are saved with the adapter.
        init_ia3_weights: start with factors of one; otherwise random.
    """

    peft_type: str | None = "IA3"

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_set(self.target_modules, "target_modules")
        self.exclude_modules = name_set(self.exclude_modules, "exclude_modules")
        self.feedforward_modules = name_set(self.feedforward_modules, "feedforward_modules")
        lists = isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set)
        if lists and not self.feedforward_modules <= self.target_modules:  # type: ignore[operator]
            raise ConfigError("`feedforward_modules` should be a subset of `target_modules`", "feedforward_modules")

    def fill_defaults(self, model_type: str | None) -> None:
        """Set `feedforward_modules` to those usual for the architecture."""
        if self.feedforward_modules is None:
            if model_type not in defaults.IA3_FEEDFORWARD:
                raise ConfigError(
                    "Please specify `feedforward_modules` in `peft_config` ([] for none).", "feedforward_modules"
                )
            self.feedforward_modules = name_set(defaults.IA3_FEEDFORWARD[model_type], "feedforward_modules")

    def is_feedforward(self, path: str) -> bool:
        """Whether the module at this path is one of the feed-forward modules."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, path) is not None
        return any(path.endswith(name) for name in self.feedforward_modules or ())


class IA3(Adapter):
    """`ia3_l` scales the input (`(1, in)`) of a feed-forward layer, the output (`(out, 1)`) of any other."""

    views = ("ia3_l",)
    facts = ("is_feedforward",)

    def __init__(self, layer: base_ops.Layer, config: IA3Config, path: str):
        super().__init__()
        self.is_feedforward = config.is_feedforward(path)
        inner, out = base_ops.features(layer)
        size = inner if self.is_feedforward else out
        self.factor_shape = base_ops.feature_shape(layer, size)
        before = self.is_feedforward or not base_ops.channels_last(layer)
        self.ia3_l = nn.Parameter(torch.randn((1, *self.factor_shape) if before else (size, 1)))
        if config.init_ia3_weights:
            nn.init.ones_(self.ia3_l)

    def pre(self, x: Tensor) -> Tensor:
        return self._scaled(x).to(x.dtype) if self.is_feedforward else x

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.is_feedforward else self._scaled(y)

    def _scaled(self, tensor: Tensor) -> Tensor:
        return scaled(tensor, self.ia3_l.view(self.factor_shape), self.compute_dtype)

    @classmethod
    def pre_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor) -> Tensor:
        if not all(adapter.is_feedforward for adapter in adapters) or not cls.stackable(adapters, groups, x):
            return super().pre_each(adapters, groups, x)
        return cls.scaled_each(adapters, groups, x).to(x.dtype)

    @classmethod
    def post_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor, y: Tensor) -> Tensor:
        if any(adapter.is_feedforward for adapter in adapters) or not cls.stackable(adapters, groups, y):
            return super().post_each(adapters, groups, x, y)
        return cls.scaled_each(adapters, groups, y).to(y.dtype)

    @staticmethod
    def stackable(adapters: Sequence[IA3], groups: Groups, tensor: Tensor) -> bool:
        features_last = all(len(adapter.factor_shape) == 1 for adapter in adapters)
        return features_last and len(adapters) > 1 and groups.worth_stacking(tensor)

    @staticmethod
    def scaled_each(adapters: Sequence[IA3], groups: Groups, tensor: Tensor) -> Tensor:
        """(..., features), of each group times its adapter's factors."""
        factors = torch.stack([adapter.ia3_l.flatten() for adapter in adapters])
        return groups.unstack(scaled(groups.stack(tensor), factors[:, None], adapters[0].compute_dtype), tensor)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.ia3_l.flatten().to(weight.dtype)
        tail = (1,) * (weight.dim() - 2)
        if self.is_feedforward:
            groups = len(factor) // weight.shape[1]  # of a convolution, each of which sees a part of the input
            scaled = weight.unflatten(0, (groups, -1)) * factor.view(groups, 1, -1, *tail)
            return scaled.flatten(0, 1), bias
        return weight * factor.view(-1, 1, *tail), None if bias is None else bias * factor


def scaled(tensor: Tensor, factors: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor times factors; in half precision by what they differ from one, which it holds more exactly."""
    if dtype is None or dtype == factors.dtype:
        return tensor * factors
    return torch.addcmul(tensor, tensor, (factors - 1).to(dtype))
