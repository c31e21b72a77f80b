"""Workers in other processes and on other machines: placed here, by Ray or by Slurm, and waited for.

Whoever places them decides where they run and with what; each runs `workbench worker`, the same everywhere, and finds
its trials in Optuna's storage. A worker that is lost costs time but nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
import torch
from optuna.trial import FrozenTrial

from workbench.errors import StorageError, WorkbenchError
from workbench.tracking.runs import open_tracking

from . import draw
from .budget import SECONDS
from .display import Display
from .interrupt import Interrupt
from .launch_worker import MISTAKE, POLL_SECONDS, last_words, start, stop
from .run import file_errors, only_one, stored_study
from .spec import Study
from .storage import open_storage, patiently
from .stores import Stores

Name = Literal["processes", "ray", "slurm"]

RESTARTS = 10  # of a worker, without a trial that ended between them


class Launcher(Protocol):
    """Places workers."""

    def place(self, words: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """Start workers.

        Args:
            words: arguments of `workbench worker`.
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
    with only_one(stores.home, study.name), file_errors(stores.home), Interrupt() as interrupt, ExitStack() as stack:
        open_storage(stores, study.name)  # these make their tables, once
        open_tracking(stores.tracking, stores.artifacts)
        known = stored_study(study, stores)
        trials = known.get_trials(deepcopy=False) if known else []
        if known and draw.is_over(study, trials, known.user_attrs.get(SECONDS, 0.0)):
            display.finished_before(trials)
            return trials
        number = f"{workers} worker{'s' if workers > 1 else ''}"
        display.begin(trials, [f"{number}; what they say is in {logs(stores.home, study.name)}"])
        started, told = time.monotonic(), {trial.number for trial in trials if trial.state.is_finished()}
        stack.callback(launcher.stop)
        launcher.place([str(study.path.resolve()), *words], environment(stores), workers)
        progressed = True
        while launcher.working(progressed):
            time.sleep(POLL_SECONDS)
            interrupt.check()
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
    values = {key: parsed(value) for key, value in resources.items()}
    if name == "processes":
        if values:
            raise WorkbenchError(f"--resource {next(iter(values))}: only for --launcher ray and --launcher slurm.")
        return Processes(folder)
    try:
        if name == "ray":
            from .launch_ray import Ray

            return Ray(folder, values)
        from .launch_slurm import Slurm

        return Slurm(folder, values)
    except ImportError as error:
        raise WorkbenchError(
            f"--launcher {name} needs a package: pip install 'workbench[{name}]' ({error})."
        ) from error


def parsed(value: str) -> Any:
    """A number, truth value, list or mapping, as in JSON; else the word as it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(index) for index in range(count)])[:count]


class Processes:
    """Workers on this machine, one a GPU where there are any; one that dies is replaced.

    Args:
        folder: each worker writes a log there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._workers: dict[int, subprocess.Popen[bytes]] = {}

    def place(self, words: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`."""
        self._words, self._devices = [*words, "--workers", "1"], gpus()
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), **environment}
        self._restarts = dict.fromkeys(range(count), 0)
        for index in range(count):
            self._start(index)

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        if progressed:
            self._restarts = dict.fromkeys(self._restarts, 0)
        for index, worker in list(self._workers.items()):
            code = worker.poll()
            if code == 0:
                del self._workers[index]
            elif code == MISTAKE:
                raise WorkbenchError(last_words(self._log(index)))
            elif code is not None:
                if self._restarts[index] == RESTARTS:
                    raise WorkbenchError(
                        f"Worker {index} ended {RESTARTS + 1} times (exit code {code}) while no trial did: see "
                        f"{self._log(index)}."
                    )
                self._restarts[index] += 1
                self._start(index)
        return len(self._workers)

    def stop(self) -> None:
        """See `Launcher`."""
        stop(*self._workers.values())

    def _start(self, index: int) -> None:
        device = {"CUDA_VISIBLE_DEVICES": self._devices[index % len(self._devices)]} if self._devices else {}
        self._workers[index] = start(self._words, self._environment | device, self._log(index))

    def _log(self, index: int) -> Path:
        return self._folder / f"worker-{index}.log"
