"""Modules to save: a copy of a whole module trains in the original's place, e.g. a new task head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from workbench.errors import LayerKindError

from ..adapter import Adapter, Slot
from ..groups import Groups


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
        self.by_token = not any(hasattr(part, "config") for part in module.modules())  # as attention and layers have

    def kind(self, layer: nn.Module) -> str:
        return "ModulesToSaveWrapper"

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.replace(*args, **kwargs)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        return self.modules_to_save(*args, **kwargs)

    @classmethod
    def replace_each(cls, adapters: Sequence[Self], groups: Groups, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Of small linear layers at once, such as heads; copying large ones would take longer, and memory."""
        copies: list[Any] = [adapter.modules_to_save for adapter in adapters]
        plain = all(type(copy) is nn.Linear and copy.bias is not None for copy in copies)
        small = plain and sum(copy.weight.numel() for copy in copies) <= x.numel()
        if not small or len(copies) == 1 or not groups.worth_stacking(x):
            return super().replace_each(adapters, groups, x, *rest, **kwargs)
        weight, bias = (torch.stack([getattr(copy, name) for copy in copies]) for name in ("weight", "bias"))
        return groups.unstack(torch.baddbmm(bias[:, None], groups.stack(x), weight.mT), x)

    def slots(self) -> dict[str, Slot]:
        return {name.removeprefix("modules_to_save."): slot for name, slot in super().slots().items()}
