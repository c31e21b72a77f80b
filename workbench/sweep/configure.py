"""From a trial's settings to the configuration of its adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from workbench.adapters import METHODS, LoraConfig, PeftConfig
from workbench.adapters.inject import NO_TARGETS
from workbench.adapters.model import HEAD_MODULES

from .baselines import BASELINES


def peft_config(
    method: str, task: str | None, fields: dict[str, Any], steps: int, model: nn.Module | None = None
) -> PeftConfig:
    """A method's configuration for a task. A new task head trains along, also where the method itself has none.

    Args:
        steps: of training, for methods that must know.
        model: the base, on which it depends what a baseline trains. Without it only the fields' values are checked.
    """
    if method in BASELINES:
        return LoraConfig(target_modules=NO_TARGETS) if model is None else BASELINES[method].configure(task, model)
    cls = METHODS[method].config
    if cls.steps_field:
        fields = {cls.steps_field: steps, **fields}
    if "modules_to_save" in cls.extension_fields and task in HEAD_MODULES:
        fields = {"modules_to_save": list(HEAD_MODULES[task]), **fields}
    return cls(task_type=task, **fields)
