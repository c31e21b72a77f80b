"""Layer kinds: what a method must know of the layer it adapts, said once.

The canonical weight of a layer is `(out, in)`, or `(out, in, *kernel)` for a convolution, whatever way the layer
stores it: `Conv1D` (GPT-2) and `nn.Embedding` store its transpose. An embedding counts its vocabulary as `in`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.errors import MergeError

from . import quantised

Layer: TypeAlias = Any  # a module of one of the kinds below; nn.Module says nothing of weight and bias

LINEAR, CONV1D, EMBEDDING = "Linear", "Conv1D", "Embedding"
ATTENTION = "MultiheadAttention"  # has several weights and none that is called so
# attention with its projections inside, as a decoder's blocks call it; by name, as importing the models takes long
DECODER_ATTENTION = frozenset({"LlamaAttention", "MistralAttention", "GPT2Attention"})
TIME_CONV, CONV2D, CONV3D = "Conv1d", "Conv2d", "Conv3d"  # nn.Conv1d is a convolution, Conv1D a linear layer

_CONVOLUTIONS: dict[str, Any] = {TIME_CONV: nn.Conv1d, CONV2D: nn.Conv2d, CONV3D: nn.Conv3d}
_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: LINEAR,
    Conv1D: CONV1D,
    nn.Embedding: EMBEDDING,
    nn.MultiheadAttention: ATTENTION,
    **{cls: kind for kind, cls in _CONVOLUTIONS.items()},
}
_TRANSPOSED = {CONV1D, EMBEDDING}


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer, or None if it is none that an adapter can be put on."""
    name = type(layer).__name__
    named = name if name in DECODER_ATTENTION else None
    return next((kind for cls, kind in _KINDS.items() if isinstance(layer, cls)), named)


def name_of(layer: nn.Module) -> str:
    """What peft calls the kind of a layer: that of torch which it is or acts as, or bitsandbytes' own."""
    kind = kind_of(layer)
    if kind is None or quantised.backend(layer):
        return type(layer).__name__
    return LINEAR if kind == CONV1D else kind


def features(layer: Layer) -> tuple[int, int]:
    """`(in, out)` of a layer."""
    if quantised.backend(layer):
        return layer.in_features, layer.out_features
    out, inner, *_ = read_weight(layer).shape
    return inner * getattr(layer, "groups", 1), out


def read_weight(layer: Layer) -> Tensor:
    """The canonical weight: a view of the layer's own, or a copy of what a quantised one stands for."""
    return canonical(layer, numbers(layer, layer.weight))


def numbers(layer: Layer, weight: Tensor) -> Tensor:
    """What a weight stands for, that the layer has or that `keep` returned; itself unless it is quantised."""
    backend = quantised.backend(layer)
    return weight if backend is None else backend.read(layer, weight)


def canonical(layer: Layer, weight: Tensor) -> Tensor:
    """A weight as the layer stores it in its canonical form, or the reverse, as a view."""
    return weight.T if kind_of(layer) in _TRANSPOSED else weight


def write(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """Overwrite canonical weight and bias."""
    put(layer, "weight", canonical(layer, weight))
    if bias is not None:
        put(layer, "bias", bias)


def keep(layer: Layer, name: str) -> Tensor:
    """One of the layer's parameters, for `put` to bring back, to the bit."""
    backend = quantised.backend(layer)
    if name == "weight" and backend:
        return backend.keep(layer)
    return layer.get_parameter(name).detach().clone()


@torch.no_grad()
def put(layer: Layer, name: str, value: Tensor) -> None:
    """Overwrite one of the layer's parameters, as the layer stores it, in place so that a tied layer sees it too. A
    quantised weight is replaced."""
    backend = quantised.backend(layer)
    if name != "weight" or not backend:
        layer.get_parameter(name).copy_(value)
    elif type(value) is type(layer.weight):
        backend.put_back(layer, value)
    else:
        backend.write(layer, value)


def channels_last(layer: nn.Module) -> bool:
    """Whether the features are the last dimension of input and output, as in all layers but convolutions."""
    return kind_of(layer) not in _CONVOLUTIONS


def feature_shape(layer: Layer, size: int) -> tuple[int, ...]:
    """The shape in which one value for each of `size` features multiplies an input or output of the layer."""
    return (size, *[1] * (layer.weight.dim() - 2))


def apply(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """What a linear layer or convolution computes with another canonical weight, and without its bias."""
    return F.linear(x, weight) if channels_last(layer) else layer._conv_forward(x, weight, None)


def low_rank(layer: Layer, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
    """Two layers, `in -> r -> out`, whose composition has the layer's own shape of input and output; the second one's
    `bias` is optional."""
    inner, out = features(layer)
    conv = _CONVOLUTIONS.get(kind_of(layer) or "")
    if conv is not None:
        where = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        down = conv(inner, r, layer.kernel_size, **where, bias=False)
        return down, conv(r, out, 1, groups=layer.groups, bias=bias)
    return nn.Linear(inner, r, bias=False), nn.Linear(r, out, bias=bias)


def compose(up: Tensor, down: Tensor) -> Tensor:
    """The canonical weight of `down` followed by `up`: `(out, r[, 1, 1])` and `(r, in, *kernel)` to `(out, in,
    *kernel)`.

    Raises:
        MergeError: `up` has groups: each of its outputs would need all inputs, of which the layer's see a part.
    """
    if up.shape[1] != len(down):
        raise MergeError("An update of a convolution with groups connects all of them, which its own weight cannot.")
    return torch.tensordot(up.flatten(1), down, dims=1)


def embedding_scale(layer: nn.Module) -> float | Tensor:
    """The factor that some embeddings (Gemma 3) apply to the rows they look up."""
    return getattr(layer, "embed_scale", 1.0)
