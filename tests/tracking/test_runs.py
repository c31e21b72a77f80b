from __future__ import annotations

import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench.errors import StorageError
from workbench.tracking import frames, runs
from workbench.tracking.runs import Tracking, open_client, open_tracking

ROOT = Path(__file__).parents[2]


def _study(tracking: Tracking, **given: dict) -> runs.StudyRun:
    return tracking.open_study("s", given.get("params", {}), given.get("tags", {}), given.get("artifacts", {}))


def _artifact(tracking: Tracking, run_id: str, path: str) -> str:
    return Path(tracking.client.download_artifacts(run_id, path)).read_text()


def test_a_study_has_one_parent_run_however_often_it_is_opened(tracking, tmp_path):
    first = _study(tracking, params={"steps": 150}, tags={"workbench.metric": "f1"}, artifacts={"study.yaml": "a: 1"})
    first.summary({"seconds/load": 1.5})
    first.end("FINISHED")
    again = _study(
        open_tracking(tracking.uri, str(tmp_path / "artifacts")),
        params={"steps": 300, "seed": 0},
        tags={"workbench.metric": "accuracy"},
        artifacts={"study.yaml": "a: 2"},
    )
    assert again.run_id == first.run_id
    run = tracking.client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.metrics == {"seconds/load": 1.5}
    assert run.data.params == {"steps": "150", "seed": "0"}  # MLflow's params are immutable
    assert run.data.tags["workbench.kind"] == "study"
    assert run.data.tags["workbench.metric"] == "accuracy"
    assert _artifact(tracking, first.run_id, "study.yaml") == "a: 2"
    experiment = tracking.client.get_experiment_by_name("s")
    assert experiment.artifact_location == (tmp_path / "artifacts" / "s").as_uri()
    assert len(tracking.client.search_runs([experiment.experiment_id])) == 1


def test_a_trial_that_is_trained_again_replaces_what_was_cut_off(tracking):
    study = _study(tracking)
    trial = study.open_trial(0, {"lora.r": 8}, {"workbench.label": "lora"})
    other = study.open_trial(1, {"lora.r": 4}, {"workbench.label": "lora"})
    trial.end("interrupted", "Ctrl-C")
    again = study.open_trial(0, {"lora.r": 8}, {"workbench.label": "lora"})
    assert len({again.run_id, trial.run_id, other.run_id}) == 3
    assert tracking.client.get_run(trial.run_id).info.lifecycle_stage == "deleted"
    run = tracking.client.get_run(again.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == study.run_id
    assert run.data.tags["workbench.trial"] == "0"
    assert not {"workbench.outcome", "workbench.message"} & run.data.tags.keys()


def test_metrics_are_sent_in_batches_and_none_is_lost(tracking, monkeypatch):
    trial = _study(tracking).open_trial(0, {}, {})
    sizes = []
    send = trial._client.log_batch
    monkeypatch.setattr(trial._client, "log_batch", lambda run_id, metrics=(), **rest: (
        sizes.append(len(metrics)), send(run_id, metrics=metrics, **rest)
    ))  # fmt: skip
    monkeypatch.setattr(runs, "FLUSH_SECONDS", math.inf)
    for step in range(1250):
        trial.log(step, {"train.loss": 1 / (step + 1), "train.rate": step})
    assert sizes == [1000, 1000]  # sent without being asked
    trial.end("complete")
    assert sizes == [1000, 1000, 500, 0]  # the last batch holds the tags
    losses = tracking.client.get_metric_history(trial.run_id, "train.loss")
    assert [(m.step, m.value) for m in losses] == [(step, 1 / (step + 1)) for step in range(1250)]


def test_metrics_are_sent_when_the_last_sending_is_long_ago(tracking, monkeypatch):
    trial = _study(tracking).open_trial(0, {}, {})
    trial.log(1, {"a": 1.0})
    assert "a" not in tracking.client.get_run(trial.run_id).data.metrics
    monkeypatch.setattr(runs, "FLUSH_SECONDS", -1.0)
    trial.log(2, {"a": 2.0})
    assert tracking.client.get_run(trial.run_id).data.metrics["a"] == 2.0


def test_values_that_are_not_finite_are_counted_instead(tracking):
    trial = _study(tracking).open_trial(0, {}, {})
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf]):
        trial.log(step, {"train.loss": value})
    trial.end("diverged")
    assert [m.value for m in tracking.client.get_metric_history(trial.run_id, "train.loss")] == [1.0]
    assert tracking.client.get_run(trial.run_id).data.tags["workbench.non_finite"] == "train.loss: 3"


