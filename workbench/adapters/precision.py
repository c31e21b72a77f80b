"""Which numbers a model's parameters are kept in while adapters train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)
KEEP_HALF = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantisers whose layers compute in the model's own dtype
PACKED = "Params4bit"  # bitsandbytes keeps codes of four bits in whatever dtype


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Make a quantised base model ready for training an adapter on it, in place: all of it is frozen, and what is not
    quantised (norms, embeddings, the head) becomes float32.

    Args:
        use_gradient_checkpointing: compute activations again in the backward pass, if the model is quantised.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: give the memory of the half-precision parameters back to the device.

    Returns:
        The same model.
    """
    quantiser = getattr(model, "quantization_method", None)
    keeps_half = quantiser in KEEP_HALF or getattr(model, "hqq_quantized", False)
    quantised = keeps_half or any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not keeps_half and parameter.dtype in HALF and type(parameter).__name__ != PACKED:
            parameter.data = parameter.data.float()
    if auto_clear_cache and not keeps_half and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):  # which gives no gradients if nothing that enters requires one
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn frozen parameters into `dtype`, float16 or bfloat16, to save memory, and those that train into float32, so
    that small updates are not rounded away."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
