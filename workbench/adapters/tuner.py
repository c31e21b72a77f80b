"""`Tuner`: a base model with adapters in its layers; what peft calls `model.base_model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from workbench.errors import AdapterError, AdapterNameError, ConfigError, MergeError

from . import combine
from .adapter import Part
from .config import PeftConfig
from .inject import build, inject, parameter_names
from .matching import Site, get_model_config, sites, unique
from .precision import HALF
from .registry import METHODS, Method, by_peft_type
from .replication import replicated
from .tuner_layer import BASE, AdapterState, Held, TunerLayer, exchange
from .tying import tied_names, warn_of_merging

LONGEST = 200  # bytes of an adapter's name, which becomes a folder's


class Tuner(nn.Module):
    """Holds the base model (`model`), the adapters' configurations and the one state its layers share.

    Attributes:
        key_prefix: what stands before a base model's path in a checkpoint key.
        uses_shared_state: whether adapters hold tensors that belong to no layer; those of no method here do.
    """

    key_prefix: ClassVar[str] = "base_model.model."
    uses_shared_state: ClassVar[bool] = False

    _detached: list[tuple[Site, TunerLayer]] | None = None  # what is where when it is attached

    def __init__(
        self, model: nn.Module, config: PeftConfig, name: str, low_cpu_mem_usage: bool = False, autocast: bool = True
    ):
        super().__init__()
        self.peft_config: dict[str, PeftConfig] = {}
        self.state = AdapterState(active=[name])
        self._paused: list[nn.Parameter] = []  # those that trained when the adapters were disabled
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
        """The base model's output; its loss, if it has one, with `penalty`."""
        self.check_attached()
        outputs = self.model(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        penalty = self.penalty() if isinstance(loss, torch.Tensor) else 0.0
        if isinstance(penalty, torch.Tensor):
            outputs.loss = outputs.loss + penalty.to(loss)
        return outputs

    def method(self, adapter_name: str) -> Method:
        """The method of an adapter."""
        return by_peft_type(self.peft_config[adapter_name].peft_type)

    @property
    def prefix(self) -> str:
        """What the names of the first adapter's parameters start with."""
        return self.method(next(iter(self.peft_config))).prefix

    def after_step(self, step: int) -> None:
        """Call after each optimiser step, counted from 1, before the gradients are cleared: some methods have work to
        do then."""
        for name in self.state.active:
            after_step = self.method(name).after_step
            if after_step:
                after_step(self, name, step)

    def penalty(self) -> torch.Tensor | float:
        """What the active adapters' methods add to the model's loss; 0.0 if nothing."""
        return self._added("penalty", self.state.active if self.state.enabled else [])

    def regularisation(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """What the methods of the named (default: the active) adapters want added to the loss in training, beyond what
        `forward` adds; 0.0 if nothing."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or self.state.active
        return self._added("regularisation", names)

    def _added(self, fact: str, names: list[str]) -> torch.Tensor | float:
        total: torch.Tensor | float = 0.0
        for name in names:
            extra = getattr(self.method(name), fact)
            term = extra(self, name) if extra else None
            total = total if term is None else total + term
        return total

    _get_kasa_loss = _get_monteclora_loss = regularisation  # as peft's documentation calls it

    def update_and_allocate(self, global_step: int) -> None:
        """`after_step` under the name that it has in peft, for AdaLoRA."""
        self.after_step(global_step)

    def wrapped_sites(self) -> Iterator[tuple[Site, TunerLayer]]:
        """Every adapted layer under every path that leads to it, also while the adapters are detached."""
        if self._detached is not None:
            yield from self._detached
            return
        for site in sites(self.model):
            if site.wrapper is not None:
                yield site, site.wrapper

    def adapted_layers(self) -> Iterator[tuple[str, TunerLayer]]:
        """Every adapted layer, with its path in the base model."""
        seen: set[int] = set()
        for site, wrapper in self.wrapped_sites():
            if id(wrapper) not in seen:
                seen.add(id(wrapper))
                yield site.path, wrapper

    def layers_of(self, adapter_name: str) -> Iterator[tuple[str, TunerLayer]]:
        """The layers that an adapter is on, with their paths in the base model."""
        return ((path, layer) for path, layer in self.adapted_layers() if adapter_name in layer.adapters)

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Part]]:
        """All that an adapter holds, place by place, each with what its keys in a checkpoint start with."""
        for path, layer in self.layers_of(adapter_name):
            yield f"{self.key_prefix}{path}.", layer.adapter(adapter_name)

    def memory_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What training changes of an adapter beside its parameters, for `remember`."""
        return {
            f"{number}.{name}": tensor
            for number, (_, part) in enumerate(self.parts(adapter_name))
            for name, tensor in part.memory().items()
        }

    def remember(self, adapter_name: str, memory: dict[str, torch.Tensor]) -> None:
        """Go on from where the adapter was when `memory_of` gave this."""
        for number, (_, part) in enumerate(self.parts(adapter_name)):
            start = f"{number}."
            part.remember({name.removeprefix(start): t for name, t in memory.items() if name.startswith(start)})

    def targets(self, adapter_name: str) -> list[str]:
        """Paths of the modules that an adapter changes, without those of which it changes parameters."""
        config, found = self.peft_config[adapter_name], []
        for site in unique(sites(self.model)):
            held = site.wrapper.named_adapters() if site.wrapper else {}
            if adapter_name in held and not held[adapter_name].exclusive and not parameter_names(site, config):
                found.append(site.path)
        return found

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that the adapters change, each once."""
        return list(dict.fromkeys(path for name in self.peft_config for path in self.targets(name)))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters that the adapters change (`target_parameters`), each once."""
        return list(
            dict.fromkeys(
                f"{site.path}.{name}"
                for config in self.peft_config.values()
                for site in unique(sites(self.model))
                for name in parameter_names(site, config)
            )
        )

    get_model_config = staticmethod(get_model_config)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_names(self.model)

    # ---------------------------------------------------------------- adapters

    def add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool = False, autocast: bool = True) -> None:
        """Put a new adapter on the model; if anything is wrong, the model stays as it is.

        Raises:
            AdapterNameError: the name is taken or malformed.
            ConfigError: only one adapter may train biases.
            AdapterError: as `inject.build`.
        """
        self.check_attached()
        self.check_new(name, config)
        first = not self.peft_config
        with replicated(self.model, getattr(config, "layer_replication", None) if first else None):
            made = build(self.model, config, low_cpu_mem_usage)
        changing = [c.changes_base for c in (*self.peft_config.values(), config) if c.changes_base]
        if not first and changing:
            warnings.warn(
                f"{changing[0]} changes the base weights of the model and should thus not be used with other adapters: "
                "each is made for other base weights.",
                stacklevel=2,
            )
        inject(self.model, self.state, name, made)
        self.peft_config[name] = config
        if autocast:
            self.upcast(name)
        if first:
            adapted = {id(p) for _, adapter in made for p in adapter.parameters()}
            for p in self.model.parameters():
                if id(p) not in adapted:
                    p.requires_grad_(False)
        self.state.biases[name] = [Held(b, b.detach().clone(), False) for b in self.trained_biases(name).values()]
        self.set_requires_grad(name, name in self.state.active and not config.inference_mode)

    def upcast(self, adapter_name: str) -> None:
        """Turn an adapter's half-precision parameters and buffers into float32."""
        for _, layer in self.layers_of(adapter_name):
            adapter = layer.adapter(adapter_name)
            for tensor in (*adapter.parameters(), *adapter.buffers()) if adapter.upcast else ():
                if tensor.dtype in HALF:
                    tensor.data = tensor.data.float()

    def check_new(self, name: str, config: PeftConfig) -> None:
        if not name or "." in name:
            raise AdapterNameError(f"Adapter names are parts of parameter names: {name!r} is empty or has a dot in it.")
        if not name.isprintable() or set(name) & {"/", "\\"} or len(name.encode()) > LONGEST:
            raise AdapterNameError(f"Adapter names are names of folders: {name[:LONGEST]!r} can be none.")
        if name == BASE or hasattr(nn.ModuleDict(), name):
            raise AdapterNameError(f"The name {name!r} has a meaning of its own; choose another one for the adapter.")
        if name in self.peft_config:
            raise AdapterNameError(
                f"There is an adapter {name!r} already; choose another name or delete that one first."
            )
        config.check_beside(self.peft_config)
        biased = [n for n, c in {**self.peft_config, name: config}.items() if getattr(c, "bias", "none") != "none"]
        if name in biased and len(biased) > 1:
            raise ConfigError(
                f"{config.tuner_name} supports only 1 adapter with bias. When using multiple adapters, set bias to "
                f"'none' for all adapters but one; {biased} train biases of the base model.",
                "bias",
            )

    def check_known(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise AdapterNameError(
                f"Adapter(s) {sorted(unknown)} not found, available adapters: {sorted(self.peft_config)}."
            )

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter or several, and the wrappers of layers that no other adapter is on. The biases that they
        trained are the base model's own again.

        If none of the active ones is left, the first of the others takes over.

        Raises:
            AdapterNameError: one of them does not exist; none is removed then.
            MergeError: one of them is merged; none is removed then.
        """
        self.check_attached()
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.peft_config:
                raise AdapterNameError(f"Adapter {name} does not exist; there are {list(self.peft_config)}.")
        merged = {name for _, layer in self.adapted_layers() for name in layer.merged_adapters}.intersection(names)
        if merged:
            raise MergeError(
                f"Cannot delete adapter(s) {sorted(merged)} while they are merged. Please unmerge them first."
            )
        for name in names:
            self.take_off(name)
            exchange(self.state.biases.pop(name, []))
            del self.peft_config[name]
        self.state.active = [name for name in self.state.active if name not in names]
        if not self.state.active and self.peft_config:
            first = next(iter(self.peft_config))
            warnings.warn(f"No active adapter is left after {names} are deleted; {first} is active now.", stacklevel=2)
            self.set_adapter(first)

    def take_off(self, adapter_name: str, paths: list[str] | None = None) -> None:
        """Remove an adapter from the layers at these paths (default: all), and wrappers that hold no other adapter."""
        chosen = [layer for path, layer in self.adapted_layers() if paths is None or path in paths]
        for site, wrapper in list(self.wrapped_sites()):
            if any(wrapper is layer for layer in chosen):
                wrapper.remove(adapter_name)
                if not wrapper.adapters:
                    setattr(site.parent, site.name, wrapper.base_layer)

    @property
    def detached(self) -> bool:
        """Whether the adapters are off the base model; see `detach`."""
        return self._detached is not None

    def check_attached(self) -> None:
        if self.detached:
            raise AdapterError("The adapters are detached from the base model; call `attach()` first.")

    def detach(self) -> None:
        """Take all adapters off the base model, which is then as it was before them, to the bit, until `attach` puts
        the same ones back. So several models with adapters can be made on one base model, and each be used in turn.

        Raises:
            AdapterError: they are detached already.
            MergeError: some are merged.
            ConfigError: the base model's layers are replicated.
        """
        self.check_attached()
        if any(layer.merged for _, layer in self.adapted_layers()):
            raise MergeError("Cannot detach adapters that are merged. Please unmerge them first.")
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ConfigError(
                "Cannot detach adapters from replicated layers: the base model was rebuilt for them.",
                "layer_replication",
            )
        self._detached = list(self.wrapped_sites())
        for _, layer in reversed(list(self.adapted_layers())):  # of tied layers the first one holds the oldest weights
            layer.exchange()
        for site, layer in self._detached:
            setattr(site.parent, site.name, layer.base_layer)
        self.state.exchange_biases()

    def attach(self) -> None:
        """Put detached adapters back on the base model, as they were; on one that they are on do nothing."""
        for site, layer in self._detached or ():
            setattr(site.parent, site.name, layer)
        if self._detached is not None:
            for _, layer in self.adapted_layers():
                layer.exchange()
            self.state.exchange_biases()
        self._detached = None

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **how: Any) -> None:
        """Add an adapter that combines others; see `combine.add_weighted_adapter`."""
        combine.add_weighted_adapter(self, adapters, weights, adapter_name, **how)

    @property
    def active_adapters(self) -> list[str]:
        return self.state.active

    @property
    def active_adapter(self) -> str | list[str]:
        return self.state.active[0] if len(self.state.active) == 1 else self.state.active

    _active_adapter = active_adapter  # the name that peft's own code goes by

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that fold in this order, the active ones; only these train."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_known(names)
        if any(layer.merged for _, layer in self.adapted_layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        for path, layer in self.adapted_layers():
            rivals = [name for name in names if name in layer.adapters and layer.adapter(name).exclusive]
            if len(rivals) > 1:
                kind = f"{type(layer.adapter(rivals[0])).__name__}Wrapper"
                raise AdapterNameError(
                    f"Only one adapter can be set at a time for {kind}; at {path} there are {rivals}."
                )
        self.activate(names)
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def activate(self, names: list[str]) -> None:
        """Let these adapters act, on layers that were set by themselves as well."""
        self.state.active = names
        self._paused = []
        for _, layer in self.adapted_layers():
            layer.follow()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of one adapter or several train or not, with the biases their configurations name."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for _, layer in self.layers_of(name):
                layer.adapters[name].requires_grad_(requires_grad)
            for bias in self.trained_biases(name).values():
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

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether the model's adapters act."""
        return self.state.enabled

    def enable_adapter_layers(self) -> None:
        self.enable(True)

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
        self.enable(False)

    def enable(self, enabled: bool) -> None:
        """Let the adapters act or not, on layers that were set by themselves as well. Those that do not act do not
        train either."""
        layers = [layer for _, layer in self.adapted_layers()]
        if self.state.enabled and not enabled:
            own = [p for layer in layers for p in layer.adapters.parameters()]
            self._paused = [p for p in own if p.requires_grad]
        for p in self._paused:
            p.requires_grad_(enabled)
        self.state.enabled = enabled
        for layer in layers:
            layer.follow()

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the named (default: the active) adapters into the base weights, reversibly and bit-exactly so.

        Raises:
            MergeError: a rule has no weights or, with `safe_merge`, a result is not finite. Nothing stays merged then.
        """
        self.check_mergeable(adapter_names)
        already = {n for _, layer in self.adapted_layers() for n in layer.merged_adapters}
        if already >= set(adapter_names or self.active_adapters):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        try:
            for _, layer in self.adapted_layers():
                layer.merge(safe_merge, adapter_names)
        except MergeError:
            self.unmerge_adapter()
            raise

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        self.check_attached()
        self.check_known(adapter_names or [])
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise MergeError("Cannot merge LORA layers when base model layers are replicated: they share weights.")
        for name in adapter_names or self.active_adapters:
            warn_of_merging(self.model, self.peft_config[name], self.targets(name))

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit by bit."""
        # tied layers: the first one merged holds the oldest weights
        for _, layer in reversed(list(self.adapted_layers())):
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good and return the plain base model. No layer's weights are kept twice.

        Raises:
            MergeError: as `merge_adapter`. Nothing is merged then.
        """
        self.check_mergeable(adapter_names)
        layers = [layer for _, layer in self.adapted_layers()]
        for layer in tqdm(layers, disable=not progressbar, desc="Checking", leave=False):
            layer.changes(safe_merge, adapter_names)
        for layer in tqdm(layers, disable=not progressbar, desc="Merging"):
            layer.merge(adapter_names=adapter_names, keep=False)
        return self._unwrap(adapter_names or self.active_adapters)

    def unload(self) -> nn.Module:
        """Remove all adapters and return the plain base model with its own weights."""
        self.check_attached()
        self.unmerge_adapter()
        for _, layer in self.adapted_layers():
            layer.restore()
        self.state.exchange_biases()
        return self._unwrap([])

    def _unwrap(self, merged: list[str]) -> nn.Module:
        for site, wrapper in list(self.wrapped_sites()):
            copies: list[Any] = [a for n, a in wrapper.adapters.items() if n in merged and a.replaces]
            setattr(site.parent, site.name, copies[-1].modules_to_save if copies else wrapper.base_layer)
        return self.model


# one tuner for all methods, under the names that peft has for each
LoraModel = AdaLoraModel = IA3Model = LoHaModel = LoKrModel = TrainableTokensModel = AdaptionPromptModel = Tuner
PEFT_TYPE_TO_TUNER_MAPPING = {method.config.peft_type: Tuner for method in METHODS.values() if method.kinds}
