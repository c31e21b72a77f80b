"""What a layer's adapters are, as types for `isinstance`. There is one wrapper for all methods, and a layer can hold
adapters of several, so these types are questions about what it holds; none of them is ever made."""

from __future__ import annotations

from typing import Any

from . import base_ops
from .adapter import Adapter
from .methods.adalora import AdaLora
from .methods.ia3 import IA3
from .methods.loha import LoHa
from .methods.lokr import LoKr
from .methods.lora import Lora, TiedLora
from .methods.lora_parameters import LoraParameters
from .methods.modules_to_save import ModulesToSave
from .methods.trainable_tokens import TiedTokens, TrainableTokens
from .tuner_layer import TunerLayer


class LayerType(type):
    """A type whose instances are the adapted layers that hold an adapter of one of the classes in `adapters`; with
    `auxiliary` only adapters that go along with those of other layers, or without it only others."""

    adapters: tuple[type[Adapter], ...]
    auxiliary: bool
    kinds: tuple[str, ...] = ()  # of the base layer; none for any

    def __instancecheck__(cls, layer: Any) -> bool:
        return (
            isinstance(layer, TunerLayer)
            and layer.auxiliary == cls.auxiliary
            and (not cls.kinds or base_ops.kind_of(layer.base_layer) in cls.kinds)
            and (any(isinstance(adapter, cls.adapters) for adapter in layer.adapters.values()))
        )


class BaseTunerLayer(metaclass=LayerType):
    """A layer that a method adapts."""

    adapters, auxiliary = (Adapter,), False


class LoraLayer(metaclass=LayerType):
    """A layer with a LoRA adapter."""

    adapters, auxiliary = (Lora, TiedLora, LoraParameters), False


class LoraLinear(metaclass=LayerType):
    """A linear layer, or `Conv1D` of transformers, with a LoRA adapter."""

    adapters, auxiliary, kinds = (Lora, TiedLora), False, (base_ops.LINEAR, base_ops.CONV1D)


class ParamWrapper(metaclass=LayerType):
    """A module with a LoRA adapter on parameters of its own (`target_parameters`)."""

    adapters, auxiliary = (LoraParameters,), False
    update_layer = TunerLayer.add  # peft's name for it, which versions of transformers have patched


class AdaLoraLayer(metaclass=LayerType):
    """A layer with an AdaLoRA adapter."""

    adapters, auxiliary = (AdaLora,), False


class IA3Layer(metaclass=LayerType):
    """A layer with an (IA)3 adapter."""

    adapters, auxiliary = (IA3,), False


class LoHaLayer(metaclass=LayerType):
    """A layer with a LoHa adapter."""

    adapters, auxiliary = (LoHa,), False


class LoKrLayer(metaclass=LayerType):
    """A layer with a LoKr adapter."""

    adapters, auxiliary = (LoKr,), False


class TrainableTokensLayer(metaclass=LayerType):
    """A layer with trainable tokens, as a method of its own."""

    adapters, auxiliary = (TrainableTokens, TiedTokens), False


class AuxiliaryTrainingWrapper(metaclass=LayerType):
    """A layer that trains along with adapters elsewhere."""

    adapters, auxiliary = (Adapter,), True


class ModulesToSaveWrapper(metaclass=LayerType):
    """A module of `modules_to_save`."""

    adapters, auxiliary = (ModulesToSave,), True


class TrainableTokensWrapper(metaclass=LayerType):
    """A layer with trainable tokens beside another method (`trainable_token_indices`)."""

    adapters, auxiliary = (TrainableTokens, TiedTokens), True
