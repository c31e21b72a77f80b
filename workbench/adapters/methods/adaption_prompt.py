"""Adaption prompt (LLaMA-Adapter): in the upper layers each token also attends to a few learned vectors, by as much as
a gate says that starts at zero (Zhang et al. 2023, arXiv:2303.16199, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError, MergeError, TargetError

from .. import base_ops
from ..adapter import Adapter
from ..config import PeftConfig

if TYPE_CHECKING:
    from ..matching import Site

KINDS = base_ops.DECODER_ATTENTION


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Configuration of adaption prompt, for Llama, Mistral and GPT-2.

    Args:
        target_modules: name of the attention modules; by default that of the architecture.
        adapter_len: how many vectors each layer learns.
        adapter_layers: how many layers, from the top.

    Raises:
        ConfigError: a number is not a whole one from one up.
    """

    peft_type: str | None = "ADAPTION_PROMPT"

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number from 1, not {value!r}.", name)

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is an adaption prompt: always."""
        return True

    def choose(self, sites: list[Site]) -> list[Site]:
        """Of the base model's modules, the upper ones of those that are meant.

        Raises:
            ConfigError: a number is missing.
            TargetError: there are fewer of them.
        """
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ConfigError(f"An adaption prompt needs `{name}`.", name)
        found = [site for site in sites if site.path.endswith(f".{self.target_modules}")]
        if found and len(found) < self.adapter_layers:  # type: ignore[operator]
            raise TargetError(
                f"Config specifies more adapter layers '{self.adapter_layers}' than the model has '{len(found)}'.",
                "adapter_layers",
            )
        return found[-self.adapter_layers :]  # type: ignore[operator]


class AdaptionPrompt(Adapter):
    """`adaption_prompt`: (1, adapter_len, width), the vectors; `adaption_gate`: (1,), their weight."""

    views = ("adaption_prompt", "adaption_gate")
    upcast = False
    by_row = False

    def __init__(self, attention: base_ops.Layer, config: AdaptionPromptConfig, path: str):
        super().__init__()
        length, width = config.adapter_len or 0, attention.config.hidden_size  # `choose` has refused None
        self.adaption_prompt = nn.Parameter(torch.randn(1, length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(1))
        self._attention = [attention]  # in a list, so that it is not a part of the adapter

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y, *rest = inner(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return (y + self.attend(x, kwargs.get("position_embeddings"))).to(y.dtype), *rest

    def merged_parameters(self, layer: base_ops.Layer, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        raise MergeError("An adaption prompt cannot be merged into the base weights: it is input, not weights.")

    def attend(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """g softmax(Q Kᵀ / sqrt(d)) V, with the queries of x, (rows, length, width), and keys and values of the prompt
        (eq. 6 to 9; the softmax is apart from that over the tokens, and its gate is not squashed).

        Args:
            rotation: cosines and sines, (rows, length, head width), by which the queries are turned for their places.
        """
        attention = self._attention[0]
        (q,) = project(attention, x, "q")
        k, v = (heads.to(q.dtype) for heads in project(attention, self.adaption_prompt, "kv"))
        if rotation is not None:
            cos, sin = (part.unsqueeze(1) for part in rotation)
            a, b = q.chunk(2, dim=-1)
            q = q * cos + torch.cat([-b, a], dim=-1) * sin
        groups = q.shape[1] // k.shape[1]
        k, v = (heads.repeat_interleave(groups, dim=1) for heads in (k, v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        found = (self.adaption_gate * scores) @ v
        found = found.transpose(1, 2).flatten(2)
        # as in peft, what GPT-2's layers find is not projected
        return attention.o_proj(found) if hasattr(attention, "o_proj") else found


def project(attention: base_ops.Layer, x: Tensor, which: str) -> list[Tensor]:
    """Queries, keys or values ("q", "k", "v") of `(rows, length, width)`, each `(rows, heads, length, head width)`."""
    if hasattr(attention, "c_attn"):  # all three in one layer
        every = dict(zip("qkv", attention.c_attn(x).split(attention.split_size, dim=-1), strict=True))
        parts = [every[name] for name in which]
    else:
        parts = [getattr(attention, f"{name}_proj")(x) for name in which]
    return [part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts]
