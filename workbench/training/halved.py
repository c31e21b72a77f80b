"""The base in half precision (`precision: bf16`): its frozen weights in bfloat16, all that trains and the task's head
in float32, attention on a CPU in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .base import CLASSIFICATION, Base
from .data import Split, collate
from .loop import to_device

ATTENTION = "workbench_float32"
HALVED = "-bf16"  # ends the fingerprint of a base in half precision
ROWS = 32  # that precision is compared on


@dataclass(frozen=True)
class Difference:
    """What half precision changes in the base's answers.

    Attributes:
        logits: the largest difference of a logit, as a share of the largest logit.
        agreement: share of the answers that stay the same.
    """

    logits: float
    agreement: float


def halve(base: Base, split: Split) -> tuple[Base, Difference]:
    """Turn the base's weights into bfloat16, in place, and say what that changes on rows of a split."""
    batch = to_device(collate(split, range(min(ROWS, len(split)))), base.device)
    before = answers(base, batch)
    halve_weights(base)
    after = answers(base, batch)
    difference = Difference(
        float((after - before).abs().max() / before.abs().max().clamp_min(1e-6)),
        float((after.argmax(-1) == before.argmax(-1)).float().mean()),
    )
    return replace(base, fingerprint=base.fingerprint + HALVED), difference


def halve_weights(base: Base) -> None:
    """Turn the base's weights into bfloat16, in place, but for a classifier's head."""
    network: Any = base.model
    heads = [network.get_submodule(name) for name in head_names(base)]
    whole = {id(module) for head in heads for module in head.modules()}
    for module in network.modules():
        if id(module) not in whole:
            for tensor in module.parameters(recurse=False):  # buffers, such as rotary frequencies, stay exact
                tensor.data = tensor.data.bfloat16()
    for head in heads:
        head.register_forward_pre_hook(to_float)
    if base.kind == "cpu":
        network.config._attn_implementation = ATTENTION


def head_names(base: Base) -> list[str]:
    """Modules of a classifier that come after the layers: the head, and a pooler before it."""
    if base.task not in CLASSIFICATION:
        return []
    network: Any = base.model
    inner = network.base_model_prefix
    names = [name for name, _ in network.named_children() if name != inner]
    pooler = getattr(getattr(network, inner), "pooler", None)
    return [f"{inner}.pooler", *names] if isinstance(pooler, nn.Module) else names


def to_float(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head's input as its weights are."""
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


@torch.no_grad()
def answers(base: Base, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the tokens, or rows, of a batch, `(n, classes)`."""
    logits = base.model(**batch).logits.float()
    if base.task == "SEQ_CLS":
        return logits
    there = batch["labels" if base.task == "SEQ_2_SEQ_LM" else "attention_mask"] > 0
    return logits[there]


def float32_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Attention in float32: the backward pass in half precision takes many times as long on a CPU."""
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.float()
    out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return out.to(query.dtype), weights


AttentionInterface.register(ATTENTION, float32_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