@pytest.mark.parametrize("outcome", runs.STATUS)
def test_outcomes(tracking, outcome):
    trial = _study(tracking).open_trial(0, {}, {})
    trial.end(outcome)
    run = tracking.client.get_run(trial.run_id)
    assert run.info.status == runs.STATUS[outcome]
    assert run.data.tags["workbench.outcome"] == outcome


def test_message_and_traceback(tracking):
    trial = _study(tracking).open_trial(0, {}, {})
    trial.end("crashed", "x" * 5000, "Traceback ...")
    tags = tracking.client.get_run(trial.run_id).data.tags
    assert tags["workbench.message"] == "x" * 1000
    assert _artifact(tracking, trial.run_id, "traceback.txt") == "Traceback ..."


def test_long_params_become_artifacts(tracking):
    value = "query," * 2000
    run_id = _study(tracking, params={"lora.target/modules": value, "short": "a" * 6000}).run_id
    params = tracking.client.get_run(run_id).data.params
    assert hashlib.sha256(value.encode()).hexdigest() in params["lora.target/modules"]
    assert _artifact(tracking, run_id, "params/lora.target_modules.txt") == value
    assert params["short"] == "a" * 6000


def test_keys_that_mlflow_refuses_are_cleaned(tracking):
    params = {"(ia)3.r": 1, "a//b": 2, "../c": 3, "d" * 400: 4, "ünï:x": 5} | {f"p{i}": i for i in range(150)}
    study = _study(tracking, params=params)
    found = tracking.client.get_run(study.run_id).data.params
    assert len(found) == len(params)
    assert {"_ia_3.r": "1", "a/_/b": "2", "_/c": "3", "d" * 250: "4", "ünï:x": "5"}.items() <= found.items()
    trial = study.open_trial(0, {}, {})
    trial.summary({"loss@1": 1.0})
    assert tracking.client.get_run(trial.run_id).data.metrics == {"loss_1": 1.0}


