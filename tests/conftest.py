"""What holds for every test: no network, none of the user's stores, GPU tests only where there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30

# set before anything imports the libraries that read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for name in ("WORKBENCH_HOME", "WORKBENCH_STORAGE", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)
if (
    MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
):  # databases wait for a disk at each of thousands of commits
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_xdist_auto_num_workers() -> int:
    """One a core and one more, since many tests wait for servers."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # takes seconds: only for runs that could use it

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
