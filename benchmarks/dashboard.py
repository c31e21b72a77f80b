"""How long the dashboard takes to be there, to answer and to refresh, with 100, 1,000 and 10,000 trials in a study.

    python -m benchmarks.dashboard                      all sizes, about five minutes on two cores
    python -m benchmarks.dashboard --trials 10000       one of them
    python -m benchmarks.dashboard --keep FOLDER        keep the stores, and screenshots beside them

Each size has a store of its own, written straight into MLflow's tables, since MLflow itself would take an hour. The
pages are opened in Chromium. First paint is when the first chart stands; all there, when nothing is computed any more
(with the leaderboard, whose intervals are computed from the scores of every example); an interaction lasts from the
click until the page is at rest again; a refresh is what the server reads and ranks every two seconds of a study that
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
METHODS = {  # label -> sizes to choose from, and the accuracy that it can come to
    "lora": (20_000, 2_000_000, 0.86),
    "adalora": (30_000, 2_000_000, 0.85),
    "ia3": (2_000, 12_000, 0.82),
    "loha": (20_000, 900_000, 0.84),
    "lokr": (3_000, 300_000, 0.83),
    "trainable_tokens": (5_000, 500_000, 0.8),
    "prompt_tuning": (1_000, 40_000, 0.74),
    "prefix_tuning": (10_000, 600_000, 0.79),
}
OUTCOMES = {  # outcome -> MLflow's status, share, message
    "complete": ("FINISHED", 0.55, ""),
    "pruned": ("KILLED", 0.35, "worse than others at step 50"),
    "infeasible": ("KILLED", 0.04, "needs 1,930 MiB, more than constraints.vram_gib allows"),
    "diverged": ("FAILED", 0.04, "the loss is nan at step 31"),
    "out_of_memory": ("FAILED", 0.015, "CUDA out of memory, also alone in a pass"),
    "crashed": ("FAILED", 0.005, "IndexError: index out of range"),
}
RUNS_AGAIN, EXAMPLES = 9, 600  # finalists of a method, and rows of validation


def make_store(home: Path, trials: int, study: str = "many") -> str:
    """A store with one study of so many trials, the last of them finalists of three methods; its tracking URI."""
    from workbench.tracking.runs import default_store, open_tracking

    uri, root = default_store(home)
    tracking = open_tracking(uri, root)
    tags = {
        "workbench.metric": "accuracy",
        "workbench.goal": "maximize",
        "workbench.test_rows": "0",
        "workbench.budget": json.dumps({"trials": trials}),
    }
    parent = tracking.open_study(study, {}, tags, {"study.yaml": f"study: {study}\nbudget: {{trials: {trials}}}\n"})
    experiment = tracking.client.get_run(parent.run_id).info.experiment_id
    again = [label for label in METHODS for _ in range(RUNS_AGAIN)][: 3 * RUNS_AGAIN] if trials >= 100 else []
    rows = Rows(parent.run_id, experiment, Path(root) / study, trials)
    for number in range(trials - len(again)):
        rows.trial(number)
    for number, label in enumerate(again, trials - len(again)):
        rows.finalist(number, label)
    rows.write(uri)
    parent.end("FINISHED")
    return uri


class Rows:
    """Rows of MLflow's tables, to be written at once."""

    def __init__(self, parent: str, experiment: str, artifacts: Path, trials: int):
        self.parent, self.experiment, self.artifacts = parent, experiment, artifacts
        self.random = np.random.default_rng(trials)
        self.start = round(time.time() * 1000) - 1000 * trials
        self.best: dict[str, tuple[float, int, dict[str, object]]] = {}
        self.runs: list[dict[str, object]] = []
        self.tags: list[dict[str, object]] = []
        self.params: list[dict[str, object]] = []
        self.metrics: list[dict[str, object]] = []

    def trial(self, number: int) -> None:
        """One of the search."""
        random = self.random
        label = list(METHODS)[number % len(METHODS)]
        small, large, best = METHODS[label]
        outcome = str(random.choice(list(OUTCOMES), p=[share for _, share, _ in OUTCOMES.values()]))
        rate, size = 10 ** random.uniform(-5, -1), float(np.exp(random.uniform(np.log(small), np.log(large))))
        accuracy = best - 0.04 * abs(np.log10(rate) + 3) ** 1.5 + 0.01 * np.log(size / large) + random.normal(0, 0.012)
        params = {"learning_rate": rate, "lora_dropout": round(random.uniform(0, 0.3), 3)}
        if label not in ("ia3", "prompt_tuning"):
            params |= {"r": int(2 ** random.integers(1, 7)), "alpha": int(2 ** random.integers(2, 8))}
        params["target_modules"] = str(random.choice(["query, value", "all-linear", "key, query, value"]))
        measured = outcome in ("complete", "pruned")
        accuracy = float(np.clip(accuracy * (0.8 if outcome == "pruned" else 1), 0.05, 1)) if measured else None
        if outcome == "complete" and accuracy is not None and accuracy > self.best.get(label, (0.0,))[0]:
            self.best[label] = accuracy, number, params
        self._write(number, label, outcome, "search", params, size, accuracy, {})

    def finalist(self, number: int, label: str) -> None:
        """A repetition of a method's best, with its predictions."""
        accuracy, of, params = self.best[label]
        scores = (self.random.random(EXAMPLES) < accuracy).astype(float)
        seeds = {"finalist_of": of, "init_seed": 10_000 + number % 3, "order_seed": 10_000 + number % RUNS_AGAIN // 3}
        run = self._write(number, label, "complete", "finalist", params, 50_000.0, float(scores.mean()), seeds)
        file = self.artifacts / run / "artifacts" / "predictions" / "validation.parquet"
        file.parent.mkdir(parents=True)
        columns = {"row": range(EXAMPLES), "actual": ["1"] * EXAMPLES, "predicted": ["1"] * EXAMPLES}
        pq.write_table(pa.table({**columns, "loss": 1 - scores, "score.accuracy": scores}), file)

    def _write(
        self,
        number: int,
        label: str,
        outcome: str,
        role: str,
        params: dict[str, object],
        size: float,
        accuracy: float | None,
        seeds: dict[str, int],
    ) -> str:
        run, at, seconds = uuid.uuid4().hex, self.start + 1000 * number, float(self.random.gamma(4, 5))
        status, _, message = OUTCOMES[outcome]
        self.runs.append(
            {
                "run_uuid": run,
                "name": f"trial {number}",
                "source_type": "UNKNOWN",
                "source_name": "",
                "entry_point_name": "",
                "user_id": "somebody",
                "status": status,
                "start_time": at,
                "end_time": at + 900,
                "source_version": "",
                "lifecycle_stage": "active",
                "artifact_uri": f"{(self.artifacts / run / 'artifacts').as_uri()}",
                "experiment_id": int(self.experiment),
            }
        )
        tags = {
            "mlflow.parentRunId": self.parent,
            "mlflow.runName": f"trial {number}",
            "workbench.study": "many",
            "workbench.trial": number,
            "workbench.label": label,
            "workbench.method": label,
            "workbench.role": role,
            "workbench.config": f"{number:016x}",
            "workbench.searched": " ".join(params),
            "workbench.params": json.dumps({f"{label}.{key}": value for key, value in params.items()}),
            "workbench.outcome": outcome,
            **({"workbench.message": message} if message else {}),
            **{f"workbench.{key}": value for key, value in seeds.items()},
        }
        metrics = {"trainable_params": round(size), "all_params": 9_000_000, "trainable_percent": size / 90_000}
        if accuracy is not None:
            metrics |= {
                "train.loss": 2 * (1 - accuracy),
                "validation.loss": 2.2 * (1 - accuracy),
                "validation.accuracy": accuracy,
                "validation.f1": accuracy - 0.01,
                "validation.mcc": accuracy - 0.1,
                "seconds/train": 0.8 * seconds,
                "seconds/eval": 0.2 * seconds,
                "seconds/total": seconds,
                "tensor_peak_mib/train": 90 + size / 20_000,
                "tensor_peak_mib/eval": 60.0,
                "predicted_peak_mib/train": 92 + size / 20_000,
                "prediction_error_percent/train": 2.0,
            }
        if outcome == "complete":
            metrics["adapter_bytes"] = round(4 * size + 3000)
        self.tags += [{"key": key, "value": str(value), "run_uuid": run} for key, value in tags.items()]
        self.params += [{"key": f"{label}.{k}", "value": str(v), "run_uuid": run} for k, v in params.items()]
        self.metrics += [
            {
                "key": key,
                "value": float(value),
                "timestamp": at,
                "run_uuid": run,
                "step": (150 if outcome == "complete" else 50) if "." in key else 0,
                "is_nan": False,
            }
            for key, value in metrics.items()
        ]
        return run

    def write(self, uri: str) -> None:
        """Fill the tables."""
        from sqlalchemy import MetaData, create_engine

        engine, meta = create_engine(uri), MetaData()
        meta.reflect(engine, only=["runs", "tags", "params", "metrics", "latest_metrics"])
        tables = {"runs": self.runs, "tags": self.tags, "params": self.params}
        tables |= {"metrics": self.metrics, "latest_metrics": self.metrics}
        with engine.begin() as connection:
            for name, rows in tables.items():
                connection.execute(meta.tables[name].insert(), rows)
        engine.dispose()


# -------------------------------------------------------------------- a browser

PAGES = {"studies": "?study=many", "compare": "compare?study=many"}
REST = """() => {
    const app = document.querySelector('[data-testid=stApp]');
    const there = document.querySelector('[data-testid=stVegaLiteChart] .marks');
    const busy = !app || !there || app.dataset.testScriptState === 'running'
        || document.querySelector('[data-testid=stSpinner], [data-stale=true], [data-testid=stSkeleton]');
    window.quiet = busy ? 0 : (window.quiet || 0) + 1;
    return window.quiet > 3;
}"""
POLL = 50  # ms; what `rest` waits for is there four of these before it returns


@contextmanager
def server(uri: str) -> Iterator[str]:
    """A dashboard that was just started."""
    from dashboards import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, variables = launch(uri, None, port)
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=60).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def rest(page) -> None:
    page.wait_for_function(REST, polling=POLL, timeout=300_000)
    page.evaluate("window.quiet = 0")


