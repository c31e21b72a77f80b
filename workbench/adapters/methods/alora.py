"""aLoRA: LoRA that acts from the last occurrence of its invocation tokens on, so that the key-value cache of what
stands before is the base model's and can be shared (Greenewald et al. 2025, arXiv:2504.12397, section 3)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from workbench.errors import ConfigError, MergeError

from ..config import PeftConfig
from ..tuner_layer import BASE
from .lora import Lora

if TYPE_CHECKING:
    from ..model import PeftModel

Offsets = list[int | None]


class ALora(Lora):
    """LoRA on the last tokens of each row.

    Attributes:
        offsets: how many they are for each row of the batch; None for a row, or for all: none. They stay until the next
            call of the model, for the sake of layers that are run again in the backward pass.
        runs_due: how often the layer will still run for the call: once more, in the backward pass, where it is
            checkpointed.
    """

    by_token = False

    offsets: Offsets | None = None
    runs_due: int = 0

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """x (rows, length, in) or (rows, in), y alike."""
        self.runs_due = max(self.runs_due - 1, 0)
        rows, length = y.shape[0], y.shape[1] if y.dim() > 2 else 1
        last = torch.tensor([offset or 0 for offset in self.offsets or [0]], device=y.device)
        last = last.repeat_interleave(rows // len(last))
        invoked = (torch.arange(length, device=y.device) >= length - last[:, None]).view(y.shape[:-1])
        return y.index_put((invoked,), self.update(self.drop(x[invoked])).to(y.dtype), accumulate=True)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise MergeError("aLoRA cannot be merged: it acts on some tokens only.")


def calculate_alora_offsets(
    peft_config: dict[str, PeftConfig],
    active_adapter: str,
    input_ids: Tensor,
    adapter_names: list[str] | None = None,
) -> Offsets:
    """For each row the number of tokens from the start of the invocation's last occurrence to the end; None where it
    does not occur or the row's adapter is no aLoRA.

    Args:
        peft_config: configurations by adapter name.
        active_adapter: the adapter of all rows.
        input_ids: (rows, length).
        adapter_names: an adapter for each row instead.
    """
    names = adapter_names or [active_adapter] * len(input_ids)
    return [_offset(row, _tokens(peft_config.get(name))) for row, name in zip(input_ids, names, strict=True)]


def _tokens(config: Any) -> list[int] | None:
    return getattr(config, "alora_invocation_tokens", None)


def _offset(row: Tensor, tokens: list[int] | None) -> int | None:
    if not tokens or len(tokens) > len(row):
        return None
    found = (row.unfold(0, len(tokens), 1) == torch.tensor(tokens, device=row.device)).all(1).nonzero()
    return len(row) - int(found[-1]) if len(found) else None


def _wanted(model: PeftModel, adapter_names: list[str] | None) -> list[str]:
    """The aLoRA adapters that a call of the model uses."""
    names = dict.fromkeys(adapter_names or model.active_adapters)
    return [name for name in names if name != BASE and _tokens(model.peft_config.get(name))]


def get_alora_offsets_for_forward(
    model: PeftModel, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of a call of the model, with `alora_offsets` if an aLoRA adapter acts and they are not given.

    Without input ids they are None, with a warning if there are embeddings: then no aLoRA adapter acts.
    """
    names = kwargs.get("adapter_names")
    wanted = _wanted(model, names)
    if not wanted or kwargs.get("alora_offsets") is not None:
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
    found = None if input_ids is None else calculate_alora_offsets(model.peft_config, wanted[0], input_ids, names)
    return kwargs | {"alora_offsets": found}


def get_alora_offsets_for_generate(model: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `get_alora_offsets_for_forward`, for the arguments of `generate`, where the ids may be the first one."""
    ids = kwargs.pop("input_ids", args[0] if args else None)
    if not _wanted(model, kwargs.get("adapter_names")) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
        return kwargs | {"alora_offsets": None}
    return get_alora_offsets_for_forward(model, torch.atleast_2d(ids), **kwargs)


def invoke(
    model: PeftModel, adapter_names: list[str] | None, alora_offsets: Offsets | None, num_beams: int | None
) -> None:
    """Tell the aLoRA adapters of a call of the model on which tokens they act.

    Raises:
        ConfigError: beam search is asked for, several adapters are active that have other invocation tokens, or
            gradients of the call before are still to come that need layers to be run again.
    """
    wanted = _wanted(model, adapter_names)
    if not wanted or not model.base_model.state.enabled:
        return
    if alora_offsets is not None and (num_beams or 1) > 1:
        raise ConfigError("Beam search not yet supported for aLoRA.")
    if not adapter_names and len({tuple(_tokens(model.peft_config[name]) or ()) for name in wanted}) > 1:
        raise ConfigError(f"{wanted} are active together, but have different invocation tokens.")
    checkpointing = (
        model.training
        and torch.is_grad_enabled()
        and any(
            isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
            for module in model.modules()
        )
    )
    for _, layer in model.base_model.adapted_layers():
        for name in wanted:
            adapter = layer.named_adapters().get(name)
            if not isinstance(adapter, ALora):
                continue
            if adapter.runs_due == 1 and checkpointing:
                raise ConfigError(
                    "Multiple invocations of PEFT forward hooks before .backward() with enabled gradient "
                    "checkpointing. Disable gradient checkpointing or only call forward once per backward."
                )
            own = alora_offsets
            if adapter_names and alora_offsets is not None:
                own = [offset for offset, row in zip(alora_offsets, adapter_names, strict=True) if row == name]
            adapter.offsets, adapter.runs_due = own, 2 if checkpointing and own is not None else 0
