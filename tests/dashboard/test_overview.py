from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboards import charts, launch
from workbench.tracking import frames
from workbench.tracking.runs import default_store, open_tracking

ROOT = Path(__file__).parents[2]
APP = str(ROOT / "dashboards" / "app.py")


@pytest.fixture
def app(monkeypatch):
    """Run the app on a store, as `?study=...` if a study is named."""

    def run(uri: str, study: str | None = None) -> AppTest:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        test = AppTest.from_file(APP, default_timeout=120)
        if study:
            test.query_params["study"] = study
        test.run()
        assert not test.exception
        return test

    return run


def _tiles(test: AppTest) -> dict[str, str]:
    return {tile.label: tile.value for tile in test.metric}


def test_a_link_opens_its_study(app, store):
    test = app(store, "done")
    assert test.selectbox(key="study").value == "done"
    assert _tiles(test) == {
        "Best accuracy": "0.7700",  # of the complete ones; the pruned trial stood higher when it stopped
        "Running": "0",
        "Complete": "2",
        "Pruned": "1",
        "Infeasible": "0",
        "Failed": "1",
    }
    assert [tile.delta for tile in test.metric if tile.delta] == ["trial 1, ia3", "1 waiting", "1 diverged"]
    assert test.dataframe[0].value["number"].tolist() == [1, 0, 2, 3]
    assert "Without a value of accuracy: 1 diverged." in test.caption[0].value


