"""Adapters in a plain model, which stays what it was: no `PeftModel` is around it (`inject_adapter_in_model`)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .tuner import Tuner
from .tuner_layer import AdapterState, TunerLayer


class InjectedTuner(Tuner):
    """The tuner of a plain model, put together for one call from what the model holds: the state that its layers share
    and `model.peft_config`, which has the configurations. Configurations of adapters that no layer has any more do not
    count."""

    key_prefix: ClassVar[str] = ""

    def __init__(self, model: Any):
        nn.Module.__init__(self)
        layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
        self.model = model
        self.state = layers[0]._state if layers else AdapterState()
        there = {name for layer in layers for name in layer.adapters}
        self.peft_config = {k: v for k, v in (getattr(model, "peft_config", None) or {}).items() if k in there}


def tuner_of(model: Any) -> Tuner:
    """The tuner of a `PeftModel`, or of a plain model that adapters can be in."""
    inside = model if isinstance(model, Tuner) else getattr(model, "base_model", None)
    return inside if isinstance(inside, Tuner) else InjectedTuner(model)
