"""Workers that Slurm places, by submitit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import environment_variables

from workbench.errors import WorkbenchError

from .launch_worker import run


class Slurm:
    """One job a worker.

    Args:
        folder: for the jobs' scripts and logs; all nodes must see it.
        resources: parameters of the jobs, such as `slurm_partition`, `timeout_min`, `gpus_per_node`, `cpus_per_task`;
            and `cluster`: `local` runs them here. `cpus_per_task` is also how many processes a worker has that gets no
            GPU.

    Raises:
        WorkbenchError: there is no Slurm, or submitit takes no such parameters.
    """

    def __init__(self, folder: Path, resources: Mapping[str, Any]):
        self._folder = folder
        options = {"timeout_min": 24 * 60, "cpus_per_task": 1, **resources}
        gpus = any("gpu" in f"{key}={value}" for key, value in options.items())
        self._words = [] if gpus else ["--workers", str(options["cpus_per_task"])]
        cluster = options.pop("cluster", "slurm")
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise WorkbenchError("--launcher slurm: there is no sbatch here; run this on a login node of the cluster.")
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(name="workbench", **options)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise WorkbenchError(f"submitit does not take the --resource parameters: {reason}") from error
        self._jobs: list[submitit.Job[str]] = []

    def place(self, words: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`. Jobs have the variables of whoever submits them: what is pickled lies in files."""
        with environment_variables(**environment):
            for index in range(count):
                log = self._folder / f"worker-{index}.log"
                self._jobs.append(self._executor.submit(run, [*words, *self._words], {}, log))

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            error = job.exception()
            if error is None and (mistake := job.result()):
                raise WorkbenchError(mistake)
            if error and not self._jobs:
                raise WorkbenchError(f"The last job ended: {str(error).strip().splitlines()[-1]}")
        return len(self._jobs)

    def stop(self) -> None:
        """See `Launcher`."""
        for job in self._jobs:
            job.cancel(check=False)
