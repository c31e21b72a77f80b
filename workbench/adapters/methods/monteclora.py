"""MonteCLoRA: LoRA whose A is perturbed in training by a weighted mean of random matrices, with learned spread and
weights (Sengupta et al. 2024, arXiv:2411.04358, section 3). What is trained merges and runs as plain LoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import base_ops
from .lora import Lora, LoraConfig
from .lora_options import MontecloraConfig


class MontecloraSampler(nn.Module):
    """Draws perturbations of A: N matrices (in, r) and their weights.

    Attributes:
        std_prior: logarithm of the spread along each rank, (r,).
        expert_weights_prior: logarithm of the weights' Dirichlet concentration, (N,).
        gaussian_var_prior: the variances last drawn, on a diagonal, (r, r).
        expert_weights: the weights last drawn, (N,).
    """

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, in_features: int, r: int, options: MontecloraConfig):
        super().__init__()
        self.in_features, self.r, self.options = in_features, r, options
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(options.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((options.num_samples,), 1 / options.num_samples))

    def forward(self) -> Tensor:
        """The weighted mean of the perturbations, (r, in)."""
        N, r, like = self.options.num_samples, self.r, self.std_prior
        # the diagonal of a matrix with Wishart distribution: sums of r squared normal numbers
        scale = torch.randn(r, r, device=like.device).square().sum(0).to(like.dtype)
        variance = ((2 * self.std_prior).exp() * scale).clamp(min=1e-3)
        # the logarithms of weights with Dirichlet distribution are roughly normal
        spread = (-self.expert_weights_prior).exp()
        spread = (spread * (1 - 2 / N) + spread.sum() / N**2).clamp(min=1e-6) + 1e-6
        logits = self.expert_weights_prior - self.expert_weights_prior.mean()
        weights = torch.softmax(logits + spread.sqrt() * torch.randn_like(spread), dim=-1)
        self.gaussian_var_prior, self.expert_weights = variance.diag(), weights
        drawn = torch.randn(N, r, self.in_features, device=like.device, dtype=like.dtype)
        return self.options.sample_scaler * variance.sqrt()[:, None] * torch.einsum("n,nri->ri", weights, drawn)

    def penalty(self) -> Tensor:
        """How far the distributions are from their priors; with `use_entropy`, how unequal the weights are."""
        options, r = self.options, self.r
        posterior = self.expert_weights_prior.exp()
        prior = torch.full_like(posterior, options.dirichlet_prior)
        # peft adds the difference of the logarithms of the gamma functions; Kullback and Leibler subtract it
        of_weights = (
            torch.lgamma(posterior.sum())
            - torch.lgamma(prior.sum())
            + (torch.lgamma(posterior) - torch.lgamma(prior)).sum()
            + ((posterior - prior) * (torch.digamma(posterior) - torch.digamma(posterior.sum()))).sum()
        )
        logarithm = 2 * self.std_prior
        of_spread = 0.5 * r * (logarithm.exp().sum() - logarithm.sum() - r)
        variance = self.gaussian_var_prior.diag().clamp(min=1e-6)
        of_samples = 0.5 * options.num_samples * (variance.sum() - variance.log().sum() - r)
        divergence = options.kl_loss_weight * (of_weights + of_spread + of_samples)
        return divergence + self.expert_weights.square().sum() if options.use_entropy else divergence


class Monteclora(Lora):
    """LoRA with a `lora_monteclora_sampler`."""

    draws = True

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        assert isinstance(config.monteclora_config, MontecloraConfig)
        inner, _ = base_ops.features(layer)
        self.lora_monteclora_sampler = MontecloraSampler(inner, self.r, config.monteclora_config)

    def update(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().update(x)
        return self.lora_B(F.linear(x, self.lora_A.weight + self.lora_monteclora_sampler())) * self.scaling

    def penalty(self, options: MontecloraConfig) -> Tensor:
        """The sampler's, in training; zero otherwise."""
        return self.lora_monteclora_sampler.penalty() if self.training else torch.zeros(())
