"""Workers that Ray places."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from workbench.errors import WorkbenchError

from .launch import MISTAKE, POLL_SECONDS, RESTARTS, tail


class Ray:
    """One task a worker. Where each runs, and that it runs again elsewhere when its node is lost, is Ray's business.

    Args:
        resources: options of the task, such as `num_gpus`. `num_cpus` is also how many processes the worker has.
    """

    def __init__(self, resources: Mapping[str, Any]):
        self._resources = {"num_cpus": 1, "max_retries": RESTARTS, "retry_exceptions": True, **resources}
        self._tasks: list[Any] = []

    def place(self, command: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`. Without a cluster (`RAY_ADDRESS`) a Ray of one node is started on loopback."""
        if not ray.is_initialized():
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address=None if os.environ.get("RAY_ADDRESS") else "127.0.0.1",
            )
        words = [*command, "--workers", str(max(1, int(self._resources["num_cpus"])))]
        task = ray.remote(run).options(**self._resources)
        self._tasks = [task.remote(words, dict(environment)) for _ in range(count)]

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        if not self._tasks:
            return 0
        ended, self._tasks = ray.wait(self._tasks, num_returns=len(self._tasks), timeout=POLL_SECONDS / 10)
        for task in ended:
            try:
                code, said = ray.get(task)
            except ray.exceptions.RayError as error:
                raise WorkbenchError(f"Ray gave a worker up: {tail(error)}") from error
            if code == MISTAKE:
                raise WorkbenchError(said.rpartition("error: ")[2])
        return len(self._tasks)

    def stop(self) -> None:
        """See `Launcher`."""
        for task in self._tasks:
            ray.cancel(task)
        ray.shutdown()


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """What Ray runs: one worker. Its exit code, and the last that it said.

    Raises:
        RuntimeError: it died, so that Ray tries again.
    """
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode not in (0, MISTAKE):
        raise RuntimeError(f"the worker ended with exit code {done.returncode}: {tail(done.stdout)}")
    return done.returncode, tail(done.stdout)
