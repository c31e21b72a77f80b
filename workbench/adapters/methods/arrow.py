"""Arrow: each token goes through the LoRA adapters whose updates it excites most (Ostapenko et al. 2024,
arXiv:2405.11157, section 4), optionally without what general adapters know as well (GenKnowSub, Bagherifard et al.
2025, ACL 2025 short papers, 54)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import MergeError

from .. import base_ops
from .lora import Lora, LoraConfig
from .lora_options import ArrowConfig

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"


class Arrow(Lora):
    """Routes over the other LoRA adapters on its layer: those called `gks_N` are general, all others experts. Its own
    factors are in peft's files, but do nothing."""

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        assert isinstance(config.arrow_config, ArrowConfig)
        self.options = config.arrow_config
        self._known: tuple[list[tuple[str, list[int]]], Tensor] | None = None

    def experts(self) -> tuple[dict[str, Lora], list[Lora]]:
        """The experts by name, and the general adapters."""
        lora = {name: a for name, a in self.beside().items() if isinstance(a, Lora) and not isinstance(a, Arrow)}
        general = [adapter for name, adapter in lora.items() if name.startswith(GKS_ADAPTER_PREFIX)]
        return {name: a for name, a in lora.items() if not name.startswith(GKS_ADAPTER_PREFIX)}, general

    def stacks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The experts' A (experts, r, in), B (experts, out, r), and scalings (experts,)."""
        experts, general = self.experts()
        A, B = (torch.stack([adapter.factors()[i] for adapter in experts.values()]) for i in (1, 0))
        if self.options.use_gks:
            A = A - torch.stack([adapter.factors()[1] for adapter in general]).mean(0).detach()
            B = B - torch.stack([adapter.factors()[0] for adapter in general]).mean(0).detach()
        return A, B, torch.tensor([adapter.scaling for adapter in experts.values()], device=A.device, dtype=A.dtype)

    def prototypes(self, A: Tensor, B: Tensor) -> Tensor:
        """Each expert's first right singular vector, (experts, in); found again only after they changed."""
        experts, _ = self.experts()
        versions = [(name, [factor._version for factor in a.factors()]) for name, a in experts.items()]
        if self._known is None or self._known[0] != versions:
            # B A = Qb (Rb Ra^T) Qa^T, of which the middle is small: no product (out, in) is made
            Qa, Ra = torch.linalg.qr(A.detach().float().mT)
            _, Rb = torch.linalg.qr(B.detach().float())
            _, _, Vh = torch.linalg.svd(Rb @ Ra.mT)
            self._known = versions, (Qa @ Vh[:, 0, :, None]).squeeze(-1).to(A.dtype)
        return self._known[1]

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        A, B, scaling = self.stacks()
        x = x.to(A.dtype)
        scores = (x @ self.prototypes(A, B).T).abs()
        best, chosen = scores.topk(self.options.top_k, dim=-1)
        shares = torch.softmax(best / self.options.router_temperature, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, shares)
        low = torch.einsum("...i,eri->...er", x, A) * (weights * scaling)[..., None]
        return y + self.lora_dropout(torch.einsum("...er,eor->...o", low, B))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise MergeError("Cannot merge an active Arrow router adapter. Remove it first.")
