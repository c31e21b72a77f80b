"""LoRA-FA: only B trains, by the gradient that serves the full weight best (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from workbench.errors import ConfigError

from ..model import PeftModel
from ..tuner_layer import TunerLayer


class LoraFAOptimizer(Optimizer):
    """Adam with decoupled weight decay, whose gradient for B is the one that brings the update nearest to the full
    gradient while A stays fixed: g (A A^T)^-1 / s^2.

    Args:
        params: groups that have, beside `params`, their `names` and `scaling_factors` (s; None where it is not LoRA).
            A stands before its B. `create_lorafa_optimizer` makes them.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of a parameter, times the learning rate, that goes at each step.
        correct_bias: make up for means that start at zero.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0 or eps < 0:
            raise ConfigError(f"lr and eps must not be negative, but are {lr} and {eps}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas must be in [0, 1), not {betas}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives what `closure` gives."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            scalings = group["scaling_factors"]
            down = None
            for p, name, s in zip(group["params"], group["names"], scalings, strict=True):
                if "lora_A" in name or "lora_embedding_A" in name:
                    down = p
                elif p.grad is not None and ("lora_B" in name or "lora_embedding_B" in name) and down is not None:
                    grad = p.grad @ torch.linalg.pinv((down @ down.T).float()).to(p.grad.dtype) / s**2
                    self.adam(p, grad, self.state[name[: name.index("lora")] + "lora"], group, "_B")
                elif p.grad is not None:
                    self.adam(p, p.grad, self.state[name], group)
        return loss

    def adam(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], suffix: str = "") -> None:
        """One step of Adam with decoupled weight decay."""
        mean, square = (state.setdefault(f"{key}{suffix}", torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
        state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(grad * grad, 1 - beta2)
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(mean, square.sqrt() + group["eps"], value=-step_size)
        p.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A `LoraFAOptimizer` for a model with LoRA adapters, whose A no longer train.

    Args:
        r, lora_alpha: of peft's signature; each layer's own scaling counts.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        use_rslora: deprecated; must be what the active adapters' configurations say.

    Raises:
        ConfigError: `use_rslora` is not what a configuration says.
    """
    if use_rslora is not None:
        wrong = [
            name
            for name in model.active_adapters
            if getattr(model.peft_config[name], "use_rslora", False) != use_rslora
        ]
        if wrong:
            raise ConfigError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the configurations of {wrong} "
                "say otherwise; set it in LoraConfig.",
                "use_rslora",
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after 2026-11-01. Please "
            "configure rsLoRA via LoraConfig instead.",
            FutureWarning,
            stacklevel=2,
        )
    scalings = {
        id(p): adapter.scaling
        for layer in model.modules()
        if isinstance(layer, TunerLayer)
        for adapter in layer.adapters.values()
        if hasattr(adapter, "scaling")
        for p in adapter.parameters()
    }
    named = list(model.named_parameters())
    for name, p in named:
        if "lora_A" in name:
            p.requires_grad_(False)
    group = {
        "params": [p for _, p in named],
        "names": [name for name, _ in named],
        "scaling_factors": [scalings.get(id(p)) for _, p in named],
        "lr": lr,
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])