def seconds(page, act) -> float:
    """From an act until the page is at rest, less what the waiting adds."""
    start = time.perf_counter()
    act()
    page.wait_for_timeout(60)  # until the server has heard of it
    rest(page)
    return time.perf_counter() - start - 3 * POLL / 1000


def painted(page) -> None:
    page.wait_for_selector("[data-testid=stVegaLiteChart] .marks", timeout=300_000)


def measure(browser, url: str, uri: str, pictures: Path | None) -> dict[str, float]:
    """Seconds of each thing, on the pages of a store."""
    found = {}
    for name, path in PAGES.items():
        for first in ("cold", "again"):
            page = browser.new_context(viewport={"width": 1400, "height": 1700}).new_page()
            start = time.perf_counter()
            page.goto(f"{url}/{path}")
            painted(page)
            if first == "again" or name == "studies":
                found[f"{name}, first paint{', of the server' if first == 'cold' else ''}"] = (
                    time.perf_counter() - start
                )
            rest(page)
            if first == "again" or name != "studies":
                found[f"{name}, all there{', compared anew' if first == 'cold' else ''}"] = (
                    time.perf_counter() - start - 3 * POLL / 1000
                )
            if first == "again":
                if name == "compare":
                    found |= interactions(page)
                if pictures:
                    page.screenshot(path=pictures / f"{name}.png")
            page.context.close()
    found |= refreshes(uri)
    return found


