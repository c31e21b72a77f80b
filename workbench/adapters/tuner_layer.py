"""The only wrapper: a base layer with its adapters, which of them act, on which rows, merged or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.errors import AdapterNameError, ConfigError, MergeError

from . import base_ops
from .adapter import Adapter

BASE = "__base__"  # in `adapter_names`: this row goes through the base model alone


@dataclass
class AdapterState:
    """Which adapters act. One object a model, shared by its layers, so that they cannot disagree.

    Attributes:
        active: names of the active adapters, in the order in which they fold.
        enabled: false inside `disable_adapter`.
        rows: an adapter name for each row of the batch (or `BASE`), in place of `active`.
        task_ids: the task of each row, (rows,), for methods that know tasks.
    """

    active: list[str] = field(default_factory=list)
    enabled: bool = True
    rows: list[str] | None = None
    task_ids: Tensor | None = None


class AdapterView(MutableMapping[str, Any]):
    """One attribute over all adapters of a layer, so that `layer.lora_A["default"]` and `layer.lora_A.default`
    answer."""

    def __init__(self, adapters: nn.ModuleDict, attribute: str):
        self.__dict__.update(_adapters=adapters, _attribute=attribute)

    def __getitem__(self, name: str) -> Any:
        if name in self._adapters and hasattr(self._adapters[name], self._attribute):
            return getattr(self._adapters[name], self._attribute)
        raise KeyError(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._adapters[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("Use delete_adapter to remove an adapter.")

    def __iter__(self) -> Iterator[str]:
        return (name for name, adapter in self._adapters.items() if hasattr(adapter, self._attribute))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __repr__(self) -> str:
        return f"{self._attribute}({dict(self)})"


class TunerLayer(nn.Module):
    """A base layer and its adapters, adapter-major: `adapters[name]` holds all that one adapter has on this layer."""

    base_layer: base_ops.Layer

    def __init__(self, base_layer: nn.Module, state: AdapterState):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._state = state
        self._views: set[str] = set()
        self._unmerged: dict[str, Tensor] = {}  # parameters as they were before the first merge, by name
        self._original: Tensor | None = None  # the canonical weight, while adapters hold a part of it
        self._split: set[str] = set()  # those adapters

    # ---------------------------------------------------------------- adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on this layer, on the layer's device and in its dtype (float32 for half precision)."""
        weight = next((p for p in self.base_layer.parameters() if p.is_floating_point()), None)
        if weight is not None and not weight.is_meta:
            device = None if any(p.is_meta for p in adapter.parameters()) else weight.device
            adapter.to(device=device, dtype=weight.dtype)
        self._views |= set(adapter.views)
        self.adapters[name] = adapter
        adapter.own_weights = self.own_weights
        if adapter.base_weight is not None:
            if self._original is None:
                self._original = base_ops.read_weight(self.base_layer).detach().clone()
            base_ops.write(self.base_layer, adapter.base_weight, None)
            adapter.base_weight = None
            self._split.add(name)

    def adapter(self, name: str) -> Adapter:
        """One adapter of this layer."""
        return cast(Adapter, self.adapters[name])

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
            base_ops.write(self.base_layer, self._original, None)
            self._original = None
            self.merge(adapter_names=merged) if merged else None

    @property
    def active_adapters(self) -> list[str]:
        return self._state.active

    @property
    def active_adapter(self) -> list[str]:
        return self._state.active

    @property
    def disable_adapters(self) -> bool:
        return not self._state.enabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def weight(self) -> Tensor:
        """The base weight."""
        return self.base_layer.weight

    @property
    def original_module(self) -> nn.Module:
        """The base layer, under peft's name for modules to save."""
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def _acting(self) -> list[Adapter]:
        return [self.adapter(name) for name in self._state.active if name in self.adapters]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_views" not in self.__dict__:
                raise
        if name in self._views:
            return AdapterView(self.adapters, name)
        replacement = next((a.modules_to_save for a in self._acting() if a.replaces and self._state.enabled), None)
        return getattr(replacement or self.base_layer, name)

    # ---------------------------------------------------------------- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._state.enabled:
            return self.base_layer(*args, **kwargs)
        if self._state.rows is not None:
            return self._forward_rows(self._state.rows, *args, **kwargs)
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
        if not all(adapter.by_row for adapter in named):
            raise ConfigError(
                f"{type(named[0]).__name__} on a {type(self.base_layer).__name__} does not support mixed adapter "
                "batches yet."
            )
        if not named:
            return self.base_layer(*args, **kwargs)
        x, *rest = args
        if self.merged:
            raise MergeError(
                "Rows cannot have adapters of their own while adapters are merged; call unmerge_adapter first."
            )
        if len(x) % len(rows):
            raise AdapterNameError(f"adapter_names has {len(rows)} names for a batch of {len(x)} rows.")
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
        for name, index in groups.items():
            adapter = self.adapter(name)
            own = adapter.replace(x[index], *rest, **kwargs) if adapter.replaces else adapter.post(x[index], y[index])
            y = y.index_copy(0, index, own.to(y.dtype))
        return y

    # ---------------------------------------------------------------- merging

    def own_weights(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias of the base layer, without the adapters that are merged into them."""
        layer, before = self.base_layer, self._unmerged
        weight = base_ops.canonical(layer, before.get("weight", layer.weight))
        return weight, before.get("bias", getattr(layer, "bias", None))

    def original_weight(self) -> Tensor:
        """The canonical weight of the base layer before any adapter took a part of it."""
        return self.own_weights()[0] if self._original is None else self._original

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weights. The weights before are kept, so that `unmerge` is exact to the bit.

        Raises:
            MergeError: the rule has no weights, or `safe_merge` and the result is not finite.
        """
        wanted = [
            n for n in adapter_names or self._state.active if n in self.adapters and n not in self.merged_adapters
        ]
        names = [n for n in wanted if self.adapter(n).mergeable]
        if not names:
            return
        changed: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in names:
                changed |= self.adapter(name).merged_parameters(self.base_layer, changed)
                if safe_merge and not all(tensor.isfinite().all() for tensor in changed.values()):
                    raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        before = {key: self.base_layer.get_parameter(key).detach().clone() for key in changed}
        self._unmerged = before | self._unmerged
        self._write(changed)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restore the base weights from before the first merge."""
        self._write(self._unmerged)
        self._unmerged = {}
        self.merged_adapters.clear()

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        """Overwrite parameters of the base layer in place, so that a tied layer sees them too."""
        for name, value in values.items():
            self.base_layer.get_parameter(name).copy_(value)
