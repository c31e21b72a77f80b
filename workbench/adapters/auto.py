"""`AutoPeftModelFor...`: an adapter with its base model, which the adapter's configuration names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoTokenizer

from workbench.errors import CheckpointError, ConfigError

from .config import PeftConfig
from .hub import locate
from .model import (
    TASK_MODELS,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

IMPORTABLE = ("diffusers", "lerobot", "megatron-core", "transformers")


class AutoPeftModel:
    """Loads an adapter whose configuration has no task type, with the base model that it was made for."""

    _target_class: ClassVar[Any] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(f"{type(self).__name__} is made by `from_pretrained` only.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model and put the adapter on it. If there is a tokenizer beside the adapter that knows more
        tokens than the base model has embeddings, these are resized first.

        Args:
            revision: the adapter's; that of the base model is in the configuration.
            import_allowlist: packages from which the configuration may name the base model's class; by default
                `IMPORTABLE`. A file could otherwise run code by naming a package.
            kwargs: for `from_pretrained` of the base model and of `PeftModel`.

        Raises:
            ConfigError: the configuration is for another task, or names no class or one that may not be imported.
            CheckpointError: as `PeftModel.from_pretrained`.
        """
        source = pretrained_model_name_or_path
        found = PeftConfig.from_pretrained(source, revision=revision, **kwargs)
        base_class = cls._base_class(found, IMPORTABLE if import_allowlist is None else import_allowlist)
        base = base_class.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        tokens = count_tokens(source, revision=revision, **kwargs)
        if hasattr(base, "get_input_embeddings") and tokens > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(tokens)
        return cls._target_peft_class.from_pretrained(
            base, source, adapter_name, is_trainable, config, revision=revision, **kwargs
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, importable: Sequence[str]) -> Any:
        if config.task_type is not None:
            expected = TASK_MODELS[config.task_type]
            if cls._target_class is None or cls._target_peft_class is not expected:
                raise ConfigError(
                    f"{cls.__name__} cannot load an adapter with the task type {config.task_type}: use "
                    f"Auto{expected.__name__}.",
                    "task_type",
                )
            return cls._target_class
        if config.auto_mapping is None:
            raise ConfigError("The configuration has neither a task type nor an `auto_mapping`.", "auto_mapping")
        library, name = (config.auto_mapping.get(key) for key in ("parent_library", "base_model_class"))
        if not isinstance(library, str) or not isinstance(name, str):
            raise ConfigError("The `auto_mapping` names no class and library.", "auto_mapping")
        if not any(library == allowed or library.startswith(f"{allowed}.") for allowed in importable):
            raise ConfigError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, pass `import_allowlist=['{library}']`.",
                "auto_mapping",
            )
        try:
            found = getattr(importlib.import_module(library), name, None)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"The auto mapping's '{library}' cannot be imported: {error}", "auto_mapping") from error
        known = isinstance(found, type) and hasattr(found, "from_pretrained")
        if importable is IMPORTABLE and not known:  # whoever allows more has said what is to be called
            raise ConfigError(f"The auto mapping names '{name}', which is no model of '{library}'.", "auto_mapping")
        return found


def count_tokens(source: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> int:
    """How many tokens the tokenizer knows that was saved beside an adapter; 0 if there is none."""
    try:
        locate(source, "tokenizer_config.json", **kwargs)
    except CheckpointError:
        return 0
    options = {key: kwargs[key] for key in ("revision", "token", "subfolder", "cache_dir") if kwargs.get(key)}
    return len(AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for language models."""

    _target_class = transformers.AutoModelForCausalLM
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for encoder-decoders."""

    _target_class = transformers.AutoModelForSeq2SeqLM
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for classifiers of texts."""

    _target_class = transformers.AutoModelForSequenceClassification
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for classifiers of tokens."""

    _target_class = transformers.AutoModelForTokenClassification
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for finders of answers."""

    _target_class = transformers.AutoModelForQuestionAnswering
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for models without a head."""

    _target_class = transformers.AutoModel
    _target_peft_class = PeftModelForFeatureExtraction