def test_what_was_predicted_stands_beside_what_was_measured(app, empty_store, tmp_path):
    shutil.copy(empty_store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    tracking = open_tracking(*default_store(tmp_path))
    study = tracking.open_study("lean", {}, {"workbench.metric": "accuracy", "workbench.goal": "maximize"}, {})
    for number, (measured, outcome) in enumerate([(100.0, "complete"), (None, "infeasible")]):
        trial = study.open_trial(number, {}, {"workbench.label": "lora", "workbench.method": "lora"})
        trial.summary({f"predicted_peak_mib/{phase}": 102.0 for phase in ("load", "train", "eval")})
        if measured:
            trial.summary({"tensor_peak_mib/train": measured, "prediction_error_percent/train": 2.0})
            trial.summary({"predicted_pass_mib/train": 102.0, "predicted_mib/weights": 50.0})
            trial.log(1, {"validation.accuracy": 0.5})
        trial.end(outcome)
    study.end("FINISHED")
    test = app(default_store(tmp_path)[0], "lean")
    assert any("at most 2.0 % off the peak that was measured, in 1 trials" in caption.value for caption in test.caption)
    order = list(test.dataframe[0].proto.column_order)
    train = ["predicted_peak_mib/train", "tensor_peak_mib/train", "prediction_error_percent/train"]
    start = order.index("adapter_bytes") + 1 if "adapter_bytes" in order else 0
    assert [name for name in order[start:] if name in train] == train
    assert order.index(train[0]) < order.index("predicted_peak_mib/load") < order.index("predicted_peak_mib/eval")
    assert "predicted_mib/weights" in order
    assert "predicted_pass_mib/train" not in order, "nothing shared a pass"


def test_imported_results_are_said_to_be_of_the_test_split(app, empty_store, tmp_path):
    shutil.copy(empty_store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    tracking = open_tracking(*default_store(tmp_path))
    tags = {"workbench.metric": "accuracy", "workbench.goal": "maximize", "workbench.reference": "somewhere"}
    study = tracking.open_study("theirs", {}, tags, {})
    trial = study.open_trial(0, {}, {"workbench.label": "lora/rank4", "workbench.method": "lora"})
    trial.log(9, {"validation.accuracy": 0.6, "test.accuracy": 0.5, "peft_memory_max_mib/published": 300})
    trial.end("complete")
    study.end("FINISHED")
    test = app(default_store(tmp_path)[0], "theirs")
    assert _tiles(test)["Best test accuracy"] == "0.5000"
    assert "Imported from somewhere" in test.caption[0].value
    assert {"validation.accuracy", "peft_memory_max_mib/published"} <= set(test.dataframe[0].proto.column_order)


def test_the_newest_study_comes_first_and_another_can_be_chosen(app, store):
    test = app(store)
    assert test.selectbox(key="study").value == "young"
    assert test.query_params["study"] == "young"
    assert "not started" in test.info[0].value
    test.selectbox(key="study").select("done").run()
    assert test.query_params["study"] == "done"
    assert len(test.dataframe[0].value) == 4
    assert not test.exception


def test_a_link_to_an_unknown_study_says_so(app, store):
    test = app(store, "gone")
    assert "'gone'" in test.warning[0].value
    assert test.selectbox(key="study").value == "young"


def test_no_study_yet_says_what_to_type(app, empty_store):
    test = app(empty_store)
    assert test.info[0].value == "No study has been run yet."
    assert "workbench sweep studies/quickstart.yaml" in test.markdown[0].value


def test_a_missing_store_says_what_to_type_and_is_not_made(app, tmp_path):
    test = app(f"sqlite:///{tmp_path}/absent.db")
    assert "absent.db" in test.error[0].value
    assert "workbench sweep studies/quickstart.yaml" in test.markdown[0].value
    assert not (tmp_path / "absent.db").exists()


def test_an_unreadable_optuna_storage_leaves_the_rest(app, store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OPTUNA_URL", f"sqlite:///{tmp_path}/absent.db")
    test = app(store, "done")
    assert any("Waiting trials are not shown" in caption.value for caption in test.caption)
    assert len(test.dataframe[0].value) == 4


def test_best_first(store):
    trials = frames.trials(store, "done")
    assert frames.ranked(trials, "maximize")["number"].tolist() == [1, 0, 2, 3]
    assert frames.ranked(trials, "minimize")["number"].tolist() == [0, 1, 2, 3]
    assert frames.ranked(trials.iloc[:0], "maximize").empty


def _points(trials: pd.DataFrame, selected: list[str]) -> pd.DataFrame:
    spec = charts.scatter(trials, "accuracy", "maximize", selected).to_dict()
    (points,) = spec["datasets"].values()
    return pd.DataFrame(points).set_index("trial")


def test_scatter_draws_what_has_both_numbers_and_tells_outcomes_apart(store):
    trials = frames.trials(store, "done")
    points = _points(trials, [])
    assert points.index.tolist() == [0, 1, 2]
    assert points["shown"].all()
    assert points["fill"][0] > points["fill"][2]
    assert points["hyperparameters"].tolist() == [
        "r=8, learning_rate=0.001",
        "learning_rate=0.01",
        "r=16, learning_rate=0.0001",
    ]
    failed = _points(trials.assign(outcome="out_of_memory"), [])
    assert set(failed["look"]) == {"failed"}


def test_selected_trials_stand_out(store):
    trials = frames.trials(store, "done")
    assert _points(trials, [trials["run_id"][1]])["shown"].tolist() == [False, True, False]


def test_labels_keep_their_own_colour_and_shape():
    pairs = {(charts.COLOURS[i % len(charts.COLOURS)], charts.SHAPES[i % len(charts.SHAPES)]) for i in range(42)}
    assert len(pairs) == 42


def test_the_dashboard_is_served(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, variables = launch(store, None, port)
    server = subprocess.Popen(
        command,
        env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        health = None
        while health is None and server.poll() is None:
            try:
                health = urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=60).read()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        assert health == b"ok", server.communicate()[0]
    finally:
        server.terminate()
        server.communicate()


def test_passwords_stay_off_the_command_line():
    command, variables = launch("http://me:secret@mlflow:5000", "postgresql://me:secret@db/optuna", 8501)
    assert "--server.address=127.0.0.1" in command
    assert "--browser.gatherUsageStats=false" in command
    assert "secret" not in " ".join(command)
    assert variables["MLFLOW_TRACKING_URI"] == "http://me:secret@mlflow:5000"
    assert variables["WORKBENCH_OPTUNA_URL"] == "postgresql://me:secret@db/optuna"


def test_the_page_never_imports_torch(store):
    script = f"""
import sys
from streamlit.testing.v1 import AppTest
test = AppTest.from_file({APP!r}, default_timeout=120)
test.query_params["study"] = "done"
test.run()
assert not test.exception and len(test.dataframe[0].value) == 4
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "False False\n", done.stderr
