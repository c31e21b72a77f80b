"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354, section 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser with a learning rate of its own for B.

    Args:
        model: whose trainable parameters it gets.
        optimizer_cls: its class.
        lr: learning rate of A, and of what is neither A nor B.
        loraplus_lr_ratio: B's learning rate divided by A's, 1 or more.
        kwargs: `loraplus_weight_decay` (0.0; not for biases of B and other vectors), `loraplus_lr_embedding` (1e-6, for
            both factors of embeddings), and arguments of the optimiser.
    """
    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: dict[str, list[Tensor]] = {"A": [], "embedding": [], "B": [], "vectors": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if ".lora_embedding_" in name:
            groups["embedding"].append(p)
        elif "lora_B" in name or p.ndim == 1:
            groups["vectors" if "bias" in name or id(p) in norms else "B"].append(p)
        else:
            groups["A"].append(p)
    fast = lr * loraplus_lr_ratio
    settings = [
        {"params": groups["A"], "weight_decay": decay, "lr": lr},
        {"params": groups["embedding"], "weight_decay": decay, "lr": embedding_lr},
        {"params": groups["B"], "weight_decay": decay, "lr": fast},
        {"params": groups["vectors"], "weight_decay": 0.0, "lr": fast},
    ]
    return optimizer_cls(settings, lr=lr, **kwargs)  # type: ignore[call-arg]
