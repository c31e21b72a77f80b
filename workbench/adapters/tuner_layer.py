"""The only wrapper: a base layer with its adapters, which of them act, on which rows, merged or not."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.errors import AdapterNameError, MergeError

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
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
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
        base = self.base_layer
        for i, adapter in enumerate(acting):
            if adapter.replaces:
                base, acting = adapter.replace, acting[i + 1 :]
        if not acting:
            return base(*args, **kwargs)
        x, *rest = args
        inputs = [x]
        for adapter in reversed(acting):
            inputs.append(adapter.pre(inputs[-1]))
        y = base(inputs.pop(), *rest, **kwargs)
        dtype = y.dtype
        for adapter in acting:
            y = adapter.post(inputs.pop(), y)
        return y.to(dtype)

    def _forward_rows(self, rows: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each row of the batch goes through its own adapter; the base runs once, over all of them."""
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
        y = self.base_layer(h, *args, **kwargs)
        for name, index in groups.items():
            adapter = self.adapter(name)
            own = adapter.replace(x[index], *args, **kwargs) if adapter.replaces else adapter.post(x[index], y[index])
            y = y.index_copy(0, index, own.to(y.dtype))
        return y

    # ---------------------------------------------------------------- merging

    def own_weights(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias of the base layer, without the adapters that are merged into them."""
        if self._unmerged is not None:
            return self._unmerged
        return base_ops.read_weight(self.base_layer), getattr(self.base_layer, "bias", None)

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
        weight, bias = base_ops.read_weight(self.base_layer).detach(), getattr(self.base_layer, "bias", None)
        before = (weight.clone(), None if bias is None else bias.detach().clone())
        with torch.no_grad():
            for name in names:
                weight, bias = self.adapter(name).merged(weight, bias)
                if safe_merge and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
                    raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._unmerged = self._unmerged or before
        base_ops.write(self.base_layer, weight, bias)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Restore the base weights from before the first merge."""
        if self._unmerged is not None:
            base_ops.write(self.base_layer, *self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()
