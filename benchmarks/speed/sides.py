"""Runs one side in a process of its own and watches how much memory it and its children hold."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import psutil

from .work import ROOT, Work

SAMPLE_SECONDS = 2
MIB = 2**20


def run(side: str, work: Work, one_core: bool = False, memory: bool = False) -> dict[str, Any]:
    """What a side's script writes.

    Args:
        side: "ours" or "peer".
        one_core: let the process and its children use one core only.
        memory: give also `memory`, MiB of the process tree over time, shared pages counted once. Counting them takes
            time from the processes, the more the more there are.
    """
    # the libraries choose the number of threads on both sides
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        given, result, log = (Path(folder, name) for name in ("work.json", "result.json", "log"))
        work.write(given)
        command = [sys.executable, "-m", f"speed.{side}", str(given), str(result)]
        with log.open("wb") as output, Popen(command, env=environment, stdout=output, stderr=output) as process:
            try:
                if one_core:
                    psutil.Process(process.pid).cpu_affinity([0])
                samples = watch(process) if memory else []
                process.wait()
            finally:
                process.kill()  # nothing, if it has ended
        if process.returncode:
            raise RuntimeError(f"{side} failed:\n{log.read_text()[-4000:]}")
        return json.loads(result.read_text()) | {"memory": samples}


def watch(process: Popen[bytes]) -> list[float]:
    """Wait for a process to end; MiB of its tree, taken regularly."""
    samples = []
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            samples.append(sum(resident(member) for member in (root, *root.children(recursive=True))) / MIB)
        with suppress(TimeoutExpired):
            process.wait(SAMPLE_SECONDS)
    return samples


def resident(process: psutil.Process) -> int:
    """Bytes of one process, its part of what it shares with others; 0 if it has ended."""
    try:
        memory = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return getattr(memory, "pss", memory.rss)
