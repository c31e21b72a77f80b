"""The base model's own weights, by the names that they had before adapters came, out of a model and into it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .checkpoint import LoadResult
from .model import PeftModel
from .tuner_layer import TunerLayer


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The base model's state dict, as it would be without adapters. Merged adapters are in the weights."""
    tensors = model.get_base_model().state_dict()
    return {key: tensors[held] for key, held in base_keys(model.get_base_model())}


def set_base_model_state_dict(model: PeftModel, state_dict: dict[str, Tensor], strict: bool = True) -> LoadResult:
    """Load a state dict of the base model, with the names that it had before adapters came.

    Raises:
        RuntimeError: as torch's `load_state_dict`: keys are missing or unexpected and `strict`, or a shape differs.
    """
    base = model.get_base_model()
    held = dict(base_keys(base))
    result = LoadResult([key for key in held if key not in state_dict], [key for key in state_dict if key not in held])
    faults = [("Missing", result.missing_keys), ("Unexpected", result.unexpected_keys)]
    if strict and any(keys for _, keys in faults):
        said = "; ".join(f"{fault} key(s) in state_dict: {', '.join(keys)}" for fault, keys in faults if keys)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(base).__name__}: {said}.")
    base.load_state_dict({held[key]: state_dict[key] for key in held if key in state_dict}, strict=False)
    return result


def base_keys(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Every key of the base model's own state dict, and the key that it has while layers are wrapped."""
    modules = model.named_modules(remove_duplicate=False)
    wrapped = [(path, module.base_name) for path, module in modules if isinstance(module, TunerLayer)]
    for held in model.state_dict():
        key = held
        for path, base in reversed(wrapped):  # what is inside comes before what is around it
            if not key.startswith(f"{path}."):
                continue
            if not key.startswith(f"{path}.{base}."):
                break  # an adapter's
            key = f"{path}.{key.removeprefix(f'{path}.{base}.')}"
        else:
            yield key, held
