"""DoRA: W' = m (W + s B A) / ||W + s B A||, where the norm is taken of each output's weights and the magnitude m trains
(Liu et al. 2024, arXiv:2402.09353, eq. 5). The norm counts as a constant in the backward pass (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import base_ops
from ..adapter import Slot
from .lora import Lora, LoraConfig, LoraEmbedding


class Magnitude(nn.Module):
    """Holds m, so that `layer.lora_magnitude_vector[adapter].weight` answers."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Dora(Lora):
    """LoRA on the direction of the weights and a trained magnitude: `lora_magnitude_vector`, `(out,)`, or
    `(1, out, *1)` for a convolution."""

    def __init__(self, layer: base_ops.Layer, config: LoraConfig, path: str):
        super().__init__(layer, config, path)
        self._layer = [layer]  # in a list, so that it is not a part of the adapter
        weight = base_ops.read_weight(layer) if self.base_weight is None else self.base_weight
        offload = config.runtime_config.ephemeral_gpu_offload and torch.cuda.is_available()  # type: ignore[union-attr]
        norm = self.norm(weight.to("cuda") if offload else weight).to(weight.device)
        self.lora_magnitude_vector = Magnitude(norm if weight.dim() == 2 else self.shaped(norm)[None])

    def shaped(self, values: Tensor) -> Tensor:
        """One value for each output feature, in the shape that multiplies the layer's output."""
        return values.view(base_ops.feature_shape(self._layer[0], values.numel()))

    def norm(self, weight: Tensor) -> Tensor:
        """||W + s B A|| for each output, `(out,)`, without gradient."""
        up, down = (factor.detach() for factor in self.factors())
        if down.is_meta:  # a file will bring the values
            return weight.detach().flatten(1).norm(dim=1)
        up, down = up.to(weight.device), down.to(weight.device)
        # on a convolution with groups this is not what the factors do to the output, but the norm that peft takes
        update = (up.reshape(-1, len(down)) @ down.flatten(1)).view_as(weight) * self.scaling
        return (weight.detach() + update).flatten(1).norm(dim=1)

    def factor(self) -> Tensor:
        """m / ||W + s B A||, `(out,)`, of the layer's own weight, whatever else acts or is merged."""
        return self.lora_magnitude_vector.weight.flatten() / self.norm(self.own_weights()[0])

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.own_weights()
        x, factor = self.drop(x), self.shaped(self.factor())
        if self.training and isinstance(self.lora_dropout, nn.Dropout):
            direct = base_ops.apply(self._layer[0], weight.to(x.dtype), x)
        else:
            direct = y if bias is None else y - self.shaped(bias)
        return y + (factor - 1) * direct + factor * self.update(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor, own = self.factor(), self.own_weights()[1]
        if bias is not None and own is not None:  # what other adapters added to the bias grows along
            bias = own + (factor * (bias - own)).to(bias.dtype)
        factor = factor.view(-1, *[1] * (weight.dim() - 1))
        return (factor * (weight + self.delta())).to(weight.dtype), bias

    def slots(self) -> dict[str, Slot]:
        slots = super().slots()
        return {name.replace("_magnitude_vector.weight", "_magnitude_vector"): slot for name, slot in slots.items()}


class DoraEmbedding(Dora, LoraEmbedding):
    """DoRA on an embedding: the magnitude is that of each dimension over the vocabulary."""
