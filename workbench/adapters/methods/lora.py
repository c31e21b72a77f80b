"""LoRA: y + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3), with s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import ConfigError, TargetError

from .. import base_ops
from ..adapter import Adapter
from ..config import PeftConfig, name_set

KINDS = frozenset({base_ops.LINEAR, base_ops.CONV1D, base_ops.CONV2D, base_ops.EMBEDDING})


@dataclass
class LoraConfig(PeftConfig):
    """Configuration of LoRA.

    Args:
        r: rank of the update.
        target_modules: names or suffixes of the modules to adapt, a regular expression for whole names, or
            "all-linear"; by default those usual for the architecture.
        exclude_modules: names, suffixes or a regular expression of modules to leave alone.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of the update.
        fan_in_fan_out: the layer stores its weight as (in, out); set for `Conv1D` by itself.
        bias: which biases train: "none", "all", or "lora_only" (those of adapted layers).
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        modules_to_save: modules that train as a whole and are saved with the adapter.
        init_lora_weights: true: A uniform, B zero; "gaussian": A normal with deviation 1/r, B zero; false: both random.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers, e.g. "layers" or "h", where it cannot be guessed.
        rank_pattern: r for modules whose name matches a key (suffix or regular expression).
        alpha_pattern: lora_alpha for modules whose name matches a key.
        trainable_token_indices: tokens whose embeddings train as well: a list, or a dict from module name to list.
    """

    peft_type: ClassVar[str] = "LORA"
    inert_fields: ClassVar[frozenset[str]] = frozenset({"megatron_core", "qalora_group_size"})

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_set(self.target_modules, "target_modules")
        self.exclude_modules = name_set(self.exclude_modules, "exclude_modules")
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                where = "r" if name == "r" else "rank_pattern"
                raise ConfigError(
                    f"`{name}` should be a positive integer value but the value passed is {rank!r}.", where
                )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}.", "lora_dropout")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias must be none, all or lora_only, not {self.bias!r}.", "bias")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ConfigError(
                f"init_lora_weights must be true, false or gaussian, not {self.init_lora_weights!r}.",
                "init_lora_weights",
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a string.", name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be.", "layers_pattern"
            )


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


class Lora(Adapter):
    """Low-rank update of a linear or convolutional layer; `lora_A`: in -> r, `lora_B`: r -> out."""

    views = ("r", "lora_alpha", "scaling", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

    lora_A: Any
    lora_B: Any

    def __init__(self, layer: base_ops.Layer, config: LoraConfig, path: str):
        super().__init__()
        self.r = pattern_value(config.rank_pattern, path, config.r)
        self.lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.init_factors(layer, config.init_lora_weights, path)

    def init_factors(self, layer: base_ops.Layer, init: bool | str, path: str) -> None:
        """Make `lora_A` and `lora_B` for the layer and fill them as `init_lora_weights` says."""
        groups = getattr(layer, "groups", 1)
        if self.r % groups:
            raise TargetError(
                f"{path} has {groups} groups, by which r={self.r} cannot be divided; choose another r.", "r"
            )
        self.lora_A, self.lora_B = base_ops.low_rank(layer, self.r)
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        elif init:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        if init:
            nn.init.zeros_(self.lora_B.weight)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.lora_A.weight.dtype)
        return y + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling

    def delta(self) -> Tensor:
        """The update as a canonical weight, in the adapter's dtype."""
        return base_ops.compose(self.lora_B.weight, self.lora_A.weight) * self.scaling

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.delta()
        if delta.shape != weight.shape:  # a grouped convolution, whose dense update is not block-diagonal
            return super().merged(weight, bias)
        return weight + delta.to(weight.dtype), bias


class LoraEmbedding(Lora):
    """Low-rank update of an embedding; `lora_embedding_A`: (r, vocabulary), `lora_embedding_B`: (dim, r). No
    dropout."""

    def init_factors(self, layer: base_ops.Layer, init: bool | str, path: str) -> None:
        vocabulary, dim = base_ops.features(layer)
        self.lora_embedding_A = nn.Parameter(torch.randn(self.r, vocabulary))
        self.lora_embedding_B = nn.Parameter(torch.randn(dim, self.r))
        if init:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        self.padding_idx = layer.padding_idx
        self.row_scale = base_ops.embedding_scale(layer)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        rows = F.embedding(x, self.lora_embedding_A.T, self.padding_idx) @ self.lora_embedding_B.T
        return y + rows * self.scaling * self.row_scale

    def delta(self) -> Tensor:
        return self.lora_embedding_B @ self.lora_embedding_A * self.scaling


def build(layer: base_ops.Layer, config: LoraConfig, path: str) -> Lora:
    """The LoRA adapter for a layer of any kind."""
    return (LoraEmbedding if isinstance(layer, nn.Embedding) else Lora)(layer, config, path)
