"""From a trial's settings to the configuration of its adapter."""

from __future__ import annotations

from typing import Any

from workbench.adapters import METHODS, PeftConfig
from workbench.adapters.model import HEAD_MODULES


def peft_config(method: str, task: str | None, fields: dict[str, Any], steps: int) -> PeftConfig:
    """A method's configuration for a task. A new task head trains along, also where the method itself has none.

    Args:
        steps: of training, for methods that must know.
    """
    cls = METHODS[method].config
    if cls.steps_field:
        fields = {cls.steps_field: steps, **fields}
    if "modules_to_save" in cls.extension_fields and task in HEAD_MODULES:
        fields = {"modules_to_save": list(HEAD_MODULES[task]), **fields}
    return cls(task_type=task, **fields)
