"""VeLoRA: LoRA that keeps, for the gradient of A, one number for each group of an input's features instead of the input
(Miles et al. 2024, arXiv:2405.17991, section 3): the group's projection onto one direction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import base_ops
from .lora import Lora, LoraConfig


def grouped(x: Tensor, num_groups: int) -> Tensor:
    """Inputs (..., in) as (tokens, groups, features of a group); the last group is filled up with zeros."""
    size = group_size(x.shape[-1], num_groups)
    return F.pad(x, (0, num_groups * size - x.shape[-1])).reshape(-1, num_groups, size)


def group_size(features: int, num_groups: int) -> int:
    """Features of a group."""
    return -(-features // num_groups)


def compressed(x: Tensor, direction: Tensor, num_groups: int) -> Tensor:
    """Inputs (..., in) as (tokens, groups)."""
    return grouped(x, num_groups) @ direction


def reconstructed(numbers: Tensor, direction: Tensor, in_features: int, velora_scale: float) -> Tensor:
    """What is known of the inputs, (tokens, in), of their numbers, (tokens, groups)."""
    return torch.outer(numbers.flatten(), direction).view(len(numbers), -1)[:, :in_features] * velora_scale


def normalised(direction: Tensor) -> Tensor:
    """The direction, of length one and in float32; zero becomes all-equal."""
    direction = direction.float()
    return F.normalize(torch.where(direction.norm() > 0, direction, torch.ones_like(direction)), dim=0)


class VeloraFunction(torch.autograd.Function):
    """A linear layer that forgets its input: `apply(x, weight, bias, direction, num_groups, velora_scale)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, direction: Tensor, num_groups: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(compressed(x, direction.to(x.dtype), num_groups), weight, direction)
        ctx.shape, ctx.scale = x.shape, scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        numbers, weight, direction = ctx.saved_tensors
        of_y = gradients[0].reshape(-1, len(weight))
        of_x = (of_y @ weight.to(of_y.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            x = reconstructed(numbers.to(of_y.dtype), direction.to(of_y.dtype), ctx.shape[-1], ctx.scale)
            of_weight = (of_y.T @ x).to(weight.dtype)
        of_bias = of_y.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None, None


class Velora(Lora):
    """LoRA with `lora_velora_embed`: the direction, (in / groups,)."""

    views = (*Lora.views, "lora_velora_initialized")

    lora_velora_embed: Tensor

    @property
    def lora_velora_initialized(self) -> bool:
        """Whether the direction is known."""
        return not self.lora_velora_embed.is_meta and bool(self.lora_velora_embed.any())

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        options: Any = config.velora_config
        self.options = options
        size = group_size(base_ops.features(layer)[0], options.num_groups)
        drawn = options.init_type == "random"
        self.by_token = drawn  # otherwise the direction is the mean of a batch, padding and all
        self.register_buffer("lora_velora_embed", normalised(torch.randn(size)) if drawn else torch.zeros(size))

    def update(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().update(x)
        self.follow(x.detach())
        A, options = self.lora_A.weight, self.options
        low = VeloraFunction.apply(x, A, None, self.lora_velora_embed, options.num_groups, options.scale)
        return self.lora_B(low) * self.scaling

    def follow(self, x: Tensor) -> None:
        """Take the direction from a batch of inputs, where it comes from there."""
        wanted = {"batch_average": True, "batch_average_once": not self.lora_velora_initialized, "random": False}
        if wanted[self.options.init_type]:
            mean = grouped(x, self.options.num_groups).flatten(0, 1).mean(0)
            self.lora_velora_embed.copy_(normalised(mean))
