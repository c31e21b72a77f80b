"""The only wrapper: a base layer with its adapters, which of them act, on which rows, merged or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from workbench.errors import AdapterNameError, LayerKindError, MergeError

from . import base_ops, quantised
from .adapter import Adapter, DeltaAdapter
from .buffer_dict import BufferDict

BASE = "__base__"  # in `adapter_names`: this row goes through the base model alone


class Held(NamedTuple):
    """A parameter, and another value and `requires_grad` for it."""

    parameter: nn.Parameter
    value: Tensor
    requires_grad: bool


@torch.no_grad()
def exchange(held: list[Held]) -> list[Held]:
    """Give parameters their other values, and return those that they had."""
    before = [Held(p, p.detach().clone(), p.requires_grad) for p, _, _ in held]
    for parameter, value, requires_grad in held:
        parameter.copy_(value)
        parameter.requires_grad_(requires_grad)
    return before


@dataclass
class AdapterState:
    """Which adapters act. One object a model, shared by its layers, so that they cannot disagree.

    Attributes:
        active: names of the active adapters, in the order in which they fold.
        enabled: false inside `disable_adapter`.
        rows: an adapter name for each row of the batch (or `BASE`), in place of `active`.
        task_ids: the task of each row, (rows,), for methods that know tasks.
        biases: by adapter, the base model's own of the biases that it trains.
    """

    active: list[str] = field(default_factory=list)
    enabled: bool = True
    rows: list[str] | None = None
    task_ids: Tensor | None = None
    biases: dict[str, list[Held]] = field(default_factory=dict)

    def exchange_biases(self) -> None:
        """Give the base model its own biases, or back those that adapters trained."""
        self.biases = {name: exchange(held) for name, held in self.biases.items()}


class AdapterView(MutableMapping[str, Any], nn.Module):
    """One attribute over all adapters of a layer: `layer.lora_A["default"]` and `layer.lora_A.default`.

    It is a module besides, so that parameters go by the names that they have in peft (`lora_A.default.weight`), though
    the adapters hold them.
    """

    __hash__ = nn.Module.__hash__

    def __init__(self, adapters: nn.ModuleDict, attribute: str):
        self.__dict__.update(_adapters=adapters, _attribute=attribute)
        nn.Module.__init__(self)

    def _held(self, store: str) -> dict[str, Any]:
        held = {name: getattr(adapter, store).get(self._attribute) for name, adapter in self._adapters.items()}
        return {name: value for name, value in held.items() if value is not None}

    # what the adapters hold, in the places where torch looks for it; its own constructor wants to set them
    _parameters = property(lambda self: self._held("_parameters"), lambda self, _: None)
    _buffers = property(lambda self: self._held("_buffers"), lambda self, _: None)
    _modules = property(lambda self: self._held("_modules"), lambda self, _: None)

    @property
    def holds(self) -> bool:
        """Whether there is anything that has a name among the model's parameters or modules."""
        return bool(self._parameters or self._buffers or self._modules)

    @property
    def path(self) -> str:
        """The name in the layer, with what a checkpoint has before it."""
        first = next((a for a in self._adapters.values() if hasattr(a, self._attribute)), None)
        return getattr(first, "prefix", "") + self._attribute

    def __getitem__(self, name: str) -> Any:
        if name in self._adapters and hasattr(self._adapters[name], self._attribute):
            return getattr(self._adapters[name], self._attribute)
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._adapters[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._adapters[name], self._attribute)

    def __iter__(self) -> Iterator[str]:
        return (name for name, adapter in self._adapters.items() if hasattr(adapter, self._attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._adapters:
            self[name] = value
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._adapters:
            del self[name]
        else:
            object.__delattr__(self, name)

    def __repr__(self) -> str:
        return f"{self._attribute}({dict(self)})"


class ModuleView(AdapterView, nn.ModuleDict):
    """A view of modules, such as `layer.lora_A`."""


class ParameterView(AdapterView, nn.ParameterDict):  # type: ignore[misc]  # of `get` the view's own counts
    """A view of parameters, such as `layer.hada_w1_a`."""


class BufferView(AdapterView, BufferDict):
    """A view of buffers."""


class Values(dict[str, Any]):
    """Plain values of all adapters of a layer as they are now, such as `layer.scaling`; a value that is set goes to the
    adapter too."""

    def __init__(self, view: AdapterView):
        super().__init__(view)
        self._view = view

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._view[name] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class TunerLayer(nn.Module):
    """A base layer and its adapters, adapter-major: `adapters[name]` holds all that one adapter has on this layer.

    Modules, parameters and the state dict go by the names that they have in peft: `lora_A.default.weight`.
    """

    base_layer: base_ops.Layer

    def __init__(self, base_layer: nn.Module, state: AdapterState):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.quantization_backend = quantised.backend(base_layer)
        self._state = state
        self._own_active: list[str] | None = None  # set on this layer alone
        self._own_enabled: bool | None = None
        self._views: dict[str, AdapterView] = {}
        self._unmerged: dict[str, Tensor] = {}  # parameters as they were before the first merge, by name
        self._original: Tensor | None = None  # the layer's weight, while adapters hold a part of it
        self._split: set[str] = set()  # those adapters
        self.register_state_dict_post_hook(_to_peft_names)
        self.register_load_state_dict_pre_hook(_from_peft_names)

    # ---------------------------------------------------------------- adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on this layer, on the layer's device and in its dtype (float32 for half precision)."""
        weight = next((p for p in self.base_layer.parameters() if p.is_floating_point()), None)
        if weight is not None and not self.quantization_backend:
            adapter.to(dtype=weight.dtype)
        self.adapters[name] = adapter
        self.bring(name)
        held = {
            **dict.fromkeys(adapter.views, AdapterView),
            **dict.fromkeys(adapter._buffers, BufferView),
            **dict.fromkeys(adapter._modules, ModuleView),
            **dict.fromkeys(adapter._parameters, ParameterView),
        }
        self._views = {name: view(self.adapters, name) for name, view in held.items()} | self._views
        adapter.own_weights, adapter.beside, adapter.shown = self.own_weights, self.named_adapters, self.__getattr__
        if adapter.base_weight is not None:
            if self._original is None:
                self._original = base_ops.keep(self.base_layer, "weight")
            base_ops.write(self.base_layer, adapter.base_weight, None)
            adapter.base_weight = None
            self._split.add(name)

    def bring(self, name: str) -> None:
        """Move an adapter to the layer's device, unless either is on the meta device."""
        weight = next(self.base_layer.parameters(), None)
        if weight is None or name not in self.adapters:
            return
        if not any(tensor.is_meta for tensor in (weight, *self.adapters[name].parameters())):
            self.adapters[name].to(weight.device)

    def adapter(self, name: str) -> Adapter:
        """One adapter of this layer."""
        return cast(Adapter, self.adapters[name])

    def named_adapters(self) -> dict[str, Adapter]:
        """All adapters of this layer, by name."""
        return {name: self.adapter(name) for name in self.adapters}

    def remove(self, name: str) -> None:
        """Take an adapter off this layer."""
        if name in self.adapters:
            del self.adapters[name]
            self._split.discard(name)
            if not self._split:
                self.restore()

    @property
    def holds_part(self) -> bool:
        """Whether an adapter of this layer has taken a part of the base weight into itself."""
        return bool(self._split)

    def restore(self) -> None:
        """Give the base layer back the weight that an adapter took a part of, to the bit."""
        if self._original is not None:
            merged = list(self.merged_adapters)
            self.unmerge()
            base_ops.put(self.base_layer, "weight", self._original)
            self._original = None
            self.merge(adapter_names=merged) if merged else None

    def exchange(self) -> None:
        """Give the base layer the weight that it had before an adapter took a part of it, or back the one that it has
        with such an adapter."""
        if self._original is not None:
            held = base_ops.keep(self.base_layer, "weight")
            base_ops.put(self.base_layer, "weight", self._original)
            self._original = held

    @property
    def kind(self) -> str:
        """What peft calls this layer, by its first adapter, e.g. `lora.Linear`."""
        first = next(iter(self.named_adapters().values()), None)
        return type(self).__name__ if first is None else first.kind(self.base_layer)

    def _get_name(self) -> str:  # torch's, for repr
        return self.kind

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act here, in the order in which they fold. Of those that can act only one at a time, those
        on this layer; of others, the model's."""
        active = self._state.active if self._own_active is None else self._own_active
        if self.auxiliary:
            return [name for name in active if name in self.adapters]
        return active

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, adapter_names: str | list[str]) -> None:
        self._own_active = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

    @property
    def disable_adapters(self) -> bool:
        return not (self._state.enabled if self._own_enabled is None else self._own_enabled)

    @property
    def auxiliary(self) -> bool:
        """Whether all adapters here only go along with those of other layers."""
        return all(adapter.exclusive for adapter in self.adapters.values())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let other adapters act on this layer than on the rest of the model, until the model sets its own again."""
        self._active_adapter = adapter_names
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name in self.active_adapters and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters of this layer act or not, whatever the rest of the model does, until the model says so."""
        self._own_enabled = enabled

    def follow(self) -> None:
        """Do as the rest of the model does."""
        self._own_active = self._own_enabled = None

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def original_module(self) -> nn.Module:
        """The base layer, under peft's name for modules to save."""
        return self.base_layer

    @property
    def _adapters(self) -> set[str]:
        """The adapters' names, under peft's name for modules to save."""
        return set(self.adapters)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def in_features(self) -> int:
        """Numbers in, also of layers that torch gives no such attribute: of an embedding the rows."""
        return base_ops.features(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Numbers out."""
        return base_ops.features(self.base_layer)[1]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Attributes that hold parameters of adapters."""
        return tuple(name for name, view in self._views.items() if view._modules or view._parameters)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Attributes that hold something else of each adapter."""
        return tuple(name for name in self._views if name not in self.adapter_layer_names)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    def _acting(self) -> list[Adapter]:
        return [self.adapter(name) for name in self.active_adapters if name in self.adapters]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_views" not in self.__dict__:
                raise
        if name in self._views:
            leaders = [adapter.leader for adapter in self.named_adapters().values()]
            if leaders and all(leaders):
                return cast(Adapter, leaders[0]).shown(name)
            view = self._views[name]
            return view if view.holds else Values(view)
        for adapter in self.named_adapters().values():
            if name in adapter.facts:
                return getattr(adapter, name)
        if name == "token_adapter" and self.auxiliary and "trainable_tokens_delta" in self._views:
            return self
        acting = [] if self.disable_adapters else self._acting()
        return getattr(next((a.modules_to_save for a in acting if a.replaces), self.base_layer), name)

    # ---------------------------------------------------------------- scaling

    def scaled(self, adapter: str) -> list[Any]:
        """The parts of an adapter that have a `scaling`, by which their update is multiplied."""
        return self.adapter(adapter).scaled() if adapter in self.adapters else []

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's own scaling by this, and by nothing that was set before."""
        for part in self.scaled(adapter):
            part.scaling = part.initial_scaling * scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for part in (part for name in self.active_adapters for part in self.scaled(name)):
            part.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or give them their own back."""
        for part in (part for name in self.active_adapters for part in self.scaled(name)):
            part.scaling = part.initial_scaling if scale is None else part.scaling / scale

    # ---------------------------------------------------------------- names

    def renamed(self) -> dict[str, str]:
        """What the names of this layer's parts start with, as they are held and as they are in peft."""
        names = {
            f"adapters.{name}.{attribute}": f"{view.path}.{name}"
            for attribute, view in self._views.items()
            for name in view
        }
        return names | {"base_layer": self.base_name}

    @property
    def base_name(self) -> str:
        """What the base layer is called in peft."""
        first = next(iter(self.named_adapters().values()), None)
        if first is None or not self.auxiliary:
            return "base_layer"
        return "original_module" if first.replaces else f"{first.prefix}base_layer"

    def containers(self) -> list[AdapterView]:
        """The views of modules, parameters and buffers."""
        return [view for view in self._views.values() if view.holds]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's, with the views in place of the adapters."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        start = f"{prefix}." if prefix else ""
        yield from self.base_layer.named_modules(memo, start + self.base_name, remove_duplicate)
        for view in self.containers():
            yield from view.named_modules(memo, start + view.path, remove_duplicate)

    # ---------------------------------------------------------------- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output and what acts on it. `adapter_names`: an adapter for each row, as in the model's."""
        rows = kwargs.pop("adapter_names", self._state.rows)
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if rows is not None:
            return self._forward_rows(rows, *args, **kwargs)
        acting = self._acting()
        if self.merged:
            acting = [adapter for adapter in acting if not adapter.mergeable]
        run: Callable[..., Any] = self.base_layer
        for adapter in acting:
            run = partial(adapter.around, run)
        return run(*args, **kwargs)

    def _forward_rows(self, rows: list[str], *args: Any, **kwargs: Any) -> Any:
        """Each row of the batch goes through its own adapter; the base runs once, over all of them."""
        named = [self.adapter(name) for name in dict.fromkeys(rows) if name in self.adapters]
        no_rows = LayerKindError(
            f"{self.kind} does not support mixed adapter batches yet. Mixed batching is only supported for the "
            "following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."
        )
        if not all(adapter.by_row for adapter in named):
            raise no_rows
        x, *rest = args
        if len(x) % len(rows):
            raise AdapterNameError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(rows)} and {len(x)} respectively."
            )
        if not named:
            return self.base_layer(*args, **kwargs)
        if self.merged:
            raise MergeError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        rows = [name for name in rows for _ in range(len(x) // len(rows))]  # beams of one input are neighbours
        groups = {
            name: torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            for name in dict.fromkeys(rows)
            if name in self.adapters
        }
        h = x
        for name, index in groups.items():
            own = x[index]
            changed = self.adapter(name).pre(own)
            if changed is not own:
                h = h.index_copy(0, index, changed)
        y = self.base_layer(h, *rest, **kwargs)
        if not isinstance(y, Tensor):
            raise no_rows
        for name, index in groups.items():
            adapter = self.adapter(name)
            own = adapter.replace(x[index], *rest, **kwargs) if adapter.replaces else adapter.post(x[index], y[index])
            y = y.index_copy(0, index, own.to(y.dtype))
        return y

    # ---------------------------------------------------------------- merging

    def own_weights(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias of the base layer, without the adapters that are merged into them."""
        layer, before = self.base_layer, self._unmerged
        weight = base_ops.canonical(layer, base_ops.numbers(layer, before.get("weight", layer.weight)))
        return weight, before.get("bias", getattr(layer, "bias", None))

    def original_weight(self) -> Tensor:
        """The canonical weight of the base layer before any adapter took a part of it."""
        if self._original is None:
            return self.own_weights()[0]
        return base_ops.canonical(self.base_layer, base_ops.numbers(self.base_layer, self._original))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter of a method that adds a weight adds to that of the base layer, as the layer stores it."""
        return base_ops.canonical(self.base_layer, cast(DeltaAdapter, self.adapter(adapter)).delta())

    def changes(self, safe_merge: bool, adapter_names: list[str] | None) -> tuple[list[str], dict[str, Tensor]]:
        """The adapters that are to be merged, and the base layer's parameters with them, by name.

        Raises:
            MergeError: the rule has no weights, or `safe_merge` and the result is not finite.
        """
        wanted = [
            n for n in adapter_names or self.active_adapters if n in self.adapters and n not in self.merged_adapters
        ]
        names = [n for n in wanted if self.adapter(n).mergeable]
        changed: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in names:
                before = [*self.merged_adapters, *names[: names.index(name)]]
                self.adapter(name).check_merge(name, {other: self.adapter(other) for other in before})
                changed |= self.adapter(name).merged_parameters(self.base_layer, changed)
                if safe_merge and not all(tensor.isfinite().all() for tensor in changed.values()):
                    raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return names, changed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep: bool = True) -> None:
        """Write adapters into the base weights. The weights before are kept, so that `unmerge` is exact to the bit,
        unless it is for good.

        Raises:
            MergeError: as `changes`.
        """
        names, changed = self.changes(safe_merge, adapter_names)
        if keep:
            before = {key: base_ops.keep(self.base_layer, key) for key in changed}
            self._unmerged = before | self._unmerged
        self._put(changed)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restore the base weights from before the first merge."""
        self._put(self._unmerged)
        self._unmerged = {}
        self.merged_adapters.clear()

    def _put(self, values: dict[str, Tensor]) -> None:
        """Overwrite parameters of the base layer."""
        for name, value in values.items():
            base_ops.put(self.base_layer, name, value)


def _to_peft_names(layer: TunerLayer, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state_dict, prefix, layer.renamed())


def _from_peft_names(layer: TunerLayer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, prefix, {theirs: ours for ours, theirs in layer.renamed().items()})


def _rename(state_dict: dict[str, Any], prefix: str, starts: dict[str, str]) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        old = next((old for old in starts if name == old or name.startswith(f"{old}.")), None)
        if old is not None:
            state_dict[prefix + starts[old] + name.removeprefix(old)] = state_dict.pop(key)
