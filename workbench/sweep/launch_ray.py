"""Workers that Ray places."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from workbench.errors import WorkbenchError

from .launch_worker import POLL_SECONDS, STOP_SECONDS, run

RETRIES = 10  # of a worker that died
OBJECT_STORE = 100 * 2**20  # bytes, about the least that Ray takes: workers share nothing by Ray


class Ray:
    """One task a worker. Where each runs, and that it runs again elsewhere when its node is lost, is Ray's business.

    Args:
        folder: each worker writes a log there, on its node.
        resources: options of the task, such as `num_gpus`. `num_cpus` is also how many processes a worker has that
            gets no GPU.

    Raises:
        WorkbenchError: Ray takes no such options.
    """

    def __init__(self, folder: Path, resources: Mapping[str, Any]):
        self._folder = folder
        self._resources = {"num_cpus": 1, "max_retries": RETRIES, "retry_exceptions": True, **resources}
        self._tasks: list[Any] = []
        try:
            self._task = ray.remote(run).options(**self._resources)
        except (TypeError, ValueError) as error:
            raise WorkbenchError(f"Ray does not take the --resource options: {error}") from error

    def place(self, words: Sequence[str], environment: Mapping[str, str], count: int) -> None:
        """See `Launcher`. Without a cluster (`RAY_ADDRESS`) a Ray of one node is started on loopback."""
        alone: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
        cluster = os.environ.get("RAY_ADDRESS")
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if cluster else alone))
        except (OSError, RuntimeError, ValueError) as error:
            raise WorkbenchError(f"Ray at {cluster or '127.0.0.1'} cannot be used: {error}") from error
        if not cluster:
            self._check_here()
        gpus = self._resources.get("num_gpus")
        words = [*words, *([] if gpus else ["--workers", str(max(1, int(self._resources["num_cpus"])))])]
        self._tasks = [
            self._task.remote(words, dict(environment), self._folder / f"worker-{index}.log") for index in range(count)
        ]

    def working(self, progressed: bool) -> int:
        """See `Launcher`."""
        if not self._tasks:
            return 0
        ended, self._tasks = ray.wait(self._tasks, num_returns=len(self._tasks), timeout=POLL_SECONDS / 10)
        for task in ended:
            try:
                mistake = ray.get(task)
            except ray.exceptions.RayError as error:
                raise WorkbenchError(f"Ray gave a worker up: {str(error).strip().splitlines()[-1]}") from error
            if mistake:
                raise WorkbenchError(mistake)
        return len(self._tasks)

    def stop(self) -> None:
        """See `Launcher`."""
        for task in self._tasks:
            ray.cancel(task)
        if self._tasks:
            ray.wait(self._tasks, num_returns=len(self._tasks), timeout=STOP_SECONDS)
        ray.shutdown()

    def _check_here(self) -> None:
        """Refuse what this machine does not have: Ray would wait for it for ever."""
        for option, name in {"num_cpus": "CPU", "num_gpus": "GPU"}.items():
            wanted, there = self._resources.get(option) or 0, ray.cluster_resources().get(name, 0)
            if wanted > there:
                raise WorkbenchError(
                    f"--resource {option}={wanted}: this machine has {there:g}. A cluster is named by RAY_ADDRESS."
                )
