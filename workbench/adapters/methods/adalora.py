"""AdaLoRA: y + s B diag(E) A x, an update in the form of a singular value decomposition whose least important triplets
(a row of A, a value of E, a column of B) are dropped while it trains, so that layers that matter keep more of them
(Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from ..adapter import DeltaAdapter, Slot
from .lora import LoraConfig

if TYPE_CHECKING:
    from ..tuner import Tuner

KINDS = frozenset({base_ops.LINEAR, base_ops.CONV1D, base_ops.CONV2D})
# what LoRA has and this method does not: without effect, as in peft
WITHOUT_EFFECT = ("r", "use_rslora", "alpha_pattern", "eva_config", "corda_config", "lora_ga_config", "lora_bias")
RANK_DIM = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # the dimension that counts triplets


@dataclass
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA. Of LoRA's options `r`, `use_rslora`, `alpha_pattern` and `lora_bias` have no effect.

    Args:
        target_r: how many triplets a layer keeps on average; nothing is dropped unless this is below init_r.
        init_r: how many triplets each layer starts with.
        tinit: the steps before the first are dropped.
        tfinal: the last steps, in which those that are left train on.
        deltaT: steps between two decisions.
        beta1: share of the past in the running mean of a weight's importance, in (0, 1).
        beta2: share of the past in the running mean of its uncertainty, in (0, 1).
        orth_reg_weight: weight of the penalty that keeps A and B orthogonal; it is added to the model's loss.
        total_step: the number of training steps; a study sets it by itself.
        rank_pattern: which triplets are kept, a list of init_r truth values by "<module>.lora_E"; set in training.
        lora_alpha: the update is scaled by lora_alpha / init_r.
        init_lora_weights: start with E zero; false: random.

    Raises:
        ConfigError: the steps leave no time for dropping, or a value is refused.
    """

    peft_type: str | None = "ADALORA"
    steps_field: ClassVar[str | None] = "total_step"

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, what in (("use_dora", "DoRA"), ("loftq_config", "LOFTQ")):
            if getattr(self, name):
                raise ConfigError(f"{self.peft_type} does not support {what}.", name)
        kept, self.rank_pattern = self.rank_pattern, {}  # LoRA's holds ranks
        super().__post_init__()
        self.rank_pattern = kept
        if isinstance(self.init_r, bool) or not isinstance(self.init_r, int) or self.init_r < 1:
            raise ConfigError(f"init_r must be a whole number from 1, not {self.init_r!r}.", "init_r")
        defaults = {f.name: f.default for f in fields(self)}
        for name in WITHOUT_EFFECT:
            if getattr(self, name) and getattr(self, name) != defaults[name]:
                hint = " If you intended to set the initial rank, use `init_r` instead." if name == "r" else ""
                warnings.warn(f"Note that `{name}` is not used in AdaLora and will be ignored.{hint}", stacklevel=3)
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0.", "total_step")
        if self.orth_reg_weight < 0:
            raise ConfigError(
                f"`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}.",
                "orth_reg_weight",
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in (0, 1), not {getattr(self, name)!r}.", name)
        if self.deltaT < 1:
            raise ConfigError(f"deltaT must be at least 1, not {self.deltaT!r}.", "deltaT")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`: {self.tinit} steps before it and {self.tfinal} after it of {self.total_step} are all.",
                "tfinal" if self.tfinal else "tinit",
            )

    def budget(self, step: int, layers: int) -> int:
        """How many triplets all layers together hold after a step: init_r each until `tinit`, target_r each from
        `tfinal` steps before the end, and on a cubic curve in between (eq. 12)."""
        start, end = self.init_r * layers, self.target_r * layers
        span = self.last_decision - self.tinit
        left = min(max(1 - (step - self.tinit) / span, 0), 1)
        return int((start - end) * left**3 + end)

    @property
    def last_decision(self) -> int:
        """The step after which no triplet is dropped or comes back."""
        assert self.total_step is not None
        return self.total_step - self.tfinal


class AdaLora(DeltaAdapter):
    """`lora_A`: (init_r, in * kernel), `lora_E`: (init_r, 1), `lora_B`: (out, init_r). A checkpoint holds the kept
    triplets only.

    Attributes:
        kept: which triplets are kept, (init_r,).
    """

    views = ("r", "lora_alpha", "scaling", "lora_dropout", "lora_A", "lora_E", "lora_B", "ranknum")

    kept: Tensor

    def __init__(self, layer: base_ops.Layer, config: AdaLoraConfig, path: str):
        super().__init__()
        self.r, self.lora_alpha = config.init_r, config.lora_alpha
        self.scaling = self.initial_scaling = self.lora_alpha if self.lora_alpha > 0 else self.r
        self.shape = tuple(base_ops.read_weight(layer).shape)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.randn(self.r, math.prod(self.shape[1:])))
        self.lora_E = nn.Parameter(torch.randn(self.r, 1))
        self.lora_B = nn.Parameter(torch.randn(self.shape[0], self.r))
        # never on the meta device: no file holds these
        self.ranknum = nn.Parameter(torch.full((1,), float(self.r), device=layer.weight.device), requires_grad=False)
        kept = (config.rank_pattern or {}).get(pattern_key(path), [True] * self.r)
        if len(kept) != self.r:
            raise ConfigError(
                f"rank_pattern has {len(kept)} values for {path}, which has init_r={self.r}.", "rank_pattern"
            )
        self.register_buffer("kept", torch.tensor(kept, device=layer.weight.device), persistent=False)
        self._layer = [layer]  # in a list, so that it is not a part of the adapter
        self._config, self._key = config, pattern_key(path)
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        super().requires_grad_(requires_grad)
        self.ranknum.requires_grad_(False)
        return self

    def scale(self) -> Tensor:
        """The factor s, (1,); it stays as it is when triplets are dropped."""
        return self.scaling / (self.ranknum + 1e-5)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        x, layer = self.lora_dropout(x.to(self.lora_A.dtype)), self._layer[0]
        if not base_ops.channels_last(layer):
            return y + base_ops.apply(layer, self.delta(), x)
        return y + F.linear(F.linear(x, self.lora_A * self.lora_E), self.lora_B) * self.scale()

    def delta(self) -> Tensor:
        return (self.lora_B @ (self.lora_A * self.lora_E) * self.scale()).view(self.shape)

    # ---------------------------------------------------------------- files

    def slots(self) -> dict[str, Slot]:
        return {name: slot for name, slot in super().slots().items() if name in RANK_DIM}

    def saved(self) -> dict[str, Tensor]:
        tensors = super().saved()
        if self.kept.all():
            return tensors
        return {name: t.index_select(RANK_DIM[name], self.places.to(t.device)) for name, t in tensors.items()}

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter with a file's triplets in their places, and zeros in those of triplets that were dropped."""
        dim = RANK_DIM[name]
        if self.kept.all() or tensor.shape[dim] != self.kept.sum():
            return tensor
        shape = list(tensor.shape)
        shape[dim] = self.r
        return tensor.new_zeros(shape).index_copy(dim, self.places.to(tensor.device), tensor)

    @property
    def places(self) -> Tensor:
        """The indices of the kept triplets."""
        return self.kept.nonzero().flatten()

    # ---------------------------------------------------------------- training

    def penalty(self) -> Tensor:
        """How far rows of A and columns of B are from orthonormal: the mean Frobenius norm of A Aᵀ - I and Bᵀ B - I
        (eq. 4, where it is squared)."""
        identity = torch.eye(self.r, dtype=self.lora_A.dtype, device=self.lora_A.device)
        grams = (self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B)
        return torch.stack([torch.linalg.matrix_norm(gram - identity) for gram in grams]).mean()

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Add the last gradients to the running means of each weight's importance |w dL/dw| and of how much that varies
        (eq. 9 and 10)."""
        for name in RANK_DIM:
            weight = getattr(self, name)
            now = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()
            mean = beta1 * self.importance.get(name, torch.zeros_like(now)) + (1 - beta1) * now
            spread = beta2 * self.uncertainty.get(name, torch.zeros_like(now)) + (1 - beta2) * (now - mean).abs()
            self.importance[name], self.uncertainty[name] = mean, spread

    def scores(self) -> Tensor:
        """Each triplet's importance, (init_r,): that of its value, and the mean ones of its two vectors (eq. 7)."""
        if not self.importance:
            return torch.zeros_like(self.lora_E).flatten()
        score = {name: mean * self.uncertainty[name] for name, mean in self.importance.items()}
        return score["lora_E"].flatten() + score["lora_A"].mean(1) + score["lora_B"].mean(0)

    @torch.no_grad()
    def drop(self, kept: Tensor) -> None:
        """Keep these triplets, (init_r,); the values of the others become zero."""
        self.kept.copy_(kept)
        self.lora_E.masked_fill_(~self.kept[:, None], 0)

    def memory(self) -> dict[str, Tensor]:
        means = {f"importance.{name}": mean for name, mean in self.importance.items()}
        return super().memory() | means | {f"uncertainty.{name}": mean for name, mean in self.uncertainty.items()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        super().remember(memory)
        for means, start in ((self.importance, "importance."), (self.uncertainty, "uncertainty.")):
            for name in RANK_DIM:
                if start + name in memory:
                    means[name] = memory[start + name].to(self.lora_E.device, copy=True)
        self._config.rank_pattern = (self._config.rank_pattern or {}) | {self._key: self.kept.tolist()}


def pattern_key(path: str) -> str:
    """The key in `rank_pattern` of the layer at a path."""
    return f"{path}.lora_E"


def trained(tuner: Tuner, name: str) -> dict[str, AdaLora]:
    """The adapters of this name that train, by the path of their layer."""
    found: dict[str, Any] = {path: layer.adapters[name] for path, layer in tuner.layers_of(name)}
    return {path: a for path, a in found.items() if isinstance(a, AdaLora) and a.lora_E.requires_grad}


def penalty(tuner: Tuner, name: str) -> Tensor | None:
    """What is added to the loss: `orth_reg_weight` times the layers' mean penalty. (peft leaves it out where the
    configuration has no `task_type`.)"""
    config: Any = tuner.peft_config[name]
    each = [adapter.penalty() for adapter in trained(tuner, name).values()]
    return config.orth_reg_weight * torch.stack([p.to(each[0]) for p in each]).mean() if each else None


def allocate(tuner: Tuner, name: str, step: int) -> None:
    """After an optimiser step, counted from 1 and before the gradients are cleared, drop the triplets of the least
    importance over all layers, as many as the budget says (algorithm 1)."""
    config: Any = tuner.peft_config[name]
    adapters = trained(tuner, name)
    last = config.last_decision
    if not adapters or step > last:
        for adapter in adapters.values():
            adapter.drop(adapter.kept)
        return
    if step < last:
        for adapter in adapters.values():
            adapter.observe(config.beta1, config.beta2)
    if step == last or (step > config.tinit and step % config.deltaT == 0):
        scores = torch.cat([adapter.scores().cpu() for adapter in adapters.values()])
        surplus = len(scores) - config.budget(step, len(adapters))
        threshold = scores.kthvalue(surplus).values.item() if surplus > 0 else -math.inf
        for adapter in adapters.values():
            adapter.drop(adapter.scores() > threshold)
        config.rank_pattern = {pattern_key(path): adapter.kept.tolist() for path, adapter in adapters.items()}
    if step == last:
        for adapter in adapters.values():
            adapter.importance, adapter.uncertainty = {}, {}
