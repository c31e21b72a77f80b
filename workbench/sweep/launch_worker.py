"""One worker as a process: how launchers start it, wait for it and stop it, and how it hears of their end.

Ray and submitit import this module where the worker is to run, so it imports nothing large.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MISTAKE = 2  # exit code of a worker that cannot work here: what it says is for the user
POLL_SECONDS = 1.0
STOP_SECONDS = 60.0  # how long a worker that was asked to stop may take to give its trials back
LAUNCHER = "WORKBENCH_LAUNCHER"  # environment variable: the process that a worker must not outlive
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `workbench worker`.

    Args:
        words: its arguments.
        environment: variables beside those of this process.
        log: what it says is added to this file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "workbench", "worker", *words],
            env=os.environ | environment | {LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for the launcher, which then stops its workers
        )


def stop(*workers: subprocess.Popen[bytes]) -> None:
    """Let workers give their trials back and end; whoever takes too long is killed."""
    for worker in workers:
        worker.terminate()  # not SIGINT: it is ignored behind a shell's `&`, and blocked below Ray
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def run(words: Sequence[str], environment: Mapping[str, str], log: Path) -> str:
    """What Ray and Slurm run: one worker from its start to its end. Arguments as `start`.

    Returns:
        "", or why it cannot work here.

    Raises:
        RuntimeError: it died.
    """
    worker = start(words, environment, log)
    try:
        while worker.poll() is None:
            time.sleep(POLL_SECONDS)  # Ray's way to cancel this interrupts no system call
    finally:
        stop(worker)
    if worker.returncode not in (0, MISTAKE):
        raise RuntimeError(f"a worker ended with exit code {worker.returncode}, see {log}")
    return last_words(log) if worker.returncode == MISTAKE else ""


def last_words(log: Path) -> str:
    """Why a worker cannot work: what it said after `error:`, or after the last line on what it is doing."""
    end = "\n".join(log.read_text(errors="replace").splitlines()[-50:])
    return re.split(r"^(?:error: |.* \.\.\.\n)", end, flags=re.MULTILINE)[-1].strip()


def heed_launcher() -> None:
    """For a worker: be stopped when the launcher that started it dies."""
    if launcher := os.environ.pop(LAUNCHER, None):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):
            raise KeyboardInterrupt
