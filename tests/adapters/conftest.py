"""Shared by the tests of the adapter core."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny matrices gain nothing from threads, and sums keep their order from run to run."""
    torch.set_num_threads(1)
