"""The methods that exist, as facts. Adding one is a file in `methods/` and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import ConfigError

from . import base_ops, defaults
from .adapter import Adapter
from .config import PeftConfig
from .methods import ia3, lora, trainable_tokens


@dataclass(frozen=True)
class Method:
    """What the rest of the library needs to know of a method.

    Attributes:
        name: the name in a study file.
        title: the name in prose and tables.
        config: its configuration class; `config.peft_type` is the name in files.
        adapter: makes the adapter of one layer from the layer, the configuration and the layer's path.
        kinds: the layer kinds (`base_ops`) it can adapt.
        targets: default `target_modules` by the base model's `model_type`.
    """

    name: str
    title: str
    config: type[PeftConfig]
    adapter: Callable[[base_ops.Layer, Any, str], Adapter]
    kinds: frozenset[str]
    targets: dict[str, list[str] | str] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA", lora.LoraConfig, lora.build, lora.KINDS, defaults.LORA_TARGETS),
        Method("ia3", "(IA)3", ia3.IA3Config, ia3.IA3, ia3.KINDS, defaults.IA3_TARGETS),
        Method(
            "trainable_tokens",
            "trainable tokens",
            trainable_tokens.TrainableTokensConfig,
            trainable_tokens.TrainableTokens,
            trainable_tokens.KINDS,
        ),
    )
}

_BY_PEFT_TYPE = {method.config.peft_type: method for method in METHODS.values()}


def by_peft_type(peft_type: str | None) -> Method:
    """The method with this `peft_type`, e.g. "LORA".

    Raises:
        ConfigError: there is none.
    """
    if peft_type not in _BY_PEFT_TYPE:
        known = ", ".join(sorted(filter(None, _BY_PEFT_TYPE)))
        raise ConfigError(f"Unknown peft_type {peft_type!r}; known are {known}.", "peft_type")
    return _BY_PEFT_TYPE[peft_type]
