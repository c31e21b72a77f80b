"""Weights that bitsandbytes keeps in four or eight bits: read as floating-point numbers, and written again.

Nothing of bitsandbytes is imported: whoever has such a layer has loaded it.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import Tensor, nn


class Backend:
    """How the weights of some layers are quantised.

    Attributes:
        backend_name: what peft calls it.
        bits: how many each number has.
    """

    backend_name: str
    bits: int

    def read(self, layer: Any, weight: Any) -> Tensor:
        """What a weight of the layer stands for, `(out, in)`, as a copy."""
        raise NotImplementedError

    def options(self, layer: Any) -> dict[str, Any]:
        """With what the layer's weight was quantised."""
        raise NotImplementedError

    def keep(self, layer: Any) -> Any:
        """The layer's weight, for `put_back`."""
        return layer.weight

    def put_back(self, layer: Any, weight: Any) -> None:
        """Give the layer a weight of its kind."""
        layer.weight = weight

    def write(self, layer: Any, numbers: Tensor) -> None:
        """Replace the layer's weight by these numbers, `(out, in)`, quantised in the same way.

        Warns:
            UserWarning: always, as they are rounded.
        """
        warnings.warn(
            f"Merging into {self.bits}-bit weights may get different generations due to rounding errors.", stacklevel=4
        )
        old = layer.weight
        new = type(old)(numbers.detach().cpu().contiguous(), requires_grad=False, **self.options(layer))
        self.put_back(layer, new.to(old.device))  # bitsandbytes quantises what is moved to a device


class Bnb8bitBackend(Backend):
    """Integers with one scale a row (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339), `bnb.nn.Linear8bitLt`."""

    backend_name = "bnb 8bit"
    bits = 8

    def scale(self, layer: Any, weight: Any) -> Tensor:
        """The largest number of each row, `(out,)`, which the first forward moves from the weight to the layer."""
        return layer.state.SCB if weight.SCB is None else weight.SCB

    def read(self, layer: Any, weight: Any) -> Tensor:
        return weight.data * (self.scale(layer, weight) / 127)[:, None]

    def options(self, layer: Any) -> dict[str, Any]:
        return {"has_fp16_weights": layer.weight.has_fp16_weights}

    def keep(self, layer: Any) -> Any:
        weight = layer.weight
        weight.CB, weight.SCB = weight.data, self.scale(layer, weight)  # as if there had been no forward
        return weight

    def put_back(self, layer: Any, weight: Any) -> None:
        super().put_back(layer, weight)
        layer.state.reset_grads()


class Bnb4bitBackend(Backend):
    """Sixteen levels with one scale a block (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), `bnb.nn.Linear4bit`."""

    backend_name = "bnb 4bit"
    bits = 4

    def read(self, layer: Any, weight: Any) -> Tensor:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # on some CPUs the first forward packs the weight otherwise; saving undoes that
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)

    def options(self, layer: Any) -> dict[str, Any]:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        return {name: getattr(layer.weight, name) for name in names} | {"module": layer}

    def put_back(self, layer: Any, weight: Any) -> None:
        super().put_back(layer, weight)
        layer.quant_state = weight.quant_state


_BACKENDS: dict[str, Backend] = {"Params4bit": Bnb4bitBackend(), "Int8Params": Bnb8bitBackend()}


def backend(layer: nn.Module) -> Backend | None:
    """How a layer's weight is quantised, which bitsandbytes' class of the parameter says; None if it is not."""
    return _BACKENDS.get(type(getattr(layer, "weight", None)).__name__)


def size(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: two to a byte in four bits."""
    return parameter.numel() * (2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1)
