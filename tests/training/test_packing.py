"""How many trials a pass has."""

from __future__ import annotations

import pytest
import torch

from workbench.training import packing
from workbench.training.packing import Packing
from workbench.training.stint import Report


def reports(size: int, seconds: float, mib: float = 10.0, steps: int = 10) -> list[Report]:
    """A pass of so many trials, each of whose steps took that long."""
    costs = {"seconds/train": steps * seconds, "process_peak_growth_mib/train": mib}
    return [Report(i, made=steps, costs=costs, shared=size) for i in range(size)]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Packing:
    monkeypatch.setattr(packing, "free_mib", lambda device: 1000.0)
    return Packing(torch.device("cpu"))


def test_one_trial_a_pass_as_long_as_nothing_is_known(found: Packing) -> None:
    assert found.size() == 1


def test_it_doubles_as_long_as_that_pays(found: Packing) -> None:
    sizes = []
    for seconds in (0.010, 0.006, 0.004, 0.0038):
        found.observe(reports(found.size(), seconds))
        sizes.append(found.size())
    assert sizes == [2, 4, 8, 4]  # eight at once gain too little over four


def test_long_steps_are_left_alone(found: Packing) -> None:
    found.observe(reports(1, packing.LONG * 1.01))
    assert found.size() == 1


def test_memory_ends_it(found: Packing) -> None:
    found.observe(reports(1, 0.01, mib=300))
    assert found.size() == 2
    found.observe(reports(2, 0.004, mib=600))
    assert found.size() == 2  # four would take 1,200 of 1,000 MiB


def test_after_memory_ran_out_passes_stay_small(found: Packing) -> None:
    found.observe(reports(1, 0.01))
    found.observe(reports(2, 0.005))
    assert found.size() == 4
    found.most = 2
    assert found.size() == 2


def test_trials_that_failed_say_nothing_of_time(found: Packing) -> None:
    (failed,) = reports(1, 0.001)
    failed.error = ValueError("no")
    found.observe([failed])
    assert found.size() == 1