def interactions(page) -> dict[str, float]:
    """Seconds from a click until the page is at rest."""
    found = {}
    page.get_by_test_id("stMultiSelect").filter(has_text="Outcomes").get_by_role("combobox").click()
    option = page.get_by_role("option", name="complete")
    option.wait_for()
    found["compare, a filter"] = seconds(page, option.click)
    page.keyboard.press("Escape")
    found["compare, another cost"] = seconds(page, page.get_by_text("memory", exact=True).click)
    table = page.locator("[data-testid=stDataFrame]").last
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    found["compare, a row ticked"] = seconds(page, lambda: page.mouse.click(box["x"] + 18, box["y"] + 52))
    return found


def refreshes(uri: str) -> dict[str, float]:
    """Seconds that the server takes to read and rank anew, with nothing new and with one trial more."""
    from workbench.tracking import frames
    from workbench.tracking.live import Snapshot
    from workbench.tracking.runs import StudyRun, open_tracking

    snapshot, tracking = Snapshot(uri, "many"), open_tracking(uri, None)
    parent = frames.study_run(tracking.client, uri, "many").info
    start = time.perf_counter()
    seen = snapshot.look()
    found = {"all trials read": time.perf_counter() - start}
    for what in ("nothing new", "a trial more"):
        if what == "a trial more":
            study = StudyRun(tracking.client, parent.run_id, parent.experiment_id, "many")
            trial = study.open_trial(len(seen.trials), {"lora.r": 8}, {"workbench.label": "lora"})
            trial.summary({"trainable_params": 100, "validation.accuracy": 0.5})
            trial.end("complete")
        start = time.perf_counter()
        assert len(snapshot.look().ranked) == len(seen.trials) + (what == "a trial more")
        found[f"refresh, {what}"] = time.perf_counter() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, action="append", help="a size; 100, 1,000 and 10,000 by default")
    parser.add_argument("--keep", type=Path, help="folder for the stores and screenshots")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    sizes = arguments.trials or [100, 1000, 10_000]
    table = Table("seconds", *(f"{size:,}" for size in sizes), title="by the number of trials")
    columns = []
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        path = shutil.which("chromium") or playwright.chromium.executable_path
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for size in sizes:
            home = (arguments.keep or Path(temporary)) / str(size)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            uri = make_store(home, size)
            with server(uri) as url:
                columns.append(measure(browser, url, uri, home if arguments.keep else None))
            Console(stderr=True).print(f"{size:,} trials done", highlight=False)
        browser.close()
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
