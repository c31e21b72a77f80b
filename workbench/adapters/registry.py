"""The methods that exist, as facts. Adding one is a file in `methods/` and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from workbench.errors import ConfigError

from . import base_ops, defaults
from .adapter import Adapter
from .config import PeftConfig
from .methods import (
    adalora,
    adaption_prompt,
    ia3,
    loha,
    lokr,
    lora,
    lora_parameters,
    lora_variants,
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
        prefix: what the names of its parameters start with, by which peft knows them.
        adapter: makes the adapter of one layer from the layer, the configuration and the layer's path.
        kinds: the layer kinds (`base_ops`) it can adapt; none for a prompt method.
        parameters: makes the adapter on a module's own parameters (`target_parameters`) from the module, their names,
            the configuration and the module's path.
        tied: makes the adapter of a layer that shares its weight with an adapted embedding (`ensure_weight_tying`) from
            the embedding's adapter and the layer.
        targets: default `target_modules` by the base model's `model_type`.
        encoder: makes a prompt method's virtual tokens from the configuration and the base model's input embedding.
        penalty: what an adapter adds to the model's loss, if anything, from the tuner and the adapter's name.
        after_step: what is done after each optimiser step, while the gradients are there: called with the tuner, the
            adapter's name and the step, counted from 1.
        regularisation: what is to be added to the loss in training, if anything, from the tuner and the adapter's name,
            where peft leaves that to its users.
        one_trains: only one of a model's adapters may train.
        size: the field of the configuration that sets how many parameters an adapter has, if there is one.
    """

    name: str
    title: str
    config: type[PeftConfig]
    prefix: str
    adapter: Callable[[base_ops.Layer, Any, str], Adapter] | None = None
    kinds: frozenset[str] = frozenset()
    targets: dict[str, list[str] | str] = field(default_factory=dict)
    parameters: Callable[[Any, list[str], Any, str], Adapter] | None = None
    tied: Callable[[Any, base_ops.Layer], Adapter] | None = None
    encoder: Callable[[Any, Any], VirtualTokens] | None = None
    penalty: Callable[[Any, str], Tensor | None] | None = None
    after_step: Callable[[Any, str, int], None] | None = None
    regularisation: Callable[[Any, str], Tensor | None] | None = None
    one_trains: bool = False
    size: str | None = None


VIRTUAL = "num_virtual_tokens"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lora",
            "LoRA",
            lora.LoraConfig,
            "lora_",
            lora_variants.build,
            lora.KINDS,
            defaults.LORA_TARGETS,
            parameters=lora_parameters.on_parameters,
            tied=lora.TiedLora,
            regularisation=lora_variants.regularisation,
            size="r",
        ),
        Method(
            "adalora",
            "AdaLoRA",
            adalora.AdaLoraConfig,
            "lora_",
            adalora.AdaLora,
            adalora.KINDS,
            defaults.ADALORA_TARGETS,
            penalty=adalora.penalty,
            after_step=adalora.allocate,
            one_trains=True,
            size="init_r",
        ),
        Method("loha", "LoHa", loha.LoHaConfig, "hada_", loha.LoHa, lycoris.KINDS, defaults.LORA_TARGETS, size="r"),
        Method("lokr", "LoKr", lokr.LoKrConfig, "lokr_", lokr.LoKr, lycoris.KINDS, defaults.LORA_TARGETS, size="r"),
        Method(
            "adaption_prompt",
            "adaption prompt",
            adaption_prompt.AdaptionPromptConfig,
            "adaption_prompt_",
            adaption_prompt.AdaptionPrompt,
            adaption_prompt.KINDS,
            defaults.ADAPTION_PROMPT_TARGETS,
            size="adapter_len",
        ),
        Method("ia3", "(IA)3", ia3.IA3Config, "ia3_", ia3.IA3, ia3.KINDS, defaults.IA3_TARGETS),
        Method(
            "trainable_tokens",
            "trainable tokens",
            trainable_tokens.TrainableTokensConfig,
            "trainable_tokens_",
            trainable_tokens.TrainableTokens,
            trainable_tokens.KINDS,
        ),
        Method(
            "prompt_tuning",
            "prompt tuning",
            prompt_tuning.PromptTuningConfig,
            "prompt_tuning_",
            encoder=prompt_tuning.PromptEmbedding,
            size=VIRTUAL,
        ),
        Method(
            "prefix_tuning",
            "prefix tuning",
            prefix_tuning.PrefixTuningConfig,
            "prefix_tuning_",
            encoder=prefix_tuning.PrefixEncoder,
            size=VIRTUAL,
        ),
        Method(
            "p_tuning",
            "P-tuning",
            p_tuning.PromptEncoderConfig,
            "p_tuning_",
            encoder=p_tuning.PromptEncoder,
            size="encoder_hidden_size",
        ),
        Method(
            "multitask_prompt_tuning",
            "multitask prompt tuning",
            multitask_prompt_tuning.MultitaskPromptTuningConfig,
            "multitask_prompt_tuning_",
            encoder=multitask_prompt_tuning.MultitaskPromptEmbedding,
            size=VIRTUAL,
        ),
    )
}

_BY_PEFT_TYPE = {str(method.config.peft_type): method for method in METHODS.values()}

PeftType = StrEnum("PeftType", [(name, name) for name in _BY_PEFT_TYPE], module=__name__)  # type: ignore[misc]
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType(name): method.config for name, method in _BY_PEFT_TYPE.items()}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType(name): method.prefix for name, method in _BY_PEFT_TYPE.items()}


def by_peft_type(peft_type: str | None) -> Method:
    """The method with this `peft_type`, e.g. "LORA".

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(peft_type, str) or peft_type not in _BY_PEFT_TYPE:
        known = ", ".join(sorted(_BY_PEFT_TYPE))
        raise ConfigError(f"Unknown peft_type {peft_type!r}; known are {known}.", "peft_type")
    return _BY_PEFT_TYPE[peft_type]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A configuration from its fields; `peft_type` decides the class.

    Raises:
        ConfigError: there is no such method, or a value is refused.
    """
    return by_peft_type(config_dict["peft_type"]).config(**config_dict)
