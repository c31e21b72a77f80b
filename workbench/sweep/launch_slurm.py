"""Workers that Slurm places, by submitit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import CommandFunction

from workbench.errors import WorkbenchError

from .launch import tail


class Slurm:
    """One job a worker. The variables of this process, and so the stores, are those of the jobs.

    Args:
        folder: for the jobs' scripts and logs; all nodes must see it.
        resources: parameters of the jobs, such as `slurm_partition`, `timeout_min`, `gpus_per_node`, `cpus_per_task`;
            and `cluster`: `local` or `debug` run them here. `cpus_per_task` is also how many processes a worker has.
    """

    def __init__(self, folder: Path, resources: Mapping[str, Any]):
        options = {"timeout_min": 24 * 60, "cpus_per_task": 1, **resources}
        self._cpus = options["cpus_per_task"]
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster", "slurm"))
            self._executor.update_parameters(name="workbench", **options)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise WorkbenchError(f"Slurm does not take the jobs: {error}") from error
        self._jobs: list[submitit.Job[Any]] = []

    def place(self, command: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`."""
        os.environ.update(environment)
        job = CommandFunction([*command, "--workers", str(self._cpus)], verbose=False)
        self._jobs = [self._executor.submit(job) for _ in range(count)]

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            error = job.exception()
            if error and not self._jobs:
                raise WorkbenchError(f"Slurm's last job ended: {tail(error).rpartition('error: ')[2]}")
        return len(self._jobs)

    def stop(self) -> None:
        """See `Launcher`."""
        for job in self._jobs:
            job.cancel()
