"""P-tuning: virtual tokens that a small network makes while they train (Liu et al. 2021, arXiv:2103.10385,
section 3.3)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from workbench.errors import ConfigError

from ..virtual_tokens import PromptLearningConfig, VirtualTokens


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of P-tuning, beside the sizes in `PromptLearningConfig`.

    Args:
        encoder_reparameterization_type: the network that makes the virtual tokens, MLP or LSTM.
        encoder_hidden_size: width of the network; by default that of the tokens.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: probability of dropping an output between the LSTM's layers.
    """

    peft_type: str | None = "P_TUNING"

    encoder_reparameterization_type: str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind not in list(PromptEncoderReparameterizationType):
            raise ConfigError(
                f"encoder_reparameterization_type must be MLP or LSTM, not {kind!r}.",
                "encoder_reparameterization_type",
            )
        self.encoder_reparameterization_type = str(kind)
        if not 0 <= self.encoder_dropout < 1:
            raise ConfigError(f"encoder_dropout must be in [0, 1), not {self.encoder_dropout!r}.", "encoder_dropout")


class PromptEncoder(VirtualTokens):
    """`embedding`: (tokens, width), and while it trains `mlp_head`, with LSTM after a bidirectional `lstm_head`."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None):
        width, hidden = config.token_dim, config.encoder_hidden_size
        super().__init__(config.total_virtual_tokens, width)
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                width,
                hidden,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.draws = self.lstm_head.dropout > 0
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
            if config.encoder_num_layers != 2:
                warnings.warn(
                    "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used.",
                    stacklevel=2,
                )
        layers: list[nn.Module] = []
        for inner, out in pairwise(sizes):
            layers += [nn.Linear(inner, out), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self, indices: Tensor) -> Tensor:
        tokens = self.embedding(indices)
        if hasattr(self, "lstm_head"):
            tokens, _ = self.lstm_head(tokens)
        return self.mlp_head(tokens) if self.reparameterised else tokens
