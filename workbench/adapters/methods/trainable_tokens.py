"""Trainable tokens: the embeddings of a few tokens train, all others stay frozen. The method of peft's documentation;
rows are replaced after the lookup, so neither the table nor its gradient is ever copied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import ConfigError, MergeError

from .. import base_ops
from ..adapter import Adapter
from ..config import PeftConfig, name_set

KINDS = frozenset({base_ops.EMBEDDING, base_ops.LINEAR})


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Configuration of trainable tokens.

    Args:
        token_indices: ids of the tokens whose embeddings train.
        target_modules: names of the embedding layers; the model's input embedding by default. A tied output layer
            follows.
        init_weights: start with the base's embeddings; otherwise random.
        modules_to_save: modules that train as a whole and are saved with the adapter, e.g. a new task head. peft has no
            such field: it loads these modules from the file all the same, with a warning about the field.
    """

    peft_type: str | None = "TRAINABLE_TOKENS"
    extension_fields: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name_set(self.target_modules, "target_modules")  # peft's files keep the order
        check_indices(self.token_indices, "token_indices")


def check_indices(indices: list[int], field_name: str) -> None:
    """Refuse token ids that are not whole numbers from zero up, or that appear twice."""
    bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    if bad:
        raise ConfigError(f"{field_name} must hold token ids (whole numbers from 0), not {bad[:5]}.", field_name)
    doubled = sorted({i for i in indices if indices.count(i) > 1}) if len(set(indices)) < len(indices) else []
    if doubled:
        raise ConfigError(f"{field_name} holds {doubled[:5]} more than once.", field_name)


class TrainableTokens(Adapter):
    """`trainable_tokens_delta` holds the new rows, `(tokens, dim)`, on an embedding or on a linear output layer."""

    views = ("trainable_tokens_delta", "trainable_tokens_original", "token_indices")

    def __init__(self, layer: base_ops.Layer, config: TrainableTokensConfig, path: str):
        super().__init__()
        if not config.token_indices:
            raise ConfigError(f"No token ids are given for {path}: nothing would train.", "token_indices")
        rows = layer.weight.shape[0]
        outside = [i for i in config.token_indices if i >= rows]
        if outside:
            raise ConfigError(
                f"Token ids {outside[:5]} are outside {path}, which has {rows} rows (0 to {rows - 1}).", "token_indices"
            )
        self.token_indices = list(config.token_indices)
        indices = torch.tensor(self.token_indices, dtype=torch.long, device=layer.weight.device)
        base_rows = layer.weight[indices].detach()
        self.trainable_tokens_delta = nn.Parameter(
            base_rows.clone() if config.init_weights else torch.randn_like(base_rows)
        )
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("by_id", indices.argsort(), persistent=False)
        self._layer = [layer]  # in a list, so that it is not a part of the adapter

    indices: Tensor
    by_id: Tensor

    @property
    def trainable_tokens_original(self) -> Tensor:
        """The base's rows, `(tokens, dim)`."""
        return self._layer[0].weight[self.indices].detach()

    def kind(self, layer: nn.Module) -> str:
        return "TrainableTokensLayer"

    def check_merge(self, name: str, others: dict[str, Adapter]) -> None:
        """Refuse tokens that another adapter has written, where only one of the two can act."""
        for other in others.values():
            both = sorted({*self.token_indices} & {*getattr(other, "token_indices", ())})
            if both and self.exclusive:
                raise MergeError(
                    f"Token indices {both} of adapter {name!r} are already defined and would result in undefined "
                    "merging behavior."
                )

    def rows(self, padding_idx: int | None) -> Tensor:
        """The trained rows; the padding row gets no gradient, as in `nn.Embedding`."""
        rows = self.trainable_tokens_delta
        if padding_idx in self.token_indices:
            return torch.where((self.indices == padding_idx)[:, None], rows.detach(), rows)
        return rows

    def act_on(self, layer: base_ops.Layer, x: Tensor, y: Tensor) -> Tensor:
        """The output of a layer that holds these tokens, with the trained rows in place of the base's.

        On an embedding `x` holds ids and the rows that were looked up are replaced; on a linear output layer the
        tokens' logits are.
        """
        if isinstance(layer, nn.Embedding):
            ordered = self.indices[self.by_id]
            position = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
            hit = ordered[position] == x
            rows = self.rows(layer.padding_idx)[self.by_id[position[hit]]] * base_ops.embedding_scale(layer)
            return y.index_put((hit,), rows.to(y.dtype))
        bias = None if layer.bias is None else layer.bias[self.indices]
        logits = F.linear(x, self.trainable_tokens_delta.to(x.dtype), bias)
        return y.index_copy(-1, self.indices, logits.to(y.dtype))

    def write_into(self, layer: base_ops.Layer, weight: Tensor) -> Tensor:
        """The canonical weight of a layer that holds these tokens, with the trained rows."""
        rows = self.trainable_tokens_delta.to(weight.dtype)
        if isinstance(layer, nn.Embedding):
            return weight.index_copy(1, self.indices, rows.T)
        return weight.index_copy(0, self.indices, rows)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act_on(self._layer[0], x, y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.write_into(self._layer[0], weight), bias


class TiedTokens(Adapter):
    """A layer whose weight is tied to an adapted embedding, such as the output layer: it uses the embedding's rows."""

    views = TrainableTokens.views

    def __init__(self, source: TrainableTokens, layer: base_ops.Layer):
        super().__init__()
        self._source, self._layer = [source], [layer]  # in lists, so that parameters are counted and moved once
        self.prefix, self.exclusive = source.prefix, source.exclusive

    @property
    def leader(self) -> TrainableTokens:
        return self._source[0]

    @property
    def token_indices(self) -> list[int]:
        return self.leader.token_indices

    @property
    def trainable_tokens_delta(self) -> nn.Parameter:
        return self.leader.trainable_tokens_delta

    @property
    def trainable_tokens_original(self) -> Tensor:
        return self.leader.trainable_tokens_original

    def kind(self, layer: nn.Module) -> str:
        return self.leader.kind(layer)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.leader.act_on(self._layer[0], x, y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.leader.write_into(self._layer[0], weight), bias

    def saved(self) -> dict[str, Tensor]:
        """The same rows again, under this layer's name, as peft writes them; inside LoRA they are written once."""
        return {} if self.leader.prefix else self.leader.saved()
