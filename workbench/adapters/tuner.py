"""`Tuner`: a base model with adapters in its layers; what peft calls `model.base_model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from workbench.errors import AdapterNameError, ConfigError, MergeError

from . import combine
from .adapter import Part
from .config import PeftConfig
from .inject import build, inject, sites
from .registry import Method, by_peft_type
from .tuner_layer import BASE, AdapterState, TunerLayer

HALF = (torch.float16, torch.bfloat16)


class Tuner(nn.Module):
    """Holds the base model (`model`), the adapters' configurations and the one state its layers share.

    Attributes:
        key_prefix: what stands before a base model's path in a checkpoint key.
    """

    key_prefix: ClassVar[str] = "base_model.model."

    def __init__(
        self, model: nn.Module, config: PeftConfig, name: str, low_cpu_mem_usage: bool = False, autocast: bool = True
    ):
        super().__init__()
        self.peft_config: dict[str, PeftConfig] = {}
        self.state = AdapterState(active=[name])
        self.model = model
        self.add(name, config, low_cpu_mem_usage, autocast)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output; its loss, if it has one, with what the active adapters' methods add to it."""
        outputs = self.model(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, torch.Tensor) and self.state.enabled:
            for name in self.state.active:
                penalty = self.method(name).penalty
                extra = penalty(self, name) if penalty else None
                if extra is not None:
                    outputs.loss = outputs.loss + extra.to(loss)
        return outputs

    def method(self, adapter_name: str) -> Method:
        """The method of an adapter."""
        return by_peft_type(self.peft_config[adapter_name].peft_type)

    def after_step(self, step: int) -> None:
        """Call after each optimiser step, counted from 1, before the gradients are cleared: some methods have work to
        do then."""
        for name in self.state.active:
            after_step = self.method(name).after_step
            if after_step:
                after_step(self, name, step)

    def update_and_allocate(self, global_step: int) -> None:
        """`after_step` under the name that it has in peft, for AdaLoRA."""
        self.after_step(global_step)

    def layers(self) -> Iterator[tuple[str, TunerLayer]]:
        """Every adapted layer, with its path in the base model."""
        seen: set[int] = set()
        for site in sites(self.model):
            wrapper = site.wrapper
            if wrapper is not None and id(wrapper) not in seen:
                seen.add(id(wrapper))
                yield site.path, wrapper

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Part]]:
        """All that an adapter holds, place by place, each with what its keys in a checkpoint start with."""
        for path, layer in self.layers():
            if adapter_name in layer.adapters:
                yield f"{self.key_prefix}{path}.", layer.adapter(adapter_name)

    # ---------------------------------------------------------------- adapters

    def add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool = False, autocast: bool = True) -> None:
        """Put a new adapter on the model; if anything is wrong, the model stays as it is.

        Raises:
            AdapterNameError: the name is taken or malformed.
            ConfigError: only one adapter may train biases.
            AdapterError: as `inject.build`.
        """
        self.check_new(name, config)
        first = not self.peft_config
        made = build(self.model, config, low_cpu_mem_usage)
        splits = any(adapter.base_weight is not None for _, adapter in made)
        if not first and (splits or any(layer.holds_part for _, layer in self.layers())):
            warnings.warn(
                "An adapter that changes the base weights of the model (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) should "
                "not be used with other adapters: each is made for other base weights.",
                stacklevel=2,
            )
        inject(self.model, self.state, name, made)
        self.peft_config[name] = config
        if autocast:
            for _, adapter in made:
                for tensor in adapter.parameters() if adapter.upcast else ():
                    if tensor.dtype in HALF:
                        tensor.data = tensor.data.float()
        if first:
            adapted = {id(p) for _, adapter in made for p in adapter.parameters()}
            for p in self.model.parameters():
                if id(p) not in adapted:
                    p.requires_grad_(False)
        self.set_requires_grad(name, name in self.state.active and not config.inference_mode)

    def check_new(self, name: str, config: PeftConfig) -> None:
        if not name or "." in name:
            raise AdapterNameError(f"Adapter names are parts of parameter names: {name!r} is empty or has a dot in it.")
        if name == BASE or hasattr(nn.ModuleDict(), name):
            raise AdapterNameError(f"The name {name!r} has a meaning of its own; choose another one for the adapter.")
        if name in self.peft_config:
            raise AdapterNameError(
                f"There is an adapter {name!r} already; choose another name or delete that one first."
            )
        rivals = {**self.peft_config, name: config}.values() if by_peft_type(config.peft_type).one_trains else ()
        if sum(not c.inference_mode for c in rivals) > 1:
            raise ConfigError(
                f"{config.tuner_name} supports only 1 trainable adapter; set inference_mode=True for all but that one.",
                "inference_mode",
            )
        biased = [n for n, c in {**self.peft_config, name: config}.items() if getattr(c, "bias", "none") != "none"]
        if name in biased and len(biased) > 1:
            raise ConfigError(
                f"Adapters {biased} all train biases of the base model (bias != 'none'), but only one adapter may.",
                "bias",
            )

    def check_known(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise AdapterNameError(f"Adapter {', '.join(unknown)} not found; there are {list(self.peft_config)}.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, and the wrappers of layers that no other adapter is on.

        If it was the only active one, the first of the others takes over.
        """
        self.check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for _, layer in self.layers()):
            raise MergeError(f"Adapter {adapter_name} is merged; call unmerge_adapter before deleting it.")
        self.take_off(adapter_name)
        del self.peft_config[adapter_name]
        self.state.active = [name for name in self.state.active if name != adapter_name]
        if not self.state.active and self.peft_config:
            first = next(iter(self.peft_config))
            warnings.warn(f"Adapter {adapter_name} was active and is deleted; {first} is active now.", stacklevel=2)
            self.set_adapter(first)

    def take_off(self, adapter_name: str, paths: list[str] | None = None) -> None:
        """Remove an adapter from the layers at these paths (default: all), and wrappers that hold no other adapter."""
        chosen = [layer for path, layer in self.layers() if paths is None or path in paths]
        for site in list(sites(self.model)):
            wrapper = site.wrapper
            if wrapper is not None and any(wrapper is layer for layer in chosen):
                wrapper.remove(adapter_name)
                if not wrapper.adapters:
                    setattr(site.parent, site.name, wrapper.base_layer)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **how: Any) -> None:
        """Add an adapter that combines others; see `combine.add_weighted_adapter`."""
        combine.add_weighted_adapter(self, adapters, weights, adapter_name, **how)

    @property
    def active_adapters(self) -> list[str]:
        return self.state.active

    @property
    def active_adapter(self) -> str | list[str]:
        return self.state.active[0] if len(self.state.active) == 1 else self.state.active

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that fold in this order, the active ones; only these train."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_known(names)
        if any(layer.merged for _, layer in self.layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        self.state.active = names
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_name: str, requires_grad: bool = True) -> None:
        """Let an adapter's parameters train or not, with the biases its configuration names."""
        for _, layer in self.layers():
            if adapter_name in layer.adapters:
                layer.adapters[adapter_name].requires_grad_(requires_grad)
        for bias in self.trained_biases(adapter_name).values():
            bias.requires_grad_(requires_grad)

    def trained_biases(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The base model's biases that an adapter trains (`bias`: "all", or "lora_only" for adapted layers), by
        path."""
        mode = getattr(self.peft_config[adapter_name], "bias", "none")
        if mode == "none":
            return {}
        found = {}
        for site in sites(self.model):
            wrapper, bias = site.wrapper, getattr(site.module, "bias", None)
            adapter = wrapper.adapter(adapter_name) if wrapper and adapter_name in wrapper.adapters else None
            replaced = adapter is not None and adapter.replaces
            if isinstance(bias, nn.Parameter) and not replaced and (mode == "all" or adapter is not None):
                found[f"{site.path}.base_layer.bias" if wrapper else f"{site.path}.bias"] = bias
        return found

    def enable_adapter_layers(self) -> None:
        self.state.enabled = True

    def disable_adapter_layers(self) -> None:
        """Let the base model answer alone; merged adapters are unmerged."""
        for name in self.active_adapters:
            if getattr(self.peft_config.get(name), "bias", "none") != "none":
                warnings.warn(
                    f"Adapter {name} trains biases of the base model: disabled, it will not give the base "
                    f"model's output.",
                    stacklevel=2,
                )
        self.unmerge_adapter()
        self.state.enabled = False

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the named (default: the active) adapters into the base weights, reversibly and bit-exactly so.

        Raises:
            MergeError: a rule has no weights or, with `safe_merge`, a result is not finite. Nothing stays merged then.
        """
        if adapter_names:
            self.check_known(adapter_names)
        already = {n for _, layer in self.layers() for n in layer.merged_adapters}
        if already >= set(adapter_names or self.active_adapters):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        try:
            for _, layer in self.layers():
                layer.merge(safe_merge, adapter_names)
        except MergeError:
            self.unmerge_adapter()
            raise

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit by bit."""
        for _, layer in reversed(list(self.layers())):  # tied layers: the first one merged holds the oldest weights
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good and return the plain base model."""
        self.merge_adapter(adapter_names, safe_merge)
        return self._unwrap(adapter_names or self.active_adapters)

    def unload(self) -> nn.Module:
        """Remove all adapters and return the plain base model with its own weights."""
        self.unmerge_adapter()
        for _, layer in self.layers():
            layer.restore()
        return self._unwrap([])

    def _unwrap(self, merged: list[str]) -> nn.Module:
        for site in list(sites(self.model)):
            wrapper = site.wrapper
            if wrapper is not None:
                copies: list[Any] = [a for n, a in wrapper.adapters.items() if n in merged and a.replaces]
                setattr(site.parent, site.name, copies[-1].modules_to_save if copies else wrapper.base_layer)
        return self.model
