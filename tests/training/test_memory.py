"""Phases: peaks that were freed again are seen, and the highest of several entries stays."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from workbench.training import memory
from workbench.training.memory import Meter

CPU = torch.device("cpu")


def use(mib: int) -> None:
    """Take memory from the system (the allocator might hand out some that it kept), touch it, hold it, give it back."""
    with mmap.mmap(-1, mib * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        time.sleep(5 * memory.SAMPLE_SECONDS)


@pytest.mark.parametrize("resettable", [True, False], ids=["kernel", "sampled"])
def test_peak_of_a_phase(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr(memory, "reset_high_water_mark", lambda: False)
    elif not memory.reset_high_water_mark():
        pytest.skip("this system does not reset its high-water mark")
    meter = Meter(CPU)
    with meter.phase("large"):
        use(96)
    with meter.phase("small"):
        use(16)
    assert 80 < meter.metrics["process_peak_growth_mib/large"] < 130
    assert 8 < meter.metrics["process_peak_growth_mib/small"] < 50


def test_phases_entered_again_add_time_and_keep_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    growth = iter([6.0, 7.0, 5.0])

    @memory.contextmanager
    def fake(device, peaks):  # type: ignore[no-untyped-def]
        yield
        peaks["process_peak_growth_mib"] = next(growth)

    monkeypatch.setattr(memory, "process_peak", fake)
    meter = Meter(CPU)
    for name in ("train", "eval", "train"):
        with meter.phase(name):
            pass
    assert meter.metrics == {
        "seconds/train": 7.0,
        "process_peak_growth_mib/train": 6.0,
        "seconds/eval": 3.0,
        "process_peak_growth_mib/eval": 7.0,
    }


@pytest.mark.parametrize("resettable", [True, False], ids=["kernel", "sampled"])
def test_a_phase_that_fails_is_measured_too(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resettable:
        monkeypatch.setattr(memory, "reset_high_water_mark", lambda: False)
    meter = Meter(CPU)
    with pytest.raises(KeyError), meter.phase("train"):
        raise KeyError
    assert set(meter.metrics) == {"seconds/train", "process_peak_growth_mib/train"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_reset_between_phases() -> None:
    device = torch.device("cuda")
    meter = Meter(device)
    for name, mib in (("large", 64), ("small", 8)):
        with meter.phase(name):
            torch.zeros(mib * 2**20, dtype=torch.uint8, device=device)
    growth = meter.metrics["cuda_peak_allocated_mib/large"] - meter.metrics["cuda_peak_allocated_mib/small"]
    assert growth == pytest.approx(56, abs=1)
    assert meter.metrics["cuda_peak_reserved_mib/large"] >= meter.metrics["cuda_peak_allocated_mib/large"]
