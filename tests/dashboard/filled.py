"""Trials as a sweep writes them, and a server that shows them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dashboards import launch
from workbench.tracking.runs import Outcome

ROOT = Path(__file__).parents[2]
TRIALS: list[tuple[str, Outcome, int, float | None, dict]] = [
    ("lora", "complete", 24_000, 0.71, {"r": 8, "learning_rate": 1e-3}),
    ("ia3", "complete", 4_600, 0.77, {"learning_rate": 1e-2}),
    ("lora", "pruned", 48_000, 0.79, {"r": 16, "learning_rate": 1e-4}),
    ("lora", "diverged", 12_000, None, {"r": 4, "learning_rate": 1.0}),
]
TAGS = {"workbench.metric": "accuracy", "workbench.goal": "maximize"}


def write_trial(study, number, label, outcome, trainable, accuracy, params):
    """A trial as a sweep writes it; "running": one that has not ended."""
    tags = {"workbench.label": label, "workbench.method": label, "workbench.searched": " ".join(params)}
    trial = study.open_trial(number, {f"{label}.{k}": v for k, v in params.items()}, tags)
    trial.summary({"trainable_params": trainable, "all_params": 8_400_000, "seconds/train": 3.0, "seconds/total": 4.0})
    if accuracy is not None:
        trial.log(100, {"validation.accuracy": accuracy, "validation.loss": 1 - accuracy})
    if outcome == "running":
        trial.flush()
    else:
        trial.end(outcome, "the loss is nan" if outcome == "diverged" else "")
    return trial


@contextmanager
def served(uri: str) -> Iterator[str]:
    """The address of a server of the dashboard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, variables = launch(uri, None, port)
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        health = None
        while health is None and server.poll() is None:
            try:
                health = urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=60).read()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        assert health == b"ok", server.communicate()[0]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate()
