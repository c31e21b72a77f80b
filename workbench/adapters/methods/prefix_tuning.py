"""Prefix tuning: trained keys and values before those of the input, in every layer (Li and Liang 2021,
arXiv:2101.00190, section 4.2), optionally made by a two-layer network while they train (section 4.3)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from workbench.errors import ConfigError

from ..virtual_tokens import PromptLearningConfig, VirtualTokens


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning, beside the sizes in `PromptLearningConfig`.

    Args:
        init_weights: "zero": keys and values start at zero; null: at random.
        encoder_hidden_size: width of the network of `prefix_projection`; by default that of the tokens.
        prefix_projection: keys and values are made by a network while they train.
    """

    peft_type: str | None = "PREFIX_TUNING"

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights must be zero or null, not {self.init_weights!r}.", "init_weights")

    def fit(self, text: Any) -> None:
        # where layers differ the widest decides, and others take a part
        text = max(unlike_layers(text), key=lambda layer: layer.head_dim, default=text)
        heads = getattr(text, "num_key_value_heads", None)
        if heads is not None:  # several heads share their keys and values, which a prefix has to fit
            width = getattr(text, "head_dim", None) or self.token_dim // self.num_attention_heads  # type: ignore[operator]
            self.token_dim, self.num_attention_heads = width * heads, heads
        if self.token_dim % self.num_attention_heads:  # type: ignore[operator]
            raise ConfigError(
                f"token_dim {self.token_dim} cannot be divided among {self.num_attention_heads} heads.", "token_dim"
            )


class PrefixEncoder(VirtualTokens):
    """`embedding`: (tokens, layers * 2 * width), or with a projection (tokens, width), of which `transform` makes
    that."""

    in_cache = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        width, stored = config.token_dim, config.num_layers * 2 * config.token_dim
        projected = config.prefix_projection and not config.inference_mode
        super().__init__(config.num_virtual_tokens, width if projected else stored)
        self.heads, self.layers = config.num_attention_heads, config.num_layers
        self.submodules = config.num_transformer_submodules
        if projected:
            hidden = config.encoder_hidden_size or width
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, stored))
        if config.init_weights == "zero":
            last = self.transform[-1] if projected else self.embedding
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: Tensor) -> Tensor:
        tokens = self.embedding(indices)
        return self.transform(tokens) if self.reparameterised else tokens

    def keys_and_values(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """For each layer its keys and values, (rows, heads, tokens, width of a head)."""
        split = self.prompt().unflatten(-1, (2 * self.layers, self.heads, -1))
        keys_values = split.permute(2, 0, 3, 1, 4).expand(-1, rows, -1, -1, -1)
        # peft's files count two pairs a decoder layer, the second for its cross-attention, and use the first of them
        step = 2 * self.submodules
        starts = [step * layer % (2 * self.layers) for layer in range(self.layers)]
        return [(keys_values[i], keys_values[i + 1]) for i in starts]


def unlike_layers(text: Any) -> list[Any]:
    """Where a model's layers differ (Gemma 4), the configurations of those that have keys and values of their own."""
    if not getattr(text, "is_heterogeneous", False):
        return []
    own = text.num_hidden_layers - getattr(text, "num_kv_shared_layers", 0)
    return [text.per_layer_config[i] for i in range(own)]


def by_layer(pairs: list[tuple[Tensor, Tensor]], text: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """What each layer takes of its keys and values, (rows, heads, tokens, width): where layers differ, as many heads
    and as much of the width as it has. Layers that have more, or use the keys and values of another, take none.

    Raises:
        ConfigError: all layers have more.
    """
    layers = unlike_layers(text)
    if not layers:
        return dict(enumerate(pairs))
    taken = {}
    for index, (layer, (key, value)) in enumerate(zip(layers, pairs, strict=False)):
        heads, width = layer.num_key_value_heads, layer.head_dim
        if heads <= key.shape[1] and width <= key.shape[3]:
            taken[index] = key[:, :heads, :, :width], value[:, :heads, :, :width]
    if not taken:
        raise ConfigError(
            f"Prefix tuning skipped every layer: all have more than the {key.shape[1]} heads of width {key.shape[3]} "
            "that the prefix was made for."
        )
    skipped = sorted(set(range(len(pairs))) - taken.keys())
    if skipped:
        warnings.warn(
            f"Prefix tuning is in layers {list(taken)}; skipped {skipped} due to KV shape mismatch or shared KV.",
            stacklevel=2,
        )
    return taken
