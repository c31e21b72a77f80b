"""A disk that is full while a checkpoint is written: a small one of its own, where root may mount one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from safetensors.torch import load_file

from .place import ROOT, write_study
from .torment import Place, inspect, reproduced

STEPS, TRIALS = 100, 3


def full_disk(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fill the disk of the checkpoints while a study runs, again and again; each time make room and go on.

    Returns:
        counts: how often it was full, what the checkpoints were worth then, and the finished trials.
    """
    file, home = write_study(folder, "chaos", TRIALS, STEPS), folder / "home"
    place = Place(home, f"sqlite:///{home}/optuna.db", f"sqlite:///{home}/mlflow.db", ["--home", str(home)])
    full = loaded = 0
    with small_disk(home / "checkpoints") as disk:
        for room in (30, 70, 90, 100, 110, 120, 130):  # KiB
            fill(disk, room)
            done = sweep(file, place)
            message = done.stderr.strip().splitlines()[-1] if done.stderr else ""
            say(f"{room} KiB left: exit code {done.returncode} {message}")
            if done.returncode == 0:
                break
            assert done.returncode == 2, done
            assert "The disk is full" in message, message
            assert "Traceback" not in done.stderr, done.stderr
            full += 1
            loaded += recorded_checkpoints(place, disk)
        (disk / "ballast").unlink()
        last = sweep(file, place)
        assert last.returncode == 0, last.stderr
        found = inspect(file, place, "chaos", TRIALS, STEPS)
        off = reproduced(place, "chaos", range(TRIALS))
    assert full, "the disk was never full"
    assert off < 1e-4, off
    return {
        "times that the disk was full": full,
        "old checkpoints that loaded then": loaded,
        **found,
        f"loss of {TRIALS} trials trained again undisturbed is off by, at most": off,
    }


def sweep(file: Path, place: Place) -> subprocess.CompletedProcess[str]:
    """Run the study, or go on with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "workbench", "sweep", str(file), "--workers", "1", *place.options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def recorded_checkpoints(place: Place, disk: Path) -> int:
    """How many live trials there are beyond their first evaluation; the checkpoint of each must load."""
    trials = optuna.load_study(study_name="chaos", storage=place.optuna).trials
    live = [trial for trial in trials if trial.state == TrialState.RUNNING and "progress" in trial.user_attrs]
    for trial in live:
        (file,) = disk.glob(f"*/{trial.number}-{trial.user_attrs['progress']['step']}.safetensors")
        assert load_file(file), file
    return len(live)


def fill(disk: Path, room: int) -> None:
    """Leave so many KiB."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room * 1024)))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 4 MiB.

    Raises:
        RuntimeError: it cannot be mounted here.
    """
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a full disk takes one to mount, as root: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
