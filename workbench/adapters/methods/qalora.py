"""QA-LoRA: LoRA on the means of groups of inputs, whose update is equal within a group, as the zero points of a
quantised weight are (Xu et al. 2023, arXiv:2309.14717, section 3.3)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from workbench.errors import ConfigError

from .. import base_ops
from .lora import Lora, LoraConfig


class QALora(Lora):
    """LoRA with `lora_A`: in / group size -> r, on each group's mean times the number of groups.

    peft has it for layers quantised by GPTQ alone, and never merges it; here it is for any linear layer.

    Raises:
        ConfigError: the groups do not divide the layer's inputs.
    """

    views = (*Lora.views, "qalora_group_size")

    def init_factors(self, layer: base_ops.Layer, config: LoraConfig, path: str) -> None:
        super().init_factors(layer, config, path)
        self.qalora_group_size = config.qalora_group_size
        inner, _ = base_ops.features(layer)
        self.groups, rest = divmod(inner, self.qalora_group_size)
        if rest:
            raise ConfigError(
                f"`use_qalora=True` requires `module.in_features` ({inner}) to be divisible by 'qalora_group_size' "
                f"({self.qalora_group_size}).",
                "qalora_group_size",
            )
        self.lora_A = nn.Linear(self.groups, self.r, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        up, down = super().factors()
        size = self.qalora_group_size
        return up, down.repeat_interleave(size, dim=1) * (self.groups / size)

    def update(self, x: Tensor) -> Tensor:
        return super().update(x.unflatten(-1, (self.groups, -1)).mean(-1) * self.groups)
