"""KaSA: LoRA with singular values between its factors, W' = W_k + s B diag(d) A, on the base weight without its r
smallest singular values (Wang et al. 2024, arXiv:2412.06071, eq. 4-8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from .lora import Lora, LoraConfig
from .lora_options import KasaConfig


class Kasa(Lora):
    """`lora_diag`: the singular values, (r,).

    Raises:
        ConfigError: r leaves nothing of the base weight.
    """

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        W = base_ops.read_weight(layer).detach()
        if self.r >= min(W.shape):
            raise ConfigError(
                f"KaSA requires `r` ({self.r}) to be smaller than min(in_features, out_features) ({min(W.shape)}), so "
                f"that something is left of the weight of {path}.",
                "r",
            )
        self.lora_diag = nn.Parameter(torch.randn(self.r))
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        kept = len(S) - self.r
        self.base_weight = (U[:, :kept] * S[:kept] @ Vh[:kept]).to(W.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        up, down = super().factors()
        return up * self.lora_diag, down

    def update(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x) * self.lora_diag) * self.scaling

    def penalty(self, options: KasaConfig) -> Tensor:
        """beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|), with Frobenius norms (eq. 9-11)."""
        up, down = self.lora_B.weight.float(), self.lora_A.weight.float()
        identity = torch.eye(self.r, device=up.device)
        off = [torch.linalg.matrix_norm(gram - identity) for gram in (up.T @ up, down @ down.T)]
        return options.beta * self.lora_diag.float().square().sum() + options.gamma * torch.stack(off).sum()
