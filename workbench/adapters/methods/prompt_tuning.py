"""Prompt tuning: trained embeddings before those of the input (Lester et al. 2021, arXiv:2104.08691, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from ..virtual_tokens import PromptLearningConfig, VirtualTokens


class PromptTuningInit(StrEnum):
    """What the virtual tokens start as: the words of a text, words drawn from the vocabulary, or noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of prompt tuning, beside the sizes in `PromptLearningConfig`.

    Args:
        prompt_tuning_init: what the virtual tokens start as: RANDOM, SAMPLE_VOCAB (tokens drawn from the vocabulary)
            or TEXT.
        prompt_tuning_init_text: the text for TEXT; repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: hub id or folder of the tokenizer for TEXT.
        tokenizer_kwargs: options of the tokenizer for TEXT.
    """

    peft_type: str | None = "PROMPT_TUNING"
    inits: ClassVar[type[StrEnum]] = PromptTuningInit

    prompt_tuning_init: str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [str(init) for init in self.inits]
        if self.prompt_tuning_init not in known:
            raise ConfigError(
                f"prompt_tuning_init must be one of {', '.join(known)}, not {self.prompt_tuning_init!r}.",
                "prompt_tuning_init",
            )
        self.prompt_tuning_init = str(self.prompt_tuning_init)
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, name):
                raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)}.", name)
        if self.tokenizer_kwargs and not from_text:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.", "tokenizer_kwargs")


class PromptEmbedding(VirtualTokens):
    """`embedding`: (tokens, width), which go in as they are."""

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module):
        super().__init__(config.total_virtual_tokens, config.token_dim)  # type: ignore[arg-type]
        if config.inference_mode:  # a file will fill it
            return
        ids = first_words(config, word_embeddings)
        if ids is not None:
            with torch.no_grad():
                self.embedding.weight.copy_(word_embeddings(ids))


def first_words(config: PromptTuningConfig, word_embeddings: Any) -> Tensor | None:
    """Ids of the words that the virtual tokens start as; None for noise."""
    count, device = config.total_virtual_tokens, word_embeddings.weight.device
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return torch.randint(0, word_embeddings.num_embeddings, (count,)).to(device)
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        from transformers import AutoTokenizer

        # a configuration comes with a downloaded adapter, which must not get to run code, nor to choose where to write
        options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "cache_dir"}
        options["trust_remote_code"] = False
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
        return torch.tensor(list(islice(cycle(ids), count)), device=device)
    return None
