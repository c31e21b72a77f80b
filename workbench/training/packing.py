"""How many trials to train in one pass, by what passes took."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from .memory import MIB
from .stint import Report, Stint

LONG = 0.05  # seconds of a step from which on beginning its operations is a small part of it
PAYS = 0.9  # a larger pass is worth it if a trial's step takes at most this share of the time
MOST = 64  # trials in one pass
ROOM = 0.8  # share of the free memory that a pass may take


class Packing:
    """Finds the number of trials a pass by doubling it as long as that pays and memory lasts.

    On a GPU a small model waits for its kernels to be launched, and K trials take hardly longer than one. On a CPU
    this is so only where a step has few tokens; long steps are left as they are.

    Attributes:
        took: seconds, and steps of single trials in them, by the number of trials in the pass.
        peak: MiB that passes took, the most so far, likewise.
        most: trials that a pass may have; fewer once memory has run out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.took: dict[int, tuple[float, int]] = {}
        self.peak: dict[int, float] = {}
        self.most = MOST

    def observe(self, reports: Sequence[Report]) -> None:
        """Learn from the reports of one pass."""
        whole = [report for report in reports if report.error is None and report.made]
        if not whole:
            return
        size = whole[0].shared
        seconds, steps = self.took.get(size, (0.0, 0))
        seconds += sum(report.costs.get("seconds/train", 0.0) for report in whole)
        self.took[size] = seconds, steps + sum(report.made for report in whole)
        peaks = [
            v for report in whole for name, v in report.costs.items() if "peak" in name and name.endswith("/train")
        ]
        self.peak[size] = max([*peaks, self.peak.get(size, 0.0)])

    def size(self) -> int:
        """How many trials the next pass should have."""
        size = 1
        while self._pace(size) < LONG and 2 * size <= self.most and self._fits(size, 2 * size):
            if 2 * size in self.took and self._pace(2 * size) > PAYS * self._pace(size):
                break
            size *= 2
        return size

    def _pace(self, size: int) -> float:
        """Seconds of a step of one trial; as long as nothing is known, no reason to try more."""
        seconds, steps = self.took.get(size, (LONG, 1))
        return seconds / steps

    def _fits(self, known: int, wanted: int) -> bool:
        return self.peak[known] * wanted / known <= ROOM * free_mib(self.device)

    def passes(self, stints: Sequence[Stint]) -> list[list[Stint]]:
        """Stints in passes: like methods side by side, those with as many steps to go together."""
        size = self.size()
        alike = sorted(stints, key=lambda stint: (-stint.until, str(stint.config.peft_type)))
        return [alike[i : i + size] for i in range(0, len(alike), size)]


def free_mib(device: torch.device) -> float:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
    return psutil.virtual_memory().available / MIB
