"""Everything that can go wrong, on purpose: `python -m benchmarks.chaos`. Its figures are in docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import postgres

from .place import ROOT, MlflowServer, write_study
from .torment import Place, inspect, reproduced, torment

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
AGAIN, TOLERANCE = 10, 1e-4  # trials to train again, and by how much their loss may be off
PARTS = ("postgres", "sqlite", "disk", "fuzz")


def main() -> None:
    """Run the parts that are asked for; the last line is their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--kills", type=int, default=30, help="with PostgreSQL; a third of it with sqlite")
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parts = {"postgres": with_postgres, "sqlite": with_sqlite, "disk": full_disk, "fuzz": fuzzed}
    figures = {}
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
            print(f"--- {name}", flush=True)
            figures[name] = parts[name](Path(folder), arguments, random.Random(arguments.seed))
            print(json.dumps(figures[name]), flush=True)
    print(json.dumps({"seed": arguments.seed, **figures}))


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, flush=True)


def with_postgres(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """Four workers on PostgreSQL and an MLflow server, both of which are restarted twice."""
    with postgres.server(folder) as database:
        storage = database.create("optuna")
        server = MlflowServer(folder, database.create("mlflow"))
        server.start()
        file = write_study(folder, "chaos", arguments.trials, arguments.steps)
        home = folder / "home"
        options = ["--home", str(home), "--storage", storage, "--tracking-uri", server.url]
        place = Place(home, storage, server.url, options)

        def restart_database() -> str:
            mode = draw.choice(["fast", "immediate"])
            database.stop(mode)
            time.sleep(draw.uniform(0.5, 5))
            database.start()
            return f"PostgreSQL was restarted ({mode})"

        def restart_server() -> str:
            server.stop()
            time.sleep(draw.uniform(0.5, 5))
            server.start()
            return "the MLflow server was restarted"

        restarts = [restart_database, restart_server] * 2
        try:
            return run(file, place, 4, arguments.kills, restarts, arguments, draw)
        finally:
            server.stop()


def with_sqlite(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """Two workers on the embedded stores."""
    file, home = write_study(folder, "chaos", arguments.trials, arguments.steps), folder / "home"
    place = Place(home, f"sqlite:///{home}/optuna.db", f"sqlite:///{home}/mlflow.db", ["--home", str(home)])
    return run(file, place, 2, -(-arguments.kills // 3), [], arguments, draw)


def run(
    file: Path,
    place: Place,
    workers: int,
    kills: int,
    restarts: list[Callable[[], str]],
    arguments: argparse.Namespace,
    draw: random.Random,
) -> dict[str, Any]:
    """Torment a study, then look at it."""
    figures = torment(file, place, workers, kills, arguments.pause, restarts, draw, say)
    found = inspect(file, place, "chaos", arguments.trials, arguments.steps)
    assert figures["kills"] == kills, f"the study was over after {figures['kills']} kills: give it more --steps"
    numbers = draw.sample(range(arguments.trials), min(AGAIN, arguments.trials))
    off = reproduced(place, "chaos", numbers)
    assert off < TOLERANCE, f"the trials {numbers} came to other losses when they were trained again: by {off}"
    return figures | found | {f"loss of {len(numbers)} trials trained again undisturbed is off by, at most": off}


def full_disk(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """A disk fills up while checkpoints are written."""
    from .disk import full_disk

    return full_disk(folder, say)


def fuzzed(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """Mutated study files and checkpoints, in a process of their own: what it may do is limited."""
    command = [sys.executable, "-m", "benchmarks.chaos.fuzz", "--studies", "300", "--checkpoints", "200"]
    done = subprocess.run(
        [*command, "--seed", str(arguments.seed)], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
