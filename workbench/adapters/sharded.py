"""Saving from a model whose parameters are spread over processes (FSDP, DeepSpeed)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from workbench.errors import CheckpointError, PeftWarning

# what torch puts around modules that it shards, checkpoints or compiles, under the names that state dicts leave out
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_IN_NAMES = re.compile(rf"\b({'|'.join(WRAPPERS)})\.")


@contextmanager
def values_from(state_dict: dict[str, Tensor], model: nn.Module, owners: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, the parameters and buffers that these modules of the model hold themselves are the tensors
    of a state dict of the model: whole ones, where the model has shards."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [(_IN_NAMES.sub("", name), id(tensor)) for name, tensor in tensors]
    values = {key: state_dict[name] for name, key in names if name in state_dict}
    stores: list[dict[str, Any]] = [store for owner in owners for store in (owner._parameters, owner._buffers)]
    before = [(store, leaf, tensor) for store in stores for leaf, tensor in store.items() if id(tensor) in values]
    for store, leaf, tensor in before:
        store[leaf] = nn.Parameter(values[id(tensor)], requires_grad=False)
    try:
        yield
    finally:
        for store, leaf, tensor in before:
            store[leaf] = tensor


def check_whole(tensors: dict[str, Tensor], adapter_name: str) -> None:
    """Warn of factors that are no matrices, which shards are.

    Raises:
        CheckpointError: a tensor is spread over processes or was freed.
    """
    gather = (
        "Gather the parameters first: pass `state_dict=` the model's full state dict (FSDP), or save within "
        "`deepspeed.zero.GatheredParameters` (ZeRO-3)."
    )
    for key, tensor in tensors.items():
        if hasattr(tensor, "full_tensor") or tensor.untyped_storage().nbytes() < tensor.numel():
            raise CheckpointError(f"{key} is not whole in this process. {gather}")
    factors = {k: t for k, t in tensors.items() if (".lora_A" in k or ".lora_B" in k) and not k.endswith(".bias")}
    shards = [key for key, tensor in factors.items() if tensor.dim() < 2]
    if shards:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(shards)} LoRA tensor(s) have invalid shape, such as {shards[0]}, as "
            f"DeepSpeed ZeRO-3 / FSDP shards have. {gather}",
            PeftWarning,
            stacklevel=3,
        )
