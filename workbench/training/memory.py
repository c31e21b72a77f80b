"""Time and peak memory, phase by phase."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor

from workbench.errors import OutOfMemory

from .tracker import Tracker

MIB = 2**20
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SAMPLE_SECONDS = 0.01
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")  # of CUDA and MPS, of cuBLAS, of the CPU
OLDEST = [torch.zeros(1, requires_grad=True) * 1 for _ in range(2)]  # older than all that trials compute


class Meter:
    """Measures phases such as load, train and eval, which may be entered many times.

    `metrics` holds, for each phase, `seconds/<phase>` (the sum) and memory in MiB (the highest). A name says what it
    is: on CUDA `cuda_peak_allocated_mib/<phase>`, `cuda_peak_reserved_mib/<phase>` and, when the phase ends, the
    largest piece that the allocator holds, `cuda_largest_block_mib/<phase>`; on Apple's MPS
    `mps_sampled_allocated_mib/<phase>` and `mps_sampled_driver_mib/<phase>`; else `process_peak_growth_mib/<phase>`:
    how far the process's memory rose above where it stood when the phase began.

    Args:
        held: gives the tensors that are there, when a phase begins and when it ends. If given, the exact peak of these
            and of all that the phase makes is counted, `tensor_peak_mib/<phase>`; steps take a little longer then.
    """

    def __init__(self, device: torch.device, held: Callable[[], Iterable[Tensor]] | None = None):
        self.device, self.held = device, held
        self.metrics: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; phases do not nest."""
        peaks: dict[str, float] = {}
        start = time.perf_counter()
        watch = {"cuda": cuda_peak, "mps": mps_peak}.get(self.device.type, process_peak)
        tracked = nullcontext() if self.held is None else tensor_peak(self.held, peaks)
        try:
            with watch(self.device, peaks), tracked:
                yield
        finally:
            add_up(self.metrics, {f"seconds/{name}": time.perf_counter() - start})
            for key, mib in peaks.items():
                self.metrics[f"{key}/{name}"] = max(mib, self.metrics.get(f"{key}/{name}", 0.0))


@contextmanager
def tensor_peak(held: Callable[[], Iterable[Tensor]], peaks: dict[str, float]) -> Iterator[None]:
    """The bytes of all tensors, counted as they come and go."""
    with Tracker(held()) as tracker:
        try:
            yield
        finally:
            for tensor in held():  # another thread may have made some
                tracker.note(tensor)
            peaks["tensor_peak_mib"] = tracker.peak / MIB


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
        blocks = [block["size"] for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
        peaks["cuda_largest_block_mib"] = max(blocks, default=0) / MIB


@contextmanager
def mps_peak(device: torch.device, peaks: dict[str, float]) -> Iterator[None]:
    """What PyTorch's allocator holds on Apple's GPU, and what Metal gave it; it keeps no peaks, so both are sampled."""
    with (
        sampled(torch.mps.current_allocated_memory, peaks, "mps_sampled_allocated_mib"),
        sampled(torch.mps.driver_allocated_memory, peaks, "mps_sampled_driver_mib"),
    ):
        yield


@contextmanager
def process_peak(device: torch.device, peaks: dict[str, float]) -> Iterator[None]:
    """Growth of the process's resident memory: exact where Linux lets its high-water mark be reset, else sampled."""
    key, process = "process_peak_growth_mib", psutil.Process()
    if reset_high_water_mark():
        with high_water_mark(peaks, key):
            yield
        return
    start = process.memory_info().rss
    with sampled(lambda: process.memory_info().rss - start, peaks, key):
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
def high_water_mark(peaks: dict[str, float], key: str) -> Iterator[None]:
    start = status("VmRSS")
    try:
        yield
    finally:
        peaks[key] = max(0, status("VmHWM") - start) / MIB


@contextmanager
def sampled(read: Callable[[], int], peaks: dict[str, float], key: str) -> Iterator[None]:
    """The highest of some bytes that are read many times a second."""
    done, highest = threading.Event(), max(0, read())

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_SECONDS):
            highest = max(highest, read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peaks[key] = max(highest, read()) / MIB


def add_up(costs: dict[str, float], more: Mapping[str, float]) -> None:
    """Add costs to those of the same names."""
    for name, value in more.items():
        costs[name] = costs.get(name, 0.0) + value


def says_no_memory(error: BaseException) -> bool:
    """Whether memory ran out; some libraries say so in a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def out_of_memory(error: BaseException) -> OutOfMemory:
    """What to tell the user of it."""
    reason = next(iter(str(error).strip().splitlines()), "no memory left")
    return OutOfMemory(
        "The trial does not fit into memory; try micro_batch_size, gradient_checkpointing or a smaller eval_batch_size "
        f"({reason})."
    )


def release(device: torch.device) -> None:
    """Give freed memory back to the device, or on Linux to the system: trials are then measured from the same start."""
    if device.type == "cpu":
        finish_backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif LIBC is not None and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def finish_backward() -> None:
    """Let go of a backward pass on the CPU that an error has ended.

    What was left to do of it, and with it the whole graph, stays in the engine's queue, of which the newest operations
    are worked off first: a backward pass over older ones comes to its end.
    """
    torch.autograd.backward(OLDEST, retain_graph=True)
