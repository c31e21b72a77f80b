"""`PeftMixedModel`: adapters of different methods on one base model, several of them active at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from workbench.errors import ConfigError

from .config import PeftConfig
from .model import PeftModel
from .registry import METHODS, by_peft_type


class PeftMixedModel(PeftModel):
    """A `PeftModel` whose adapters need not be of one method. `get_peft_model(..., mixed=True)` makes one.

    The active adapters fold in the order of `set_adapter`, as on any layer. All methods that adapt layers mix (in peft
    LoRA, AdaLoRA, LoHa and LoKr of those here). Task heads train only where `modules_to_save` names them, since no two
    adapters that are active together may have the same module.
    """

    def admit(self, config: PeftConfig, others: Iterable[PeftConfig] = ()) -> PeftConfig:
        """Take a configuration of any method that adapts layers.

        Raises:
            ConfigError: a prompt method.
        """
        if not by_peft_type(config.peft_type).kinds:
            compatible = ", ".join(str(method.config.peft_type) for method in METHODS.values() if method.kinds)
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type}' is not compatible with the `PeftMixedModel`. "
                f"Compatible types are: {compatible}.",
                "peft_type",
            )
        return config

    @classmethod
    def for_task(cls, task_type: str | None) -> type[PeftModel]:
        return cls

    def get_layer_status(self) -> NoReturn:
        """A status names one method.

        Raises:
            TypeError: always.
        """
        raise TypeError("get_layer_status is not supported for PeftMixedModel, whose layers hold several methods.")

    def get_model_status(self) -> NoReturn:
        """As `get_layer_status`."""
        raise TypeError("get_model_status is not supported for PeftMixedModel, whose layers hold several methods.")
