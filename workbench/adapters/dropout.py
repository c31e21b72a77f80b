"""Dropout with masks from a source of one adapter's own, so that adapters that train together draw what each would draw
alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .model import PeftModel

Source = Callable[[Tensor, float], Tensor]  # an input and p -> its mask, whose ones are 1 / (1 - p)


class Dropout(nn.Dropout):
    """As torch's, with masks of a source."""

    def __init__(self, p: float, source: Source):
        super().__init__(p)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return x * self.source(x, self.p) if self.training else x


def seed_dropout(model: PeftModel, make: Callable[[int], Source]) -> None:
    """Give every dropout of the model's active adapters a source, made from its number, counted from 0."""
    number = 0
    for name in model.active_adapters:
        for _, part in model.base_model.parts(name):
            for parent in list(part.modules()):
                for attribute, child in list(parent.named_children()):
                    if isinstance(child, nn.Dropout):
                        setattr(parent, attribute, Dropout(child.p, make(number)).train(child.training))
                        number += 1
