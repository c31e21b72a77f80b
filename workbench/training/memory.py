"""Time and peak memory, phase by phase."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from workbench.errors import OutOfMemory

MIB = 2**20
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SAMPLE_SECONDS = 0.01
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures phases such as load, train and eval, which may be entered many times.

    `metrics` holds, for each phase, `seconds/<phase>` (the sum) and peaks in MiB (the highest): on CUDA
    `cuda_peak_allocated_mib/<phase>` and `cuda_peak_reserved_mib/<phase>`, else `process_peak_growth_mib/<phase>`: how
    far the process's memory rose above where it stood when the phase began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.metrics: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; phases do not nest."""
        peaks: dict[str, float] = {}
        start = time.perf_counter()
        try:
            with cuda_peak(self.device, peaks) if self.device.type == "cuda" else process_peak(peaks):
                yield
        finally:
            add_up(self.metrics, {f"seconds/{name}": time.perf_counter() - start})
            for key, mib in peaks.items():
                self.metrics[f"{key}/{name}"] = max(mib, self.metrics.get(f"{key}/{name}", 0.0))


@contextmanager
def cuda_peak(device: torch.device, peaks: dict[str, float]) -> Iterator[None]:
    """Peaks of PyTorch's allocator on a CUDA device."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        peaks["cuda_peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / MIB
        peaks["cuda_peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / MIB


@contextmanager
def process_peak(peaks: dict[str, float]) -> Iterator[None]:
    """Growth of the process's resident memory: exact where Linux lets its high-water mark be reset, else sampled."""
    with high_water_mark(peaks) if reset_high_water_mark() else sampled(peaks):
        yield


def reset_high_water_mark() -> bool:
    """Let the kernel's peak of resident memory start again from now; false where that is not possible."""
    try:
        CLEAR.write_text("5")
        return status("VmHWM") - status("VmRSS") < MIB  # some kernels take the command and do nothing
    except (OSError, KeyError):
        return False


def status(field: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024


@contextmanager
def high_water_mark(peaks: dict[str, float]) -> Iterator[None]:
    start = status("VmRSS")
    try:
        yield
    finally:
        peaks["process_peak_growth_mib"] = max(0, status("VmHWM") - start) / MIB


@contextmanager
def sampled(peaks: dict[str, float]) -> Iterator[None]:
    process, done = psutil.Process(), threading.Event()
    start = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_SECONDS):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peaks["process_peak_growth_mib"] = max(0, highest - start, process.memory_info().rss - start) / MIB


def add_up(costs: dict[str, float], more: Mapping[str, float]) -> None:
    """Add costs to those of the same names."""
    for name, value in more.items():
        costs[name] = costs.get(name, 0.0) + value


def says_no_memory(error: BaseException) -> bool:
    """Whether memory ran out; the CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def out_of_memory(error: BaseException) -> OutOfMemory:
    """What to tell the user of it."""
    reason = next(iter(str(error).strip().splitlines()), "no memory left")
    return OutOfMemory(
        "The trial does not fit into memory; try micro_batch_size, gradient_checkpointing or a smaller eval_batch_size "
        f"({reason})."
    )


def release(device: torch.device) -> None:
    """Give freed memory back to the device, or on Linux to the system: trials are then measured from the same start."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
