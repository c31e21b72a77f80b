"""Workers in other processes and on other machines: placed here, by Ray or by Slurm, and waited for.

Whoever places them decides where they run and with what; each runs `workbench worker`, the same everywhere, and finds
its trials in Optuna's storage. A worker that is lost costs time but nothing else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
import torch
from optuna.trial import FrozenTrial

from workbench.errors import StorageError, WorkbenchError

from . import draw
from .budget import SECONDS
from .display import Display
from .pool import PR_SET_PDEATHSIG
from .run import file_errors, only_one, stored_study
from .spec import Study
from .storage import open_storage, patiently
from .stores import Stores

Name = Literal["processes", "ray", "slurm"]

POLL_SECONDS = 1.0
STOP_SECONDS = 60.0  # how long a worker that was asked to stop may take to give its trials back
RESTARTS = 10  # of a worker, without a trial that ended between them
MISTAKE = 2  # exit code of a worker that cannot work here: what it says is for the user


class Launcher(Protocol):
    """Places workers."""

    def place(self, command: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """Start workers.

        Args:
            environment: variables beside those of this process. It holds the stores' URLs, perhaps with passwords.
        """
        ...

    def working(self, progressed: bool) -> int:
        """How many are there; lost ones are replaced, where that is the launcher's to do.

        Args:
            progressed: whether a trial has ended since the last call.

        Raises:
            WorkbenchError: they cannot work, and why.
        """
        ...

    def stop(self) -> None:
        """End them all. They give their trials back."""
        ...


def launched(
    study: Study, stores: Stores, display: Display, launcher: Launcher, workers: int, words: Sequence[str] = ()
) -> list[FrozenTrial]:
    """Run a study by workers that are placed elsewhere, until its budget is spent.

    Args:
        words: further options of `workbench worker`.

    Returns:
        The study's trials, all of them finished.

    Raises:
        StorageError: the stores cannot be used, or another sweep of the study is running.
        WorkbenchError: the workers cannot work, and why.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with only_one(stores.home, study.name), file_errors(stores.home), ExitStack() as stack:
        open_storage(stores, study.name)  # makes its tables, once
        known = stored_study(study, stores)
        trials = known.get_trials(deepcopy=False) if known else []
        if known and draw.is_over(study, trials, known.user_attrs.get(SECONDS, 0.0)):
            display.finished_before(trials)
            return trials
        display.begin(trials, [f"{workers} workers; what they say is in {logs(stores.home, study.name)}"])
        started, told = time.monotonic(), {trial.number for trial in trials if trial.state.is_finished()}
        command = [sys.executable, "-m", "workbench", "worker", str(study.path.resolve()), *words]
        stack.callback(launcher.stop)
        launcher.place(command, environment(stores), workers)
        progressed = True
        while launcher.working(progressed):
            time.sleep(POLL_SECONDS)
            known = known or patiently(lambda: stored_study(study, stores))
            ended = [t for t in (known.get_trials(deepcopy=False) if known else []) if t.state.is_finished()]
            for trial in (new := [trial for trial in ended if trial.number not in told]):
                display.elsewhere(trial)
                told.add(trial.number)
            progressed = bool(new)
        trials = known.get_trials(deepcopy=False) if known else []
        if not known or not draw.is_over(study, trials, known.user_attrs.get(SECONDS, 0.0)):
            raise StorageError(
                f"All workers have left, though {study.name} is not over: see {logs(stores.home, study.name)}. The "
                f"same command goes on with it."
            )
        for trial in (trial for trial in trials if trial.number not in told):
            display.elsewhere(trial)
        display.ended(time.monotonic() - started)
        return trials


def environment(stores: Stores) -> dict[str, str]:
    """The stores for a worker. Not as options: everybody on a machine can read the command lines of all processes."""
    found = {
        "WORKBENCH_HOME": str(stores.home),
        "WORKBENCH_STORAGE": stores.optuna,
        "WORKBENCH_HEARTBEAT": str(stores.heartbeat),
        "WORKBENCH_COMMAND": "workbench",
    }
    return found if stores.artifacts else found | {"MLFLOW_TRACKING_URI": stores.tracking}


def logs(home: Path, name: str) -> Path:
    """The folder of what the workers of a study say."""
    return home / "logs" / name


def launcher(name: Name, folder: Path, resources: Mapping[str, str]) -> Launcher:
    """The launcher of that name.

    Args:
        folder: for what the workers say.
        resources: what each worker gets, in the words of Ray's `options` or submitit's `update_parameters`.

    Raises:
        WorkbenchError: its package is not installed, or it takes no such resources.
    """
    values = {key: int(value) if value.isdecimal() else value for key, value in resources.items()}
    if name == "processes":
        if values:
            raise WorkbenchError(f"--resource {next(iter(values))}: only for --launcher ray and --launcher slurm.")
        return Processes(folder)
    try:
        if name == "ray":
            from .launch_ray import Ray

            return Ray(values)
        from .launch_slurm import Slurm

        return Slurm(folder, values)
    except ImportError as error:
        raise WorkbenchError(
            f"--launcher {name} needs a package: pip install 'workbench[{name}]' ({error})."
        ) from error


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


class Processes:
    """Workers on this machine, one a GPU where there are any; one that dies is replaced.

    Args:
        folder: each worker writes a log there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._workers: list[subprocess.Popen[bytes] | None] = []
        self._restarts: list[int] = []

    def place(self, command: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._command, self._devices = [*command, "--workers", "1"], gpus()
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **environment}
        self._restarts = [0] * count
        self._workers = [self._start(index) for index in range(count)]

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        for index, worker in enumerate(self._workers):
            if progressed:
                self._restarts[index] = 0
            code = worker.poll() if worker else 0
            if code == 0:
                self._workers[index] = None
            elif code == MISTAKE:
                raise WorkbenchError(self._last_words(index))
            elif code is not None:
                self._restarts[index] += 1
                if self._restarts[index] > RESTARTS:
                    raise WorkbenchError(
                        f"Worker {index} ended {self._restarts[index]} times (exit code {code}) while no trial did: "
                        f"see {self._log(index)}."
                    )
                self._workers[index] = self._start(index)
        return sum(worker is not None for worker in self._workers)

    def stop(self) -> None:
        """See `Launcher`."""
        running = [worker for worker in self._workers if worker and worker.poll() is None]
        for worker in running:
            worker.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        for worker in running:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        device = {"CUDA_VISIBLE_DEVICES": self._devices[index % len(self._devices)]} if self._devices else {}
        with self._log(index).open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=self._environment | device,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which then stops its workers
                preexec_fn=stop_with_parent,
            )

    def _log(self, index: int) -> Path:
        return self._folder / f"worker-{index}.log"

    def _last_words(self, index: int) -> str:
        return "\n".join(self._log(index).read_text(errors="replace").splitlines()[-20:]).rpartition("error: ")[2]


def stop_with_parent() -> None:
    """Let this process be interrupted when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def tail(output: Any) -> str:
    """The last lines of what a worker said."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else str(output)
    return "\n".join(text.splitlines()[-20:])
