"""What an adapter is: a rule on the input and output of one layer, and the same rule on its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from workbench.errors import MergeError

from . import base_ops
from .groups import Groups

Slot = tuple[nn.Module, str]  # a module and the name of one of its parameters or buffers


class Part(nn.Module):
    """What an adapter holds in one place, and how a checkpoint names it.

    Attributes:
        prefix: what stands between the module's path and the parameter's name in a checkpoint key.
        upcast: whether half-precision parameters are kept in float32 (`autocast_adapter_dtype`).
        draws: whether it draws random numbers in training, beside the masks of its dropout layers.
    """

    prefix: str = ""
    upcast: ClassVar[bool] = True
    draws: bool = False

    def slots(self) -> dict[str, Slot]:
        """Where each tensor of a checkpoint lives, by its name in the checkpoint without the module's path."""
        split = {name: name.rpartition(".") for name in self.state_dict()}
        return {self.prefix + name: (self.get_submodule(owner), leaf) for name, (owner, _, leaf) in split.items()}

    def saved(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return {name: getattr(owner, leaf).detach() for name, (owner, leaf) in self.slots().items()}

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The value of a parameter, from a checkpoint's tensor of this name: the reverse of `saved`."""
        return tensor

    def memory(self) -> dict[str, Tensor]:
        """What training changes beside the parameters, by names of the part's own: its buffers."""
        return {name: buffer.detach() for name, buffer in self.named_buffers()}

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                buffer.copy_(memory[name])


class Adapter(Part):
    """Everything that one adapter holds on one layer.

    A method overrides what it needs. Several active adapters fold in order: the last one sees the layer's input first
    and its output last, and `merged` is applied to the weights in the same order, so stacks agree if each method agrees
    with itself.

    Attributes:
        views: names that users reach as `layer.<name>[adapter]`, e.g. `layer.lora_A["default"].weight`.
        facts: names that users reach as `layer.<name>`, since they are the same for all adapters of a layer.
        replaces: the adapter computes the output itself (`replace`) and neither the base layer nor what lies below
            runs.
        mergeable: whether `merged` exists.
        exclusive: only one such adapter may act on a layer at a time.
        by_row: whether each row of a batch can have an adapter of its own.
        compute_dtype: of the products with what trains, which may be kept in higher precision than they need, and may
            be laid out for speed at the cost of a little memory. None: its own dtype, as peft computes them.
        by_token: whether what it does at a token, and learns from it, depends on no other token.
        base_weight: the canonical weight that is left to the base layer, for an adapter that takes a part of it into
            itself; None for others, and once the adapter is on a layer. The layer gets its own back afterwards.
        own_weights: gives the canonical weight and the bias of the layer itself, even while adapters are merged into
            it; there once the adapter is on a layer.
        beside: gives all adapters of the layer by name; there once the adapter is on a layer.
        shown: gives what users reach on the layer by name; there once the adapter is on a layer.
        leader: the adapter of another layer that this one only goes along with. Users reach on its layer what they
            reach on that one.
    """

    views: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    exclusive: bool = False
    by_row: ClassVar[bool] = True
    compute_dtype: torch.dtype | None = None
    by_token: bool = True
    base_weight: Tensor | None = None
    own_weights: Callable[[], tuple[Tensor, Tensor | None]]
    beside: Callable[[], dict[str, Adapter]]
    shown: Callable[[str], Any]

    @property
    def leader(self) -> Adapter | None:
        return None

    def kind(self, layer: nn.Module) -> str:
        """What peft calls a layer with such an adapter, e.g. `loha.Linear`."""
        return f"{type(self).__module__.rpartition('.')[2]}.{base_ops.name_of(layer)}"

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def scaled(self) -> list[Any]:
        """The parts that have a `scaling` of their own, by which their update is multiplied."""
        return [self] if "scaling" in vars(self) else []

    def pre(self, x: Tensor) -> Tensor:
        """Map the layer's input."""
        return x

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the layer's output `y`; `x` is the input before `pre`."""
        return y

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what lies below, between `pre` and `post`. An adapter on modules that take or give more than one tensor
        overrides this instead."""
        x, *rest = args
        y = inner(self.pre(x), *rest, **kwargs)
        return self.post(x, y).to(y.dtype)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        """The output itself, for adapters with `replaces`."""
        raise NotImplementedError

    # the same for several adapters of one class that share a pass; a method overrides these where that saves operations

    @classmethod
    def pre_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor) -> Tensor:
        """`pre` of each adapter on its own group."""
        return groups.mapped([adapter.pre for adapter in adapters], x)

    @classmethod
    def post_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor, y: Tensor) -> Tensor:
        """`post` of each adapter on its own group, in the dtype of y."""
        return groups.mapped([adapter.post for adapter in adapters], x, y).to(y.dtype)

    @classmethod
    def replace_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """`replace` of each adapter on its own group of the first argument."""
        return groups.mapped([lambda own, a=adapter: a.replace(own, *rest, **kwargs) for adapter in adapters], x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same map on the canonical weight `(out, in, *kernel)` and the bias `(out,)`, in their dtype.

        Raises:
            MergeError: the rule cannot be written as weights.
        """
        raise MergeError(f"{type(self).__name__} cannot be merged into the base weights.")

    def check_merge(self, name: str, others: dict[str, Adapter]) -> None:
        """Refuse to be merged, under its name, into weights that hold these others already.

        Raises:
            MergeError: what they do together is not defined.
        """

    def merged_parameters(self, layer: base_ops.Layer, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's parameters with the adapter in them, by name; `changed`: those that others changed before."""
        before = base_ops.canonical(layer, changed["weight"]) if "weight" in changed else base_ops.read_weight(layer)
        bias = changed.get("bias", getattr(layer, "bias", None))
        weight, bias = self.merged(before.detach(), None if bias is None else bias.detach())
        merged = {"weight": base_ops.canonical(layer, weight)}
        return merged if bias is None else merged | {"bias": bias}


class DeltaAdapter(Adapter):
    """An adapter that adds a weight of its own to the layer's: W' = W + `delta()`."""

    def delta(self) -> Tensor:
        """The added canonical weight, in the adapter's dtype."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.dtype), bias
