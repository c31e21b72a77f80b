"""LoRA on bare parameters, for modules that are no layer of a known kind: W_e + s B_e A_e for each expert e of a
mixture (`target_parameters`), or for the projections of `nn.MultiheadAttention`. The method of peft's documentation.

Such a module computes as it likes with its parameters; while it runs, they have their adapted values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.errors import ConfigError, TargetError

from ..adapter import Adapter, Slot
from ..config import pattern_value

OUTPUT = "out_proj.weight"  # of nn.MultiheadAttention


class ParameterFactors(nn.Module):
    """`lora_A` `(experts * r, in)` and `lora_B` `(out, r * experts)` of one parameter `(out, in)`, `(experts, out, in)`
    or, `transposed`, `(experts, in, out)`."""

    def __init__(self, shape: tuple[int, ...], transposed: bool, config: Any, path: str):
        super().__init__()
        self.r = pattern_value(config.rank_pattern, path, config.r)
        self.lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scaling = self.initial_scaling = self.lora_alpha / (self.r**0.5 if config.use_rslora else self.r)
        self.shape, self.transposed = shape, transposed
        experts = shape[0] if len(shape) == 3 else 1
        inner, out = shape[-2:] if transposed else shape[:-3:-1]
        self.lora_A = nn.Linear(inner, self.r * experts, bias=False)
        self.lora_B = nn.Linear(self.r * experts, out, bias=False)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_B.weight)

    def delta(self) -> Tensor:
        """s B_e A_e for every expert, in the parameter's shape."""
        A = self.lora_A.weight.unflatten(0, (-1, self.r))
        B = self.lora_B.weight.unflatten(1, (self.r, -1))
        product = torch.einsum("ore,eri->eio" if self.transposed else "ore,eri->eoi", B, A) * self.scaling
        return product.view(self.shape)


class Added(nn.Module):
    """Adds a tensor to a parameter that is parametrised."""

    def __init__(self, delta: Tensor):
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class LoraParameters(Adapter):
    """LoRA on some parameters of one module.

    Args:
        layer: the module.
        names: each parameter's path in the module, with what stands before its factors' names in a checkpoint key.
            Where several are bare parameters of the module itself, the last one's prefix is empty and the others' say
            `base_layer.` as often as there are others after them: in peft one wrapper lies in the other.

    Raises:
        ConfigError: an option that needs a layer's input, bias or kind is on.
        TargetError: a parameter has neither 2 nor 3 dimensions.
    """

    views = ("r", "lora_alpha", "scaling", "lora_A", "lora_B")
    facts = ("parameter_name",)
    by_row = False

    def __init__(self, layer: nn.Module, names: dict[str, str], config: Any, path: str):
        super().__init__()
        refused = [config.variant, "lora_bias", *(() if is_attention(layer) else ("lora_dropout", "fan_in_fan_out"))]
        for option in refused:
            if option and getattr(config, option):
                raise ConfigError(
                    f"{self.kind(layer)} does not work with {option}: LoRA on the parameters of {path} is plain.",
                    option,
                )
        if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "eva"):
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} is for layers, not for the parameters of {path}.",
                "init_lora_weights",
            )
        self.names = list(names)
        self.prefixes = list(names.values())
        self.factors: list[ParameterFactors] = []  # not a ModuleList, since their layers go by other names
        self._layer = [layer]  # in a list, so that it is not a part of the adapter
        for name in names:
            shape = tuple(_value(layer, name).shape)
            if len(shape) not in (2, 3):
                raise TargetError(
                    f"{path}.{name} has {len(shape)} dimensions; only 2 and 3 are supported.", "target_parameters"
                )
            transposed = len(shape) == 3 and getattr(layer, "is_transposed", False)
            key = path if is_attention(layer) else f"{path}.{name}"
            factors = ParameterFactors(shape, transposed, config, key)
            self.factors.append(factors)
            for side in ("lora_A", "lora_B"):
                self.add_module(self.attribute(side, names[name]), getattr(factors, side))

    def attribute(self, side: str, prefix: str) -> str:
        """What `lora_A` or `lora_B` of the parameter with this prefix is called here."""
        return f"{side}_inside_{self.prefixes.index(prefix)}" if prefix else side

    def __getattr__(self, name: str) -> Any:
        if name in ("r", "lora_alpha", "scaling"):  # those of the parameter whose key has no prefix
            return getattr(self.factors[self.prefixes.index("")], name)
        return super().__getattr__(name)

    def kind(self, layer: nn.Module) -> str:
        return "lora.MultiheadAttention" if is_attention(layer) else "lora.ParamWrapper"

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def scaled(self) -> list[Any]:
        return list(self.factors)

    @property
    def parameter_name(self) -> str:
        """The parameter whose key has no prefix."""
        return self.names[self.prefixes.index("")]

    def slots(self) -> dict[str, Slot]:
        return {
            f"{prefix}{side}.weight": (getattr(factors, side), "weight")
            for prefix, factors in zip(self.prefixes, self.factors, strict=True)
            for side in ("lora_A", "lora_B")
        }

    def deltas(self) -> dict[str, Tensor]:
        """What is added to each parameter, by its path in the module."""
        deltas = {name: f.delta() for name, f in zip(self.names, self.factors, strict=True)}
        if OUTPUT in deltas:  # peft adds it twice, once outside the gradient, so that is what files are trained for
            deltas[OUTPUT] = deltas[OUTPUT] + deltas[OUTPUT].detach()
        return deltas

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for name, delta in self.deltas().items():
                stack.enter_context(_added(self._layer[0], name, delta))
            return inner(*args, **kwargs)

    def merged_parameters(self, layer: nn.Module, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: changed[name] if name in changed else layer.get_parameter(name) for name in self.names}
        return {name: weights[name].detach() + delta.to(weights[name].dtype) for name, delta in self.deltas().items()}


def is_attention(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention)


def on_parameters(layer: nn.Module, names: list[str], config: Any, path: str) -> LoraParameters:
    """LoRA on a module's own parameters, given in the module's order."""
    depth = {name: "base_layer." * (len(names) - 1 - i) for i, name in enumerate(names)}
    return LoraParameters(layer, depth, config, path)


def on_attention(layer: nn.MultiheadAttention, config: Any, path: str) -> LoraParameters:
    """LoRA on query, key and value, which are one matrix, and on the output projection."""
    if config.use_dora:
        raise ConfigError("MultiheadAttention does not support DoRA (yet), please set use_dora to False", "use_dora")
    if not layer._qkv_same_embed_dim:
        raise TargetError("Only same embed for query/key/value is supported as of now for MultiheadAttention.")
    return LoraParameters(layer, {"in_proj_weight": "", OUTPUT: "base_layer.out_proj."}, config, path)


def _value(layer: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(layer.get_submodule(owner), leaf)


@contextmanager
def _added(layer: nn.Module, name: str, delta: Tensor) -> Iterator[None]:
    """Within this context the module finds the sum under the parameter's name; contexts can be nested."""
    path, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(path)
    value = getattr(owner, leaf)
    if parametrize.is_parametrized(owner, leaf):
        chain: Any = owner.parametrizations[leaf]  # type: ignore[index]
        chain.append(Added(delta.to(value.dtype)))
        try:
            yield
        finally:
            del chain[-1]
        return
    before = owner.__dict__.get(leaf)
    owner.__dict__[leaf] = value + delta.to(value.dtype)  # found before the parameter, which stays where it is
    try:
        yield
    finally:
        del owner.__dict__[leaf]
        if before is not None:
            owner.__dict__[leaf] = before
