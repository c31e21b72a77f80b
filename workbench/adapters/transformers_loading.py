"""What transformers' own `model.load_adapter` asks of the adapter library."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming

from .registry import METHODS, by_peft_type


def build_peft_weight_mapping(
    weight_conversions: list[WeightConverter | WeightRenaming] | None, adapter_name: str, peft_config: Any = None
) -> list[WeightRenaming]:
    """How a file's keys become names in the model: without what a `PeftModel` puts before them, with the adapter's name
    after that of a parameter, and renamed as the base model's own are.

    Args:
        weight_conversions: those of the base model.
        peft_config: the adapter's; without it, parameters of every method are looked for.
    """
    methods = [by_peft_type(peft_config.peft_type)] if peft_config is not None else METHODS.values()
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(WeightRenaming(rf"({start}[^\.]*)", rf"\1.{adapter_name}") for start in sorted({m.prefix for m in methods})),
        *(conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)),
    ]
