"""Layer kinds: what a method must know of the layer it adapts, said once.

The canonical weight of a layer is `(out, in)`, or `(out, in, *kernel)` for a convolution, whatever way the layer
stores it: `Conv1D` (GPT-2) and `nn.Embedding` store its transpose. An embedding counts its vocabulary as `in`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Layer: TypeAlias = Any  # a module of one of the kinds below; nn.Module says nothing of weight and bias

LINEAR, CONV1D, CONV2D, EMBEDDING = "Linear", "Conv1D", "Conv2d", "Embedding"

_KINDS: dict[type[nn.Module], str] = {nn.Linear: LINEAR, Conv1D: CONV1D, nn.Conv2d: CONV2D, nn.Embedding: EMBEDDING}
_TRANSPOSED = {CONV1D, EMBEDDING}


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer, or None if it is none that an adapter can be put on."""
    return next((kind for cls, kind in _KINDS.items() if isinstance(layer, cls)), None)


def features(layer: Layer) -> tuple[int, int]:
    """`(in, out)` of a layer."""
    out, inner, *_ = read_weight(layer).shape
    return inner * getattr(layer, "groups", 1), out


def read_weight(layer: Layer) -> Tensor:
    """The canonical weight, a view of the layer's own."""
    return layer.weight.T if kind_of(layer) in _TRANSPOSED else layer.weight


@torch.no_grad()
def write(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """Overwrite canonical weight and bias in place, so that a tied layer sees them too."""
    read_weight(layer).copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def channels_last(layer: nn.Module) -> bool:
    """Whether the features are the last dimension of input and output, as in all layers but convolutions."""
    return kind_of(layer) != CONV2D


def low_rank(layer: Layer, r: int) -> tuple[nn.Module, nn.Module]:
    """Two layers, `in -> r -> out`, whose composition has the layer's own shape of input and output."""
    inner, out = features(layer)
    if kind_of(layer) == CONV2D:
        down = nn.Conv2d(inner, r, layer.kernel_size, layer.stride, layer.padding, bias=False)
        return down, nn.Conv2d(r, out, 1, groups=layer.groups, bias=False)
    return nn.Linear(inner, r, bias=False), nn.Linear(r, out, bias=False)


def compose(up: Tensor, down: Tensor) -> Tensor:
    """The canonical weight of `down` followed by `up`: `(out, r[, 1, 1])` and `(r, in, *kernel)` to `(out, in,
    *kernel)`."""
    return torch.tensordot(up.flatten(1), down, dims=1)


def embedding_scale(layer: nn.Module) -> float | Tensor:
    """The factor that some embeddings (Gemma 3) apply to the rows they look up."""
    return getattr(layer, "embed_scale", 1.0)