def test_artifacts_of_a_folder(tracking, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    trial = _study(tracking).open_trial(0, {}, {})
    trial.artifacts(tmp_path / "adapter", "best")
    assert _artifact(tracking, trial.run_id, "best/adapter_config.json") == "{}"


def test_datasets(tracking, tmp_path):
    study = _study(tracking)
    tracking.log_dataset(study, "movies", str(tmp_path), "f" * 64)
    tracking.log_dataset(study, "glue", "nyu-mll/glue", "abc")
    found = {i.dataset.name: i.dataset for i in tracking.client.get_run(study.run_id).inputs.dataset_inputs}
    assert found["movies"].digest == "f" * 36
    assert str(tmp_path) in found["movies"].source
    assert found["glue"].source_type == "hf"


def test_stores_that_cannot_be_used(tmp_path):
    (tmp_path / "a_file").touch()
    for uri in (f"sqlite:///{tmp_path}/a_file/mlflow.db", "http://127.0.0.1:9", f"file://{tmp_path}/mlruns"):
        with pytest.raises(StorageError):
            open_tracking(uri, None)
    with pytest.raises(StorageError, match="workbench sweep"):
        open_client(f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_a_deleted_experiment_is_an_error(tracking):
    _study(tracking)
    tracking.client.delete_experiment(tracking.client.get_experiment_by_name("s").experiment_id)
    with pytest.raises(StorageError, match="deleted"):
        _study(tracking)


def test_passwords_are_hidden():
    assert runs.public_url("postgresql+psycopg://me:p@ss:w/rd@db:5432/x") == "postgresql+psycopg://me:***@db:5432/x"
    for url in ("http://mlflow:5000", "sqlite:////home/a@b/mlflow.db", "sqlite:///a:b@c.db"):
        assert runs.public_url(url) == url
    with pytest.raises(StorageError) as error:
        open_client("http://me:secret@127.0.0.1:9")
    assert "secret" not in str(error.value)


@pytest.mark.slow
def test_a_tracking_server(template, tmp_path, capfd):
    shutil.copy(template, tmp_path / "server.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    uri = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        tracking = None
        while tracking is None and server.poll() is None:
            try:
                tracking = open_tracking(uri, None)
            except StorageError:
                time.sleep(0.2)
        assert tracking, (tmp_path / "log").read_text()
        study = _study(tracking, params={"long": "x" * 7000}, tags={"workbench.metric": "accuracy"})
        trial = study.open_trial(0, {"lora.r": 8}, {"workbench.label": "lora"})
        trial.log(1, {"validation.accuracy": 0.5, "train.loss": math.nan})
        trial.end("crashed", "why", "Traceback ...")
        study.end("FINISHED")
        assert frames.trials(uri, "s").loc[0, ["objective", "outcome", "hp.r"]].tolist() == [0.5, "crashed", 8]
        assert _artifact(tracking, trial.run_id, "traceback.txt") == "Traceback ..."
        assert capfd.readouterr().out == ""  # what the command line prints stays its own
    finally:
        server.terminate()
        server.wait()


def test_a_trial_that_goes_on_has_each_step_once(tracking):
    study = _study(tracking)
    trial = study.open_trial(0, {"lora.r": 8}, {"workbench.label": "lora"})
    for step in (1, 2):
        trial.log(step, {"train.loss": 1 / step})
    trial.summary({"trainable_params": 5})
    trial.end("interrupted", "stopped")
    again = study.reopen_trial(trial.run_id)
    stored = tracking.client.get_run(again.run_id)
    assert stored.info.status == "RUNNING"
    assert not {"workbench.outcome", "workbench.message"} & stored.data.tags.keys()
    for step in (2, 3):
        again.log(step, {"train.loss": 7.0, "validation.loss": 7.0})
    again.tag("workbench.shared", "2")
    again.end("complete")
    curve = frames.history(tracking.uri, again.run_id)
    assert curve[["metric", "step", "value"]].values.tolist() == [
        ["train.loss", 1, 1.0],
        ["train.loss", 2, 0.5],
        ["train.loss", 3, 7.0],
        ["trainable_params", 0, 5.0],
        ["validation.loss", 2, 7.0],
        ["validation.loss", 3, 7.0],
    ]
    stored = tracking.client.get_run(again.run_id)
    assert (stored.info.status, stored.data.tags["workbench.shared"]) == ("FINISHED", "2")
    assert len(frames.trials(tracking.uri, "s")) == 1


def test_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    found = runs.environment()
    assert {"python", "platform", "cpu", "version.torch", "version.workbench"} <= found.keys()
    assert "git.commit" not in found
    assert "very-secret" not in str(found)

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert runs.environment()["git.commit"] == git("rev-parse", "HEAD")
    assert runs.environment()["git.dirty"] == "false"
    (tmp_path / "new").touch()
    assert runs.environment()["git.dirty"] == "true"


def test_a_fresh_store_is_quiet_and_nothing_heavy_is_imported_early(tmp_path):
    script = f"""
import sys
import workbench.tracking.frames as frames, workbench.tracking.runs as runs
assert "mlflow" not in sys.modules and "optuna" not in sys.modules
uri, root = runs.default_store({str(tmp_path / "home")!r})
runs.open_tracking(uri, root).open_study("s", {{}}, {{}}, {{}}).open_trial(0, {{}}, {{}}).end("complete")
assert len(frames.trials(uri, "s")) == 1
import os
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
assert "torch" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
