"""Phases: peaks that were freed again are seen, and the highest of several entries stays."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from workbench.training import memory
from workbench.training.memory import Meter
from workbench.training.tracker import Tracker

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


def test_tensors_are_counted_exactly() -> None:
    """Storages, as they come and go; a view is no second one, and what was there before counts where it is said to."""
    held = torch.zeros(1000)
    meter = Meter(CPU, lambda: [held, held[:10]])
    with meter.phase("train"):
        large = torch.ones(5000)
        total = float((large.view(50, 100) * 2).sum())  # a second one like it, for a moment
        del large
        _ = torch.ones(6000)
    with meter.phase("eval"):
        torch.ones(2000)
    assert total == 10_000
    assert meter.metrics["tensor_peak_mib/train"] * memory.MIB == pytest.approx(4 * (1000 + 5000 + 5000), abs=16)
    assert meter.metrics["tensor_peak_mib/eval"] * memory.MIB == 4 * (1000 + 2000)
    assert "tensor_peak_mib/eval" not in Meter(CPU).metrics


def test_tensors_that_grow_in_place_and_such_as_outlive_the_phase() -> None:
    with Tracker() as tracker:
        kept = torch.zeros(10)
        kept.resize_(100)
        assert tracker.now == 400
        several = [*torch.ones(60).split(20), torch.zeros(5)]
        assert tracker.now == tracker.peak == 400 + 240 + 20
        del several
        assert (tracker.now, tracker.peak) == (400, 660)
        tracker.reset()
        assert tracker.peak == 400
    torch.zeros(1000)
    assert tracker.peak == 400


def test_what_mps_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps no peaks, so it is asked again and again."""
    seen = iter([1, 9, 4])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(seen, 2) * memory.MIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 20 * memory.MIB)
    meter = Meter(torch.device("mps"))
    with meter.phase("train"):
        time.sleep(20 * memory.SAMPLE_SECONDS)
    del meter.metrics["seconds/train"]
    assert meter.metrics == {"mps_sampled_allocated_mib/train": 9.0, "mps_sampled_driver_mib/train": 20.0}


def test_what_cuda_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be told without one: peaks start anew, and the largest block of all segments is named."""
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * memory.MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * memory.MIB)
    blocks = [{"blocks": [{"size": memory.MIB}]}, {"blocks": [{"size": 2 * memory.MIB}, {"size": 8}]}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: blocks)
    meter = Meter(torch.device("cuda"))
    with meter.phase("train"):
        assert calls == ["synchronize", "reset_peak_memory_stats"]
    del meter.metrics["seconds/train"]
    assert meter.metrics == {
        "cuda_peak_allocated_mib/train": 3.0,
        "cuda_peak_reserved_mib/train": 5.0,
        "cuda_largest_block_mib/train": 2.0,
    }
