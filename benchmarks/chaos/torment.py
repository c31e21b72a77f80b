"""Workers are killed and servers restarted while a study runs; then every trial is looked at."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
from optuna.trial import TrialState
from safetensors.torch import load_file

from workbench.sweep.reproduce import reproduce
from workbench.sweep.stores import Stores

from .place import EVERY, ROOT

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a study runs.

    Attributes:
        home: folder of the workers' files.
        optuna: URL of Optuna's storage.
        tracking: MLflow's URI.
        options: of `workbench` that name them.
    """

    home: Path
    optuna: str
    tracking: str
    options: Sequence[str]


def torment(
    file: Path,
    place: Place,
    workers: int,
    kills: int,
    pause: float,
    restarts: Sequence[Callable[[], str]],
    draw: random.Random,
    say: Say,
) -> dict[str, Any]:
    """Run a study, and kill workers at random moments while it does.

    Args:
        kills: how many to kill.
        pause: mean seconds between two kills.
        restarts: are called in between, evenly; each says what it did.

    Returns:
        counts: kills, restarts, seconds, and how far the killed workers were.
    """
    command = [sys.executable, "-m", "workbench", "sweep", str(file), "--workers", str(workers)]
    command += ["--launcher", "processes", "--heartbeat", "1", *place.options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun, done, ages = time.monotonic(), Counter[str](), list[float]()
    with (file.parent / "sweep.log").open("ab") as log:
        sweep = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    due = {round((i + 1) * kills / (len(restarts) + 1)): restart for i, restart in enumerate(restarts)}
    while sweep.poll() is None and done["kills"] < kills:
        time.sleep(draw.expovariate(1 / pause))
        victims = [child for child in psutil.Process(sweep.pid).children() if child.is_running()]
        if not victims or sweep.poll() is not None:
            continue
        victim = draw.choice(victims)
        ages.append(time.time() - victim.create_time())
        victim.kill()
        done["kills"] += 1
        say(f"{time.monotonic() - begun:6.1f} s: killed a worker {ages[-1]:.1f} s old, {done['kills']} of {kills}")
        if restart := due.pop(done["kills"], None):
            say(f"{time.monotonic() - begun:6.1f} s: {restart()}")
            done["restarts"] += 1
    while sweep.poll() is None:
        time.sleep(1)
    if sweep.returncode:
        raise RuntimeError(
            f"the sweep ended with exit code {sweep.returncode}: {(file.parent / 'sweep.log').read_text()}"
        )
    return {
        "kills": done["kills"],
        "restarts": done["restarts"],
        "seconds": round(time.monotonic() - begun),
        "median age of a killed worker, s": round(sorted(ages)[len(ages) // 2], 1) if ages else None,
    }


def inspect(file: Path, place: Place, name: str, trials: int, steps: int) -> dict[str, Any]:
    """Look at every trial in both stores, and at what lies around.

    Raises:
        AssertionError: something is lost, doubled or left behind.
    """
    study = optuna.load_study(study_name=name, storage=place.optuna)
    client = mlflow.MlflowClient(place.tracking)
    experiment = client.get_experiment_by_name(name)
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    parents = [run for run in runs if run.data.tags.get("workbench.kind") == "study"]
    children = {run.data.tags["workbench.trial"]: run for run in runs if "workbench.trial" in run.data.tags}
    assert [trial.number for trial in study.trials] == list(range(trials)), [t.number for t in study.trials]
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}, [t.state for t in study.trials]
    assert len(parents) == 1, len(parents)
    assert len(runs) == trials + 1, len(runs)
    assert {run.info.status for run in runs} == {"FINISHED"}, Counter(run.info.status for run in runs)
    measured, made = list(range(EVERY, steps + 1, EVERY)), list(range(1, steps + 1))
    taken = 0
    for trial in study.trials:
        run = children[str(trial.number)]
        assert trial.user_attrs["run_id"] == run.info.run_id, trial.number
        assert run.data.tags["workbench.outcome"] == "complete", trial.number
        for metric, expected in (("train.loss", made), ("validation.loss", measured)):
            points = client.get_metric_history(run.info.run_id, metric)
            assert sorted(point.step for point in points) == expected, (trial.number, metric)
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(client.download_artifacts(run.info.run_id, "adapter", folder))
            assert load_file(adapter / "adapter_model.safetensors"), trial.number
        assert not client.list_artifacts(run.info.run_id, "checkpoints"), trial.number
        taken += "taken" in trial.user_attrs
    left = [str(path) for path in (place.home / "checkpoints").rglob("*") if path.is_file()]
    assert not left, left
    return {"finished trials": len(study.trials), "runs": len(children), "trials that changed their worker": taken}


def reproduced(place: Place, name: str, numbers: Sequence[int]) -> float:
    """Train trials anew without any disturbance; by how much their loss on the validation split is off at most."""
    again = [reproduce(name, number, stores(place), lambda *_: None) for number in numbers]
    return max(abs(trial.now["loss"] - trial.before["loss"]) for trial in again)


def stores(place: Place) -> Stores:
    """The place as the commands know it."""
    return Stores(place.home, place.optuna, place.tracking, None, 1)
