"""The methods that exist, as facts. Adding one is a file in `methods/` and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import ConfigError

from . import base_ops, defaults
from .adapter import Adapter
from .config import PeftConfig
from .methods import (
    ia3,
    loha,
    lokr,
    lora,
    lycoris,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    trainable_tokens,
)
from .virtual_tokens import VirtualTokens


@dataclass(frozen=True)
class Method:
    """What the rest of the library needs to know of a method.

    Attributes:
        name: the name in a study file.
        title: the name in prose and tables.
        config: its configuration class; `config.peft_type` is the name in files.
        adapter: makes the adapter of one layer from the layer, the configuration and the layer's path.
        kinds: the layer kinds (`base_ops`) it can adapt; none for a prompt method.
        targets: default `target_modules` by the base model's `model_type`.
        encoder: makes a prompt method's virtual tokens from the configuration and the base model's input embedding.
    """

    name: str
    title: str
    config: type[PeftConfig]
    adapter: Callable[[base_ops.Layer, Any, str], Adapter] | None = None
    kinds: frozenset[str] = frozenset()
    targets: dict[str, list[str] | str] = field(default_factory=dict)
    encoder: Callable[[Any, Any], VirtualTokens] | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "LoRA", lora.LoraConfig, lora.build, lora.KINDS, defaults.LORA_TARGETS),
        Method("loha", "LoHa", loha.LoHaConfig, loha.LoHa, lycoris.KINDS, defaults.LORA_TARGETS),
        Method("lokr", "LoKr", lokr.LoKrConfig, lokr.LoKr, lycoris.KINDS, defaults.LORA_TARGETS),
        Method("ia3", "(IA)3", ia3.IA3Config, ia3.IA3, ia3.KINDS, defaults.IA3_TARGETS),
        Method(
            "trainable_tokens",
            "trainable tokens",
            trainable_tokens.TrainableTokensConfig,
            trainable_tokens.TrainableTokens,
            trainable_tokens.KINDS,
        ),
        Method(
            "prompt_tuning",
            "prompt tuning",
            prompt_tuning.PromptTuningConfig,
            encoder=prompt_tuning.PromptEmbedding,
        ),
        Method(
            "prefix_tuning",
            "prefix tuning",
            prefix_tuning.PrefixTuningConfig,
            encoder=prefix_tuning.PrefixEncoder,
        ),
        Method("p_tuning", "P-tuning", p_tuning.PromptEncoderConfig, encoder=p_tuning.PromptEncoder),
        Method(
            "multitask_prompt_tuning",
            "multitask prompt tuning",
            multitask_prompt_tuning.MultitaskPromptTuningConfig,
            encoder=multitask_prompt_tuning.MultitaskPromptEmbedding,
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
