"""Virtual tokens: what the prompt methods hold instead of adapters in layers, and their configurations' sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import CheckpointError, ConfigError

from .adapter import Part, Slot
from .config import PeftConfig, TaskType


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configurations of all prompt methods hold. Sizes left out are read off the base model.

    Args:
        num_virtual_tokens: how many virtual tokens stand before the input.
        token_dim: width of a virtual token.
        num_transformer_submodules: 1; 2 for an encoder and a decoder with virtual tokens of their own.
        num_attention_heads: heads of the base model (of its keys and values, where they have fewer).
        num_layers: layers of the base model.
        modules_to_save: modules that train as a whole and are saved with the adapter.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers", "num_ranks", "num_tasks"):
            value = getattr(self, name, None)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number from 1 up, not {value!r}.", name)

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def total_virtual_tokens(self) -> int:
        """Virtual tokens of all submodules together."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)  # type: ignore[operator]

    def fill_sizes(self, model_config: Any) -> None:
        """Read the sizes that were left out off the base model's configuration.

        Raises:
            ConfigError: a size, or the task, is not known.
        """
        if self.task_type is None:
            raise ConfigError(f"{self.peft_type} needs a `task_type`, which says where virtual tokens go.", "task_type")
        if self.num_virtual_tokens is None:
            raise ConfigError("Please specify `num_virtual_tokens` in `peft_config`.", "num_virtual_tokens")
        text = text_config(model_config)
        sources = {
            "num_layers": "num_hidden_layers",
            "token_dim": "hidden_size",
            "num_attention_heads": "num_attention_heads",
        }
        for name, source in sources.items():
            if getattr(self, name) is None:
                if not hasattr(text, source):
                    raise ConfigError(f"Please specify `{name}` in `peft_config`.", name)
                setattr(self, name, getattr(text, source))
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
        self.fit(text)
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim

    def fit(self, text: Any) -> None:
        """Fit the sizes to what the method changes in the model, whose configuration is `text`."""


def text_config(model_config: Any) -> Any:
    """The part of a model's configuration that is about text."""
    return model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config


class VirtualTokens(Part):
    """The virtual tokens of one adapter: an embedding `(tokens, width)` and, while it trains, perhaps a network after
    it.

    A checkpoint holds what comes out in the end, under the name `prompt_embeddings`; a network is not saved.

    Attributes:
        in_cache: the tokens enter as keys and values of every layer instead of as embeddings.
        before_decoder: an encoder-decoder has tokens before the decoder's input too, if its submodules count two.
    """

    in_cache: ClassVar[bool] = False
    before_decoder: ClassVar[bool] = False

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)

    @property
    def reparameterised(self) -> bool:
        """Whether a network makes the virtual tokens out of the embedding."""
        return len(list(self.children())) > 1

    def forward(self, indices: Tensor) -> Tensor:
        """The virtual tokens with these indices: `(rows, tokens)` to `(rows, tokens, width)`."""
        return self.embedding(indices)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        """All virtual tokens, `(1, tokens, width)`, or a row for each of `task_ids` where the method knows tasks."""
        return self(torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)[None])

    def slots(self) -> dict[str, Slot]:
        """As in `Part`.

        Raises:
            CheckpointError: the tokens come out of a network, into which a checkpoint cannot be taken apart again.
        """
        if self.reparameterised:
            raise CheckpointError(
                "Cannot set a reparameterised prompt from a checkpoint, which holds only what its network gave out: "
                "load it for inference (is_trainable=False)."
            )
        slots = super().slots()
        return {"prompt_embeddings": slots.pop("embedding.weight"), **slots}

    def saved(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prompt()[0].detach()} if self.reparameterised else super().saved()
