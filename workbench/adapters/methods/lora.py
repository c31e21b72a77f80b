"""LoRA: y + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3), with s = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import ConfigError, ConfigTypeError, MergeError, PeftWarning, TargetError

from .. import base_ops
from ..adapter import Adapter, DeltaAdapter
from ..config import PeftConfig, TargetConfig, TaskType, check_ranks, pattern_value
from ..groups import Groups, numbers, padded
from . import lora_init
from .lora_init import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .lora_options import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

KINDS = frozenset(
    {
        base_ops.LINEAR,
        base_ops.CONV1D,
        base_ops.EMBEDDING,
        base_ops.TIME_CONV,
        base_ops.CONV2D,
        base_ops.CONV3D,
        base_ops.ATTENTION,
    }
)


@dataclass
class LoraRuntimeConfig:
    """How to compute, which no file keeps.

    Args:
        ephemeral_gpu_offload: move weights that lie in main memory to the GPU for the norms that DoRA starts from.
    """

    ephemeral_gpu_offload: bool = False


SUBCONFIGS: dict[str, type] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "runtime_config": LoraRuntimeConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
}
VARIANTS = (
    *("use_dora", "alora_invocation_tokens", "use_qalora", "velora_config", "monteclora_config", "use_bdlora"),
    *("arrow_config", "kasa_config"),
)


@dataclass
class LoraConfig(TargetConfig):
    """Configuration of LoRA, beside the choice of modules in `TargetConfig`.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of the update.
        fan_in_fan_out: the layer stores its weight as (in, out); set for `Conv1D` by itself.
        bias: which biases train: "none", "all", or "lora_only" (those of adapted layers).
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        init_lora_weights: true: A uniform, B zero; "gaussian": A normal with deviation 1/r, B zero; false: both random;
            "pissa", "pissa_niter_N", "olora", "mica", "orthogonal", "loftq", "corda", "lora_ga": see `lora_init`;
            "eva": as true until `initialize_lora_eva_weights` is called.
        rank_pattern: r for modules whose name matches a key (suffix or regular expression).
        alpha_pattern: lora_alpha for modules whose name matches a key.
        trainable_token_indices: tokens whose embeddings train as well: a list, or a dict from module name to list.
        loftq_config, eva_config, corda_config, lora_ga_config: options of these initialisations.
        use_dora: learn magnitude and direction apart, see `dora`.
        runtime_config: how, not what, to compute; not saved.
        lora_bias: B has a bias.
        velora_config: keep less of the inputs for the gradients, see `velora`.
        alora_invocation_tokens: act from the last occurrence of these tokens on, see `alora`.
        use_qalora, qalora_group_size: update groups of inputs alike, see `qalora`.
        monteclora_config: train on perturbed factors, see `monteclora`.
        use_bdlora: factors of blocks, see `bdlora`.
        arrow_config: route tokens over other adapters, see `arrow`.
        kasa_config: singular values that train, see `kasa`.
        layer_replication: build the model of these ranges of its layers, [start, end), which share their weights but
            not their adapters, see `replication`.
        target_parameters: names or suffixes of bare parameters to adapt, see `lora_parameters`.
        ensure_weight_tying: let layers that share the input embedding's weight share its adapter, where one of them is
            a target or in `modules_to_save`.
        megatron_config, megatron_core: of peft, known so that its files can be read; refused when in use.

    Raises:
        ConfigError: a value is refused, or an option is not implemented here.
    """

    peft_type: str | None = "LORA"
    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    use_dora: bool = False
    runtime_config: LoraRuntimeConfig | dict[str, Any] = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    velora_config: VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: ArrowConfig | dict[str, Any] | None = None
    kasa_config: KasaConfig | dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, self.rank_pattern)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}.", "lora_dropout")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias must be none, all or lora_only, not {self.bias!r}.", "bias")
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.", "use_dora")
        if self.megatron_config:
            raise ConfigError("megatron_config is not implemented; leave it at its default.", "megatron_config")
        for name, kind in SUBCONFIGS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, kind(**{f.name: value[f.name] for f in fields(kind) if f.init and f.name in value}))
            elif value is not None and not isinstance(value, kind):
                raise ConfigTypeError(
                    f"`{kind.__name__}` must be a `{kind.__name__}`, a dict, or None. But {name} is {value!r}.", name
                )
        if isinstance(self.target_parameters, str):
            raise ConfigTypeError("`target_parameters` must be a list of strings or None.", "target_parameters")
        self._check_initialisation()
        asked = [name for name in VARIANTS if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(f"Invalid or unsupported variant combination: {', '.join(asked)}.", asked[1])
        if self.alora_invocation_tokens and self.task_type != TaskType.CAUSAL_LM:
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=3)

    @property
    def variant(self) -> str | None:
        """The option that asks for another form than plain LoRA; None for plain LoRA."""
        return next((name for name in VARIANTS if getattr(self, name)), None)

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, bool) and not lora_init.known(init):
            names = ", ".join((*lora_init.PLAIN, "pissa_niter_[number of iters]", *lora_init.INITIALISATIONS))
            raise ConfigError(f"init_lora_weights must be true, false, {names}, not {init!r}.", "init_lora_weights")
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = asdict(self.loftq_config)  # peft's files and users expect a dict here
        if init == "loftq" and not self.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.", "loftq_config")
        if init == "eva" and self.eva_config is None:
            warnings.warn(
                "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.",
                stacklevel=3,
            )
            self.eva_config = EvaConfig()
        if init == "corda" and self.corda_config is None:
            warnings.warn(
                "`init_lora_weights` is 'corda' but `corda_config` is not specified. Using default CorDA config.",
                stacklevel=3,
            )
            self.corda_config = CordaConfig()
        for name in ("loftq", "eva", "corda"):
            if getattr(self, f"{name}_config") and init != name:
                warnings.warn(
                    f"`{name}_config` specified but will be ignored when `init_lora_weights` is not '{name}'.",
                    stacklevel=3,
                )
        if self.lora_bias and not isinstance(init, bool):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={init} instead.",
                "lora_bias",
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("The argument lora_bias=True is not supported for DoRA, use use_dora=False.", "lora_bias")
        patterns = self.rank_pattern or self.alpha_pattern
        if self.use_rslora and patterns and isinstance(init, str) and init.startswith(lora_init.SPLITTING):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                f"base weights ({init}) will not be possible: `save_pretrained` will refuse "
                "`path_initial_model_for_weight_conversion`.",
                stacklevel=3,
            )

    @property
    def changes_base(self) -> str | None:
        return "KaSA" if self.kasa_config else lora_init.changes_base(self.init_lora_weights)

    def check_beside(self, others: dict[str, PeftConfig]) -> None:
        """Raises:
        ConfigError: only one of two adapters is KaSA, for which the base weights change; they replicate layers in other
            ways; or they target other parameters, since the names in their files, which are peft's, depend on all.
        """
        for name, other in others.items():
            if bool(self.kasa_config) != bool(getattr(other, "kasa_config", None)):
                raise ConfigError(
                    "KaSA cannot be combined with adapters that don't use KaSA, since KaSA modifies the base weights: "
                    f"of the new adapter and {name!r} only one uses it.",
                    "kasa_config",
                )
            if self.layer_replication and self.layer_replication != getattr(other, "layer_replication", None):
                raise ConfigError(
                    f"The layers of this model are those that adapter {name!r} was made for; layer_replication must be "
                    "the same.",
                    "layer_replication",
                )
            mine, theirs = (set(getattr(config, "target_parameters", None) or ()) for config in (self, other))
            if mine and theirs and mine != theirs:
                raise ConfigError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(mine)} for the new adapter and {sorted(theirs)} for adapter "
                    f"'{name}'.",
                    "target_parameters",
                )

    def converted(self, trained: dict[str, Tensor], start: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig]:
        """B A - B0 A0 = [B, -B0] [A; A0]: a plain adapter of twice the rank for the base weights as they were."""
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            raise ConfigError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
                "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
            )
        tensors = dict(trained)
        for key, value in trained.items():
            if re.search(r"\.lora_(embedding_)?A(\.weight)?$", key):
                tensors[key] = torch.cat([value, start[key].to(value)], dim=0)
            elif re.search(r"\.lora_(embedding_)?B(\.weight)?$", key):
                tensors[key] = torch.cat([value, -start[key].to(value)], dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options of the initialisation, which no longer matter
            config = replace(
                self,
                init_lora_weights=True,
                r=2 * self.r,
                lora_alpha=self.lora_alpha * (2**0.5 if self.use_rslora else 2),  # type: ignore[arg-type]  # same scaling
                rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
                alpha_pattern={key: 2 * alpha for key, alpha in self.alpha_pattern.items()},
            )
        return tensors, config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values


class Lora(DeltaAdapter):
    """Low-rank update of a linear or convolutional layer; `lora_A`: in -> r, `lora_B`: r -> out."""

    views: ClassVar[tuple[str, ...]] = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        *("lora_bias", "use_rslora", "use_dora", "lora_magnitude_vector"),
    )

    lora_A: Any
    lora_B: Any

    def __init__(self, layer: base_ops.Layer, config: LoraConfig, path: str):
        super().__init__()
        self.r = pattern_value(config.rank_pattern, path, config.r)
        self.lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scaling = self.initial_scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.use_rslora, self.use_dora, self.lora_bias = config.use_rslora, config.use_dora, config.lora_bias
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.fixed_B = config.init_lora_weights in lora_init.FIXED_B
        self.init_factors(layer, config, path)

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        """Make `lora_A` and `lora_B` for the layer and fill them as `init_lora_weights` says."""
        groups = getattr(layer, "groups", 1)
        if self.r % groups:
            raise TargetError(
                f"Targeting a {type(layer).__name__} with groups={groups} and rank {self.r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                f"not target this specific layer, {path}.",
                "r",
            )
        if config.lora_bias and layer.bias is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(layer).__name__} has no bias. This "
                f"means that merging LoRA weights won't be possible ({path}).",
                PeftWarning,
                stacklevel=2,
            )
        init = config.init_lora_weights
        self.lora_A, self.lora_B = base_ops.low_rank(layer, self.r, config.lora_bias)
        start = self.start(layer, config)
        if start is not None:
            self.lora_A.weight, self.lora_B.weight = (nn.Parameter(t.contiguous()) for t in (start.A, start.B))
        elif init:
            if init == "gaussian":
                nn.init.normal_(self.lora_A.weight, std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            for parameter in self.lora_B.parameters():
                nn.init.zeros_(parameter)

    def start(self, layer: base_ops.Layer, config: LoraConfig) -> lora_init.Start | None:
        """What an initialisation that reads the base weight gives; None for others.

        Raises:
            ConfigError: it cannot be used with this layer or rank.
        """
        init = config.init_lora_weights
        if isinstance(init, bool) or init in lora_init.PLAIN:
            return None
        if base_ops.read_weight(layer).dim() > 2:
            if init == "lora_ga":
                return None
            raise ConfigError(f"init_lora_weights={init!r} is for linear layers only.", "init_lora_weights")
        start = lora_init.named(init)(layer, self.r, self.scaling, config)
        if start is not None:
            self.base_weight = start.base
        return start

    def requires_grad_(self, requires_grad: bool = True) -> Lora:
        super().requires_grad_(requires_grad)
        if self.fixed_B:
            self.factors()[0].requires_grad_(False)
        return self

    def kind(self, layer: nn.Module) -> str:
        return f"lora.{base_ops.name_of(layer)}"

    def factors(self) -> tuple[Tensor, Tensor]:
        """B `(out, r, *1)` and A `(r, in, *kernel)`."""
        return self.lora_B.weight, self.lora_A.weight

    @property
    def is_plain(self) -> bool:
        """Whether the update is B A x with two matrices and no more."""
        return type(self.lora_A) is nn.Linear and type(self.lora_B) is nn.Linear and not self.lora_bias

    def drop(self, x: Tensor) -> Tensor:
        """The input as the update sees it: in the dtype of its products, some of it dropped in training."""
        dtype = self.compute_dtype if self.is_plain else None
        return self.lora_dropout(x.to(dtype or self.lora_A.weight.dtype))

    def update(self, x: Tensor) -> Tensor:
        """What the update adds to the output for an input that went through `drop`."""
        if self.lora_bias:
            return self.lora_B(self.lora_A(x)) * self.scaling
        if self.compute_dtype is not None and self.is_plain:
            a = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling
            # a copy by rank, since a CPU takes several times as long to derive a product with few columns
            return a @ self.lora_B.weight.to(x.dtype).T.contiguous()
        return self.lora_B(self.lora_A(x) * self.scaling)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(self.drop(x))

    @classmethod
    def post_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor, y: Tensor) -> Tensor:
        """Of plain adapters on a linear layer at once: s B A x with a batch dimension."""
        plain = cls is Lora and all(adapter.is_plain for adapter in adapters)
        if not plain or len(adapters) == 1 or not groups.worth_stacking(x):
            return super().post_each(adapters, groups, x, y)
        dropped = groups.mapped([adapter.drop for adapter in adapters], x)
        A = padded([adapter.lora_A.weight for adapter in adapters]).to(dropped.dtype)
        B = padded([adapter.lora_B.weight.T for adapter in adapters]).to(dropped.dtype)
        scaling = numbers(tuple(adapter.scaling for adapter in adapters), A.dtype, A.device)
        update = groups.stack(dropped) @ A.mT * scaling @ B
        return y + groups.unstack(update, y).to(y.dtype)

    def delta(self) -> Tensor:
        return base_ops.compose(*self.factors()) * self.scaling

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().merged(weight, bias)
        if not self.lora_bias:
            return weight, bias
        if bias is None:
            raise MergeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        return weight, bias + (self.lora_B.bias * self.scaling).to(bias.dtype)


class LoraEmbedding(Lora):
    """Low-rank update of an embedding; `lora_embedding_A`: (r, vocabulary), `lora_embedding_B`: (dim, r). No
    dropout."""

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        if config.lora_bias:
            raise ConfigError(f"lora_bias=True is not supported for Embedding ({path}).", "lora_bias")
        vocabulary, dim = base_ops.features(layer)
        self.lora_dropout = nn.Identity()  # ids cannot be dropped
        self.lora_embedding_A = nn.Parameter(torch.randn(self.r, vocabulary))
        self.lora_embedding_B = nn.Parameter(torch.randn(dim, self.r))
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        start = self.start(layer, config) if config.init_lora_weights in lora_init.ON_EMBEDDINGS else None
        if start is not None:
            self.lora_embedding_A, self.lora_embedding_B = (nn.Parameter(t.contiguous()) for t in (start.A, start.B))
        self.padding_idx = layer.padding_idx
        self.row_scale = base_ops.embedding_scale(layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_B, self.lora_embedding_A

    def drop(self, x: Tensor) -> Tensor:
        return x

    def update(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.lora_embedding_A.T, self.padding_idx) @ self.lora_embedding_B.T
        return rows * self.scaling * self.row_scale


class TiedLora(Adapter):
    """LoRA on a layer that shares its weight with an adapted embedding, such as the output layer: it has no factors of
    its own but uses the embedding's, on a linear layer transposed, W' = W + s (B A)^T."""

    views = Lora.views

    def __init__(self, source: LoraEmbedding, layer: base_ops.Layer):
        super().__init__()
        if source.use_dora:
            raise ConfigError("`ensure_weight_tying` does not work with DoRA.", "ensure_weight_tying")
        self._source, self._layer = [source], [layer]  # in lists, so that parameters are counted and moved once

    def __getattr__(self, name: str) -> Any:
        if name not in Lora.views:
            return super().__getattr__(name)
        source = self._source[0]
        if name in ("lora_A", "lora_B") and not isinstance(self._layer[0], nn.Embedding):
            up, down = source.factors()
            return SimpleNamespace(weight=up.T if name == "lora_A" else down.T)
        return getattr(source, name)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        source = self._source[0]
        if isinstance(self._layer[0], nn.Embedding):
            return source.post(x, y)
        up, down = source.factors()
        return y + x.to(up.dtype) @ up @ down * source.scaling

    def merged_parameters(self, layer: base_ops.Layer, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the weight is the embedding's, into which the update goes once

    def saved(self) -> dict[str, Tensor]:
        """The factors again, under this layer's name, as peft writes them."""
        if isinstance(self._layer[0], nn.Embedding):
            return self._source[0].saved()
        up, down = self._source[0].factors()
        return {"lora_A.weight": up.detach().T, "lora_B.weight": down.detach().T}
