"""Modules to save: a copy of a whole module trains in the original's place, e.g. a new task head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from workbench.errors import LayerKindError

from ..adapter import Adapter, Slot


class ModulesToSave(Adapter):
    """A trainable copy of the module; checkpoint keys are those of the module itself.

    Raises:
        LayerKindError: the module is a container, which nothing is called on.
    """

    views = ("modules_to_save",)
    replaces = True
    exclusive = True
    mergeable = False
    upcast = False

    def __init__(self, module: nn.Module):
        super().__init__()
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise LayerKindError(
                f"modules_to_save cannot be applied to modules of type {type(module)}, which have no forward of their "
                "own; name what is in it.",
                "modules_to_save",
            )
        self.modules_to_save = copy.deepcopy(module)

    def kind(self, layer: nn.Module) -> str:
        return "ModulesToSaveWrapper"

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.replace(*args, **kwargs)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        return self.modules_to_save(*args, **kwargs)

    def slots(self) -> dict[str, Slot]:
        return {name.removeprefix("modules_to_save."): slot for name, slot in super().slots().items()}
