"""Write a study and its trials to MLflow: one experiment and one parent run a study, one child run a trial.

Run ids are always explicit; MLflow's ambient "active run" is never used. MLflow is imported on first use, because that
takes seconds and most commands do not need it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench import __version__
from workbench.errors import StorageAway, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

# MLflow reads these; the second keeps it from printing two links to stdout whenever a run on a server ends
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

Outcome = Literal[
    "complete",
    "pruned",
    "out_of_memory",
    "diverged",
    "infeasible",
    "timed_out",
    "crashed",
    "duplicate",
    "interrupted",
]
Status = Literal["FINISHED", "KILLED", "FAILED"]

STATUS: dict[Outcome, Status] = {
    "complete": "FINISHED",
    "pruned": "KILLED",
    "out_of_memory": "FAILED",
    "diverged": "FAILED",
    "infeasible": "KILLED",
    "timed_out": "KILLED",
    "crashed": "FAILED",
    "duplicate": "KILLED",
    "interrupted": "KILLED",
}

REFERENCE = "workbench.reference"  # tag of a study of imported results: where they are from
MAX_METRICS = 1000  # MLflow's limits for one batch
MAX_PARAMS = 100
MAX_PARAM_VALUE = 6000  # characters; MLflow cuts longer ones without a word
MAX_KEY = 250
MAX_MESSAGE = 1000
FLUSH_SECONDS = 2.0  # how far a live dashboard may lag behind
SERVER_SECONDS = 10.0  # how long a tracking server may take to answer at all
PACKAGES = ("torch", "transformers", "datasets", "peft", "optuna", "mlflow", "safetensors", "pandas")


def default_store(home: str | Path) -> tuple[str, str]:
    """The embedded store under a folder: tracking URI and artifact root."""
    folder = Path(home).resolve()
    return f"sqlite:///{folder / 'mlflow.db'}", str(folder / "artifacts")


def open_tracking(uri: str, artifact_root: str | None) -> Tracking:
    """Open a tracking store for writing; a sqlite store is made if need be.

    Args:
        uri: `sqlite:///...`, the URL of a tracking server, or any other database URL that MLflow takes.
        artifact_root: folder or URI below which new studies keep their artifacts; None leaves it to the server.

    Raises:
        StorageError: the store cannot be opened, or the server does not answer.
    """
    return Tracking(open_client(uri, create=True), artifact_root)


def open_client(uri: str, *, create: bool = False) -> MlflowClient:
    """An MLflow client whose store is known to answer.

    Raises:
        StorageError: the sqlite file does not exist (unless `create`), or the store cannot be reached or used.
    """
    file = sqlite_file(uri)
    if file is not None:
        if create:
            _make_folder(file.parent)
        elif not file.exists():
            raise StorageError(f"There is no {file} yet; run `workbench sweep` first, or name the folder it wrote to.")
    elif uri.startswith(("http://", "https://")):
        _check_server(uri)
    # the first opening of a database makes its tables and says so on stderr, line by line
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    with storage_errors(uri):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def sqlite_file(url: str) -> Path | None:
    """The file of a `sqlite:///` URL, None for every other kind."""
    prefix, _, path = url.partition(":///")
    return Path(path) if prefix.startswith("sqlite") and path else None


def public_url(text: str) -> str:
    """A URL, or a text with URLs in it, with every password and token replaced by `***`: what stands before an `@`, and
    the values of queries such as `?password=`."""
    text = re.sub(r"(?<=://)([^:/@\s]*):\S*@", r"\1:***@", text)
    text = re.sub(r"(?<=://)[^:/@?#\s]+@", "***@", text)
    return re.sub(
        r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|credential|signature)[^=&\s]*=)[^&#\s]*", r"\1***", text, flags=re.I
    )


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn the exceptions of MLflow, the database and its missing driver into `StorageError`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = public_url(str(error).strip().split("\n")[0])
        raise StorageError(f"The tracking store {public_url(uri)} cannot be used: {reason}") from error


class Tracking:
    """A tracking store that is open for writing."""

    def __init__(self, client: MlflowClient, artifact_root: str | None):
        self.client = client
        self.uri = client.tracking_uri
        self._artifact_root = artifact_root

    def open_study(
        self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], artifacts: Mapping[str, str]
    ) -> StudyRun:
        """The one parent run of a study: made the first time, found and set running again afterwards.

        On resume, tags and artifacts are replaced, while params keep their first values (MLflow's are immutable).

        Args:
            name: the study and the MLflow experiment.
            params: written as `str(value)`; values that MLflow would cut become artifacts under `params/`.
            tags: added to `workbench.kind=study` and `workbench.study`.
            artifacts: text by file name.

        Raises:
            StorageError: the store refuses, for instance because the experiment was deleted; or the name is that of a
                reference study (tag `workbench.reference`) and this is none, or the other way round.
        """
        with storage_errors(self.uri):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                location = _artifact_location(self._artifact_root, name)
                experiment_id = self.client.create_experiment(name, artifact_location=location)
            elif experiment.lifecycle_stage != "active":
                raise StorageError(
                    f"Experiment {name!r} is deleted in {public_url(self.uri)}; restore it there or rename the study."
                )
            else:
                experiment_id = experiment.experiment_id
            known = {"workbench.kind": "study", "workbench.study": name}
            found = _find_runs(self.client, experiment_id, known)
            if found and (REFERENCE in found[0].data.tags) != (REFERENCE in tags):
                kind = "one of your own" if REFERENCE in tags else "one of imported results"
                raise StorageError(f"There is a study {name!r} already, {kind}; give this one another name.")
            if not found:
                self.client.create_run(experiment_id, tags=known, run_name=name)
                found = _find_runs(self.client, experiment_id, known)
            run, *twice = found  # a server that was restarted just then was asked twice
            for other in twice:
                self.client.delete_run(other.info.run_id)
            self.client.update_run(run.info.run_id, status="RUNNING")
            _describe(self.client, run, params, tags)
            for file, text in artifacts.items():
                self.client.log_text(run.info.run_id, text, file)
            return StudyRun(self.client, run.info.run_id, experiment_id, name)

    def run(self, run_id: str) -> Run:
        """A run that somebody made."""
        return Run(self.client, run_id)

    def log_dataset(self, run: Run, name: str, source: str, digest: str, context: str = "training") -> None:
        """Note the data a run used, as an MLflow dataset input.

        Args:
            source: folder or hub id.
            digest: fingerprint of the contents; MLflow keeps 36 characters.
            context: what it was used for.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind, key = ("local", "uri") if Path(source).exists() else ("hf", "path")
        dataset = Dataset(name, digest[:36], kind, json.dumps({key: source}))
        with storage_errors(self.uri):
            self.client.log_inputs(run.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


class Run:
    """A run that is open for writing. Metrics are buffered and sent in batches; `end` sends what is left."""

    def __init__(self, client: MlflowClient, run_id: str):
        self.run_id = run_id
        self._client = client
        self._buffer: list[tuple[str, float, int, int]] = []  # key, value, milliseconds since the epoch, step
        self._non_finite: Counter[str] = Counter()
        self._sent = time.monotonic()
        self._recorded: dict[str, int] = {}  # each metric's last step in a run that is opened again

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note values at a step. NaN and infinities are not stored but counted, in the tag `workbench.non_finite`."""
        now = round(time.time() * 1000)
        for key, value in metrics.items():
            if 0 < step <= self._recorded.get(_clean(key), 0):
                continue
            if math.isfinite(value):
                self._buffer.append((_clean(key), float(value), now, step))
            else:
                self._non_finite[key] += 1
        if len(self._buffer) >= MAX_METRICS or time.monotonic() - self._sent > FLUSH_SECONDS:
            self.flush()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Note values of the whole run, such as `trainable_params`; sent at once."""
        self.log(0, metrics)
        self.flush()

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        with storage_errors(self._client.tracking_uri):
            self._client.set_tag(self.run_id, key, value)

    def flush(self) -> None:
        """Send the buffered metrics."""
        from mlflow.entities import Metric

        with storage_errors(self._client.tracking_uri):
            while self._buffer:
                self._client.log_batch(self.run_id, metrics=[Metric(*values) for values in self._buffer[:MAX_METRICS]])
                del self._buffer[:MAX_METRICS]
        self._sent = time.monotonic()

    def artifacts(self, folder: str | Path, path: str | None = None) -> None:
        """Copy the files of a folder to the run's artifacts, under `path` if one is given."""
        with storage_errors(self._client.tracking_uri):
            self._client.log_artifacts(self.run_id, str(folder), path)

    def artifact(self, file: Path, path: str) -> None:
        """Copy a file to the run's artifacts, under `path`."""
        with storage_errors(self._client.tracking_uri):
            self._client.log_artifact(self.run_id, str(file), path)

    def discard(self, path: str, keep: str | None = None) -> None:
        """Delete the artifacts in the folder `path`, but for the one of this name."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with storage_errors(self._client.tracking_uri):
            surplus = [file.path for file in self._client.list_artifacts(self.run_id, path)]
            if surplus := [file for file in surplus if file != f"{path}/{keep}"]:
                uri = self._client.get_run(self.run_id).info.artifact_uri
                repository = get_artifact_repository(uri, self._client.tracking_uri)
                for file in surplus:
                    repository.delete_artifacts(file)

    def download(self, path: str, folder: Path) -> None:
        """Copy the run's artifacts under `path` into a folder, where they lie under `path` too."""
        with storage_errors(self._client.tracking_uri):
            self._client.download_artifacts(self.run_id, path, str(folder))

    def _close(self, status: Status, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.flush()
        if self._non_finite:
            counts = ", ".join(f"{key}: {n}" for key, n in sorted(self._non_finite.items()))
            tags = {**tags, "workbench.non_finite": counts}
        with storage_errors(self._client.tracking_uri):
            self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags.items()])
            self._client.set_terminated(self.run_id, status)


class StudyRun(Run):
    """The parent run of a study."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, name: str):
        super().__init__(client, run_id)
        self.name = name
        self._experiment_id = experiment_id

    def open_trial(self, number: int, params: Mapping[str, Any], tags: Mapping[str, str]) -> TrialRun:
        """A new child run for one trial.

        A run that an earlier try at this trial left behind is deleted (MLflow sets deleted runs aside), so that no step
        is recorded twice.

        Args:
            number: Optuna's trial number, from 0.
            params: hyperparameters as `<label>.<field>`.
            tags: added to `workbench.study` and `workbench.trial`.
        """
        known = {
            "mlflow.parentRunId": self.run_id,
            "workbench.study": self.name,
            "workbench.trial": str(number),
        }
        with storage_errors(self._client.tracking_uri):
            for earlier in _find_runs(self._client, self._experiment_id, known):
                self._client.delete_run(earlier.info.run_id)
            run = self._client.create_run(self._experiment_id, tags={**known, **tags}, run_name=f"trial {number}")
            _describe(self._client, run, params, {})
        return TrialRun(self._client, run.info.run_id)

    def reopen_trial(self, run_id: str) -> TrialRun:
        """The child run of a trial that was cut off, running again. Steps that it holds are not recorded twice."""
        with storage_errors(self._client.tracking_uri):
            self._client.update_run(run_id, status="RUNNING")
            stored = self._client.get_run(run_id).data
            for key in {"workbench.outcome", "workbench.message"} & stored.tags.keys():
                self._client.delete_tag(run_id, key)
            run = TrialRun(self._client, run_id)
            for key in stored.metrics:
                run._recorded[key] = max(metric.step for metric in self._client.get_metric_history(run_id, key))
        return run

    def drop_strays(self, known: set[str]) -> None:
        """Delete (MLflow sets them aside) the runs of trials that are not among these: a server that was restarted just
        after it made a run was asked for it twice."""
        tags = {"mlflow.parentRunId": self.run_id, "workbench.study": self.name}
        with storage_errors(self._client.tracking_uri):
            for run in _find_runs(self._client, self._experiment_id, tags):
                if "workbench.trial" in run.data.tags and run.info.run_id not in known:
                    self._client.delete_run(run.info.run_id)

    def end(self, status: Status) -> None:
        """Close the parent run."""
        self._close(status, {})


class TrialRun(Run):
    """The child run of one trial."""

    def end(self, outcome: Outcome, message: str = "", traceback: str = "") -> None:
        """Close the run.

        Args:
            outcome: kept as the tag `workbench.outcome`; `STATUS` maps it to MLflow's status.
            message: why, for a person; the tag `workbench.message` holds its first 1,000 characters.
            traceback: kept as the artifact `traceback.txt`.
        """
        if traceback:
            with storage_errors(self._client.tracking_uri):
                self._client.log_text(self.run_id, traceback, "traceback.txt")
        message_tag = {"workbench.message": message[:MAX_MESSAGE]} if message else {}
        self._close(STATUS[outcome], {"workbench.outcome": outcome, **message_tag})


def environment() -> dict[str, str]:
    """What the results depend on besides the study: code version, packages, Python, platform, CPU and GPU names.

    Keys are absent where nothing is known. Environment variables are not read.
    """
    found = {
        "version.workbench": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
    }
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpus:
        found["gpu"] = ", ".join(gpus.splitlines())
    commit = _output("git", "rev-parse", "HEAD")
    if commit:
        found["git.commit"] = commit
        found["git.dirty"] = str(bool(_output("git", "status", "--porcelain"))).lower()
    return found


def _find_runs(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
    """The runs that carry all these tags, oldest first."""
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found: list[StoredRun] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], page_token=token)
        found += page
        if not (token := page.token):
            return found


def _describe(client: MlflowClient, run: StoredRun, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    """Write params that the run does not have yet, and tags."""
    from mlflow.entities import Param, RunTag

    run_id, new = run.info.run_id, []
    for key, value in ((_clean(key), str(value)) for key, value in params.items()):
        if key in run.data.params:
            continue
        if len(value) > MAX_PARAM_VALUE:
            file = f"params/{key.replace('/', '_')}.txt"
            client.log_text(run_id, value, file)
            value = f"sha256:{hashlib.sha256(value.encode()).hexdigest()} (see {file})"
        new.append(Param(key, value))
    for start in range(0, len(new), MAX_PARAMS):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
    if tags:
        client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])


def _clean(key: str) -> str:
    """The key with what MLflow refuses replaced by `_`: odd characters, path tricks such as `a//b`, excess length."""
    key = re.sub(r"[^\w\-. :/]", "_", key)
    parts = ["_" if part in ("", ".", "..") else part for part in key.split("/")]
    return "/".join(parts)[:MAX_KEY].rstrip("/")


def _artifact_location(root: str | None, name: str) -> str | None:
    if not re.fullmatch(r"[\w-][\w. -]{0,99}", name):  # it becomes a folder's
        raise StorageError(f"{name[:100]!r} cannot be a study's name: letters, digits and . _ - only, at most 100.")
    if root is None:
        return None
    return f"{root.rstrip('/')}/{name}" if "://" in root else (Path(root).resolve() / name).as_uri()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"The folder {folder} cannot be made: {error.strerror}.") from error


def _check_server(uri: str) -> None:
    """MLflow's own client retries an absent server for minutes; ask once before it does."""
    try:
        place = urllib.parse.urlsplit(uri)
        plain = place._replace(netloc=place.netloc.rpartition("@")[2])  # urllib takes a password for a part of the name
        urllib.request.urlopen(f"{plain.geturl().rstrip('/')}/health", timeout=SERVER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in is for MLflow to find out
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise StorageAway(
            f"No tracking server answers at {public_url(uri)} ({public_url(str(error))}); start it, or leave out the "
            "tracking URI."
        ) from error


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a program prints, empty if it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
