"""What the benchmarks of memory share: a training step without the bench, its peak, and a page for their tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.training.tracker import Tracker

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"

Adapt = Callable[[Any], nn.Module]


def plain_step(model: nn.Module, batch: dict[str, Tensor], foreach: bool = False) -> None:
    """Forward with labels, backward, and AdamW's first step on all that requires a gradient.

    Args:
        foreach: AdamW treats all tensors at once, torch's default on a GPU; else one after the other, that on a CPU.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=foreach)
    model(**batch).loss.backward()
    optimizer.step()


def plain_peak(
    tracker: Tracker, model: nn.Module, batch: dict[str, Tensor], adapt: Adapt, foreach: bool = False
) -> int:
    """Bytes at the peak of a plain step of a model; with what `adapt` puts on it, without the batch."""
    with warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")  # of peft: tied embeddings; of fake tensors: copying a module
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.note(tensor)
        adapted = adapt(model).train()
        tracker.reset()
        plain_step(adapted, batch, foreach)
        return tracker.peak


def write_into(name: str, content: str, page: Path = PAGE) -> None:
    """Put a table into a page, between its markers `<!-- NAME -->` and `<!-- /NAME -->`, which are added if missing."""
    text = page.read_text() if page.exists() else "# Memory\n"
    place = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
    written, found = re.subn(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _: place, text, flags=re.DOTALL)
    page.write_text(written if found else f"{text}\n{place}\n")
