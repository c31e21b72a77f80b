"""Starting a prefix as the keys and values that the base model has for real words (Li and Liang 2021,
arXiv:2101.00190, section 7.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import AdapterError, ConfigError

from .checkpoint import set_peft_model_state_dict
from .methods.prefix_tuning import PrefixTuningConfig
from .model import PeftModel


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache, in the layout of a prefix.

    Args:
        past_key_values: a cache, or keys and values of each layer, (1, heads, length, width of a head).
        num_virtual_tokens: how many of its tokens are taken.

    Returns:
        (num_virtual_tokens, layers * 2 * heads * width of a head)

    Raises:
        AdapterError: there is more than one row, layers differ in shape, or there are fewer tokens.
    """
    tensors = [tensor for keys, values, *_ in past_key_values for tensor in (keys, values)]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1 or tensors[0].shape[0] != 1:
        raise AdapterError(f"A prefix needs keys and values of one row, of one shape in all layers, not {shapes}.")
    if tensors[0].shape[2] < num_virtual_tokens:
        raise AdapterError(f"Need at least {num_virtual_tokens} cached tokens, got {tensors[0].shape[2]}.")
    return torch.cat(tensors)[:, :, :num_virtual_tokens].permute(2, 0, 1, 3).flatten(1)


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Let a prefix start as the first tokens of a cache.

    Args:
        adapter_name: a prefix tuning adapter without `prefix_projection`; default: the active one.
        past_key_values, num_virtual_tokens: as of `prompt_embeddings_from_past_key_values`; by default as many tokens
            as the prefix has.

    Returns:
        The prefix, (num_virtual_tokens, layers * 2 * heads * width of a head).

    Raises:
        ConfigError: the adapter is of another kind.
        AdapterError: the cache does not fit the prefix.
    """
    name = adapter_name or model.active_adapters[0]
    config = model.peft_config[name]
    if not isinstance(config, PrefixTuningConfig) or config.prefix_projection:
        raise ConfigError(f"Adapter {name!r} must be one of prefix tuning, without `prefix_projection`.")
    prefix = prompt_embeddings_from_past_key_values(
        past_key_values,
        num_virtual_tokens=num_virtual_tokens or config.num_virtual_tokens,  # type: ignore[arg-type]
    )
    set_peft_model_state_dict(model, {"prompt_embeddings": prefix}, name)
    return prefix


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix start as the keys and values of a text's first tokens.

    Args:
        tokenizer: the base model's.
        text: of at least as many tokens as the prefix has.
        use_chat_template: the text is a system message, if the tokenizer has a template for those.
        max_length: the text is cut after so many tokens.

    Other arguments, returns and raises as of `initialize_kv_prefix_from_past_key_values`.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": text}], return_dict=False, return_tensors="pt"
        )
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids[:, :max_length].to(model.device), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )
