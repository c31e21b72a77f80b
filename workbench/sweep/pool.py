"""Who trains: worker processes, one a core, or this process by itself.

Workers are forked when base and data are loaded, so these are in memory once. Each has one thread, or more in a round
of fewer trials than workers. They train, and send steps and reports; whoever started them asks Optuna, writes the
stores and shows.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Protocol

import torch

from workbench.errors import TrialFailed, WorkbenchError
from workbench.training.bench import OnStep, Report
from workbench.training.memory import add_up

from .interrupt import Interrupt
from .workshop import Job, Workshop

SEND_SECONDS = 0.3  # how often a worker tells of its steps
WAKE_SECONDS = 0.5  # how often Ctrl-C is looked for, should Python have lost it
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

NextPass = Callable[[], list[Job]]
OnReports = Callable[[list[Report]], None]


class Crew(Protocol):
    """Trains passes of jobs."""

    def __enter__(self) -> Crew: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def work(self, trials: int, next_pass: NextPass, on_step: OnStep, on_reports: OnReports) -> None:
        """Train passes until there are none and everybody is free.

        Args:
            trials: how many trials these passes train. Where they are few each has more threads; this depends on
                nothing else, as the number of threads changes the last digits of sums.
            next_pass: the jobs to train together next, asked for whenever somebody is free; [] if there are none now.
            on_step: hears of each step, perhaps a little later.
            on_reports: hears what came of a pass.
        """
        ...


def crew(shop: Workshop, interrupt: Interrupt, workers: int | None, trials: int) -> Crew:
    """Whoever trains best here.

    Args:
        workers: how many processes; None for one a core on a CPU, and none but this one elsewhere.
        trials: more workers than trials at once would be idle.

    Raises:
        WorkbenchError: several workers were asked for where there can be only one.
    """
    possible = shop.base.device.type == "cpu" and sys.platform == "linux"
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), trials) if possible else 1
    elif workers > 1 and not possible:
        raise WorkbenchError(f"--workers {workers}: several workers need Linux, and a study on the CPU; leave it out.")
    return Pool(shop, interrupt, workers) if workers > 1 else Alone(shop)


class Alone:
    """This process, with all of torch's threads."""

    def __init__(self, shop: Workshop):
        self._shop = shop

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def work(self, trials: int, next_pass: NextPass, on_step: OnStep, on_reports: OnReports) -> None:
        """See `Crew`."""
        while jobs := next_pass():
            on_reports(self._shop.train(jobs, on_step))


class Pool:
    """Worker processes.

    A pass whose worker died is given to a new one, each trial by itself; a trial with which two workers died has
    failed.
    """

    def __init__(self, shop: Workshop, interrupt: Interrupt, size: int):
        self._shop, self._interrupt, self._size = shop, interrupt, size
        self._workers: list[Worker] = []

    def __enter__(self) -> Pool:
        _ = self._shop.bench  # made once, for all
        self._workers = [Worker(self._shop) for _ in range(self._size)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()

    def work(self, trials: int, next_pass: NextPass, on_step: OnStep, on_reports: OnReports) -> None:
        """See `Crew`."""
        again: list[list[Job]] = []  # passes whose worker died
        died: set[int] = set()  # trials with which a worker died
        while True:
            for worker in self._workers:
                if not worker.jobs and (jobs := again.pop() if again else next_pass()):
                    worker.give(jobs, max(1, self._size // trials))
            busy = {worker.connection: worker for worker in self._workers if worker.jobs}
            if not busy:
                return
            self._interrupt.check()
            for connection in wait(list(busy), WAKE_SECONDS):
                worker = busy[connection]  # type: ignore[index]
                try:
                    steps, reports, shared_costs = worker.connection.recv()
                except (EOFError, ConnectionError):
                    code = worker.stop()
                    self._workers[self._workers.index(worker)] = Worker(self._shop)
                    again += [[job] for job in worker.jobs if job.trial not in died]
                    on_reports([lost(job, code) for job in worker.jobs if job.trial in died])
                    died |= {job.trial for job in worker.jobs}
                    continue
                for step in steps:
                    on_step(*step)
                if reports is not None:
                    add_up(self._shop.shared_costs, shared_costs)
                    worker.jobs = []
                    on_reports(reports)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """As many threads as a worker has, for the same sums to the last digits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lost(job: Job, code: int | None) -> Report:
    """The report of a trial with which two workers died."""
    how = f"were killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
    hint = "perhaps the machine has too little memory: try fewer --workers or a smaller batch_size"
    return Report(job.trial, error=TrialFailed(f"Two worker processes {how} in this trial; {hint}."))


class Worker:
    """A process that trains what it is given."""

    def __init__(self, shop: Workshop):
        self.jobs: list[Job] = []
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(shop, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, jobs: list[Job], threads: int) -> None:
        """Let the worker train these next."""
        self.jobs = jobs
        self.connection.send((jobs, threads))

    def stop(self) -> int | None:
        """End the process at once, if it has not ended; its exit code."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        return self._process.exitcode


def serve(shop: Workshop, connection: Connection, parent: int) -> None:
    """A worker's life. A message is `(steps, reports, shared costs)`; reports are None as long as the pass goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would hear what an orphan has to say
    if os.getppid() != parent:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # the parent's may hold a lock for its progress bars
    while True:
        jobs, threads = connection.recv()
        steps = Steps(connection)
        # in a thread of its own, which gets a pool of its own: the pool of the parent's threads does not live here
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as executor:
            reports = executor.submit(shop.train, jobs, steps).result()
        connection.send((steps.unsent, reports, shop.shared_costs))
        shop.shared_costs.clear()


class Steps:
    """Sends a worker's steps, a few times a second."""

    def __init__(self, connection: Connection):
        self.unsent: list[tuple[int, int, float]] = []
        self._connection, self._sent = connection, time.monotonic()

    def __call__(self, trial: int, step: int, loss: float) -> None:
        self.unsent.append((trial, step, loss))
        if time.monotonic() - self._sent > SEND_SECONDS:
            self._connection.send((self.unsent, None, {}))
            self.unsent, self._sent = [], time.monotonic()
