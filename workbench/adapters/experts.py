"""Experts that transformers 5 keeps as one parameter for all of them, where version 4 had linear layers. Targets by the
names of those layers become target parameters, as in peft, whose files name the parameters then."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from workbench.errors import ConfigError

# the parameters, and the layers that they are made of, for two ways of naming
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",), "gate.weight": ("gate",)},
    "qwen2_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), "gate.weight": ("gate",)},
}


def layers_of_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The expert layers that became parameters in this architecture, by the parameters' names; none in most."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        return {}
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    family = model_type if model_type == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return FAMILIES.get(family or "", {})


def target_stacked(config: Any, targets: Iterable[str], layers: dict[str, tuple[str, ...]]) -> None:
    """Let a LoRA configuration target parameters in place of the layers that they are made of. Where one parameter
    stands for several layers, it gets the rank and alpha of all of them together.

    Args:
        targets: names of target modules.
        layers: as `layers_of_parameters` gives them.

    Raises:
        ConfigError: some, but not all layers of one parameter are targets.
    """
    parameters, rest = set(config.target_parameters or ()), set(targets)
    for parameter, names in layers.items():
        meant = {target: name for target in rest for name in names if f".{target}".endswith(f".{name}")}
        present = set(meant.values())
        if not present:
            continue
        missing = sorted(set(names) - present)
        if missing:
            raise ConfigError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(present))} without also targeting "
                f"{', '.join(missing)} because they are fused into {parameter}.",
                "target_modules",
            )
        rest -= set(meant)
        parameters.add(parameter)
        if len(names) > 1:
            pattern = rf".*\.{re.escape(parameter)}"
            config.rank_pattern[pattern] = config.r * len(names)
            config.alpha_pattern[pattern] = config.lora_alpha * len(names)
    config.target_modules, config.target_parameters = rest, sorted(parameters) or None
