"""Which form of LoRA a configuration asks for: one class for each option and layer kind. A new form is a file of its
own, an option of `LoraConfig` and a row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from .alora import ALora
from .arrow import Arrow
from .bdlora import BdLora
from .dora import Dora, DoraEmbedding
from .kasa import Kasa
from .lora import KINDS, Lora, LoraConfig, LoraEmbedding
from .lora_parameters import LoraParameters, on_attention
from .monteclora import Monteclora
from .qalora import QALora
from .velora import Velora

if TYPE_CHECKING:
    from ..tuner import Tuner

DENSE = (base_ops.LINEAR, base_ops.CONV1D)
LAYERS = tuple(KINDS - {base_ops.ATTENTION, base_ops.EMBEDDING})

VARIANTS: dict[str | None, dict[str, type[Lora]]] = {
    None: {**dict.fromkeys(LAYERS, Lora), base_ops.EMBEDDING: LoraEmbedding},
    "use_dora": {**dict.fromkeys(LAYERS, Dora), base_ops.EMBEDDING: DoraEmbedding},
    "alora_invocation_tokens": dict.fromkeys(DENSE, ALora),
    "arrow_config": dict.fromkeys(DENSE, Arrow),
    "use_bdlora": dict.fromkeys(DENSE, BdLora),
    "use_qalora": dict.fromkeys(DENSE, QALora),
    "velora_config": dict.fromkeys(DENSE, Velora),
    "monteclora_config": dict.fromkeys(DENSE, Monteclora),
    "kasa_config": {base_ops.LINEAR: Kasa},
}


def build(layer: base_ops.Layer, config: LoraConfig, path: str) -> Lora | LoraParameters:
    """The LoRA adapter for a layer of any kind, with what the configuration asks for.

    Raises:
        ConfigError: the form of LoRA that is asked for does not exist for this kind of layer.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return on_attention(layer, config, path)
    option, kind = config.variant, base_ops.kind_of(layer) or ""
    if kind not in VARIANTS[option]:
        raise ConfigError(
            f"Invalid or unsupported variant combination: {option} does not work on {path}, a {kind}, but on "
            f"{', '.join(VARIANTS[option])}.",
            option,
        )
    return VARIANTS[option][kind](layer, config, path)


def regularisation(tuner: Tuner, name: str) -> Tensor | None:
    """What the authors of KaSA and of MonteCLoRA add to the loss: the sum, or the mean, of the layers' penalties; None
    for other adapters."""
    config: Any = tuner.peft_config[name]
    if config.variant not in ("kasa_config", "monteclora_config"):
        return None
    adapters: list[Any] = [layer.adapters[name] for _, layer in tuner.layers_of(name)]
    each = [a.penalty(getattr(config, config.variant)) for a in adapters if isinstance(a, (Kasa, Monteclora))]
    penalties = torch.stack([penalty.to(each[0].device) for penalty in each])
    return penalties.sum() if config.variant == "kasa_config" else penalties.mean()
