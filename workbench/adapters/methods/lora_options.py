"""The options of LoRA's variants: what the fields of `LoraConfig` hold that ask for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workbench.errors import ConfigError


def _check_positive(options: object, name: str, field_name: str) -> None:
    value = getattr(options, name)
    if value <= 0:
        raise ConfigError(f"`{name}` must be greater than 0, got {value}.", field_name)


@dataclass
class ArrowConfig:
    """Options of a router over LoRA adapters; see `methods.arrow`.

    Args:
        top_k: how many adapters act on a token.
        router_temperature: temperature of the softmax over their scores; lower is sharper.
        use_gks: subtract what the general adapters know from those of the tasks (GenKnowSub).
        rng_seed: seed of the power iteration's start.

    Attributes:
        task_adapter_names: the adapters to route over; `create_arrow_model` sets them.
        gks_adapter_names: the general adapters; `create_arrow_model` sets them.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "top_k", "arrow_config")
        _check_positive(self, "router_temperature", "arrow_config")


@dataclass
class BdLoraConfig:
    """Options of block-diagonal LoRA; see `methods.bdlora`.

    Args:
        target_modules_bd_a: parts of the paths of modules whose A is block-diagonal.
        target_modules_bd_b: parts of the paths of modules whose B is block-diagonal.
        nblocks: number of blocks, which divides r and the layer's width.
        match_strict: refuse modules that neither list means; otherwise they get plain LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        overlap = set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or [])
        if overlap:
            raise ConfigError(
                f"Found overlapping modules in target_modules_bd lists: {sorted(overlap)} are in both.", "use_bdlora"
            )


@dataclass
class KasaConfig:
    """Options of KaSA; see `methods.kasa`.

    Args:
        beta: weight of the singular values' penalty.
        gamma: weight of the penalty that keeps the factors orthonormal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` must be non-negative, got {getattr(self, name)}.", "kasa_config")


@dataclass
class MontecloraConfig:
    """Options of MonteCLoRA; see `methods.monteclora`.

    Args:
        num_samples: perturbations of A drawn in each forward pass.
        use_entropy: penalise weights of the samples that are far from uniform.
        dirichlet_prior: concentration of the prior of the samples' weights.
        sample_scaler: size of the perturbations.
        kl_loss_weight: weight of the divergence from the prior.
        buffer_size: number of draws made at once.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _check_positive(self, name, "monteclora_config")


@dataclass
class VeloraConfig:
    """Options of VeLoRA; see `methods.velora`.

    Args:
        num_groups: number of groups into which an input's features are split; each is kept as one number.
        scale: factor on the inputs that the backward pass reconstructs.
        init_type: where the direction comes from: the mean of each batch ("batch_average"), of the first batch
            ("batch_average_once"), or chance ("random").
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be positive, got {getattr(self, name)}.", "velora_config")
        known = ("batch_average", "batch_average_once", "random")
        if self.init_type not in known:
            raise ConfigError(f"Unsupported `init_type` {self.init_type!r}; known are {known}.", "velora_config")
