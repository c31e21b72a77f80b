from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request

import optuna
import pytest
from filled import ROOT, TAGS, TRIALS, served, write_trial
from optuna.storages import RDBStorage
from streamlit.testing.v1 import AppTest

from dashboards import charts, launch
from workbench.tracking import frames

APP = str(ROOT / "dashboards" / "app.py")


def _words(test: AppTest) -> str:
    return " ".join(element.value for kind in (test.caption, test.info, test.subheader) for element in kind)


def test_every_study_is_a_row(app, store):
    test = app(store)
    table = test.dataframe[0].value.set_index("study")
    assert table.index.tolist() == ["young", "done"]
    done = table.loc["done"]
    assert done["state"] == "finished"
    assert done["trials"] == "4 trials"
    assert done["best"] == 0.77  # of the complete ones; the pruned trial stood higher when it stopped
    assert done["by"] == "ia3, trial 1"
    assert done["ended"] == "2 complete, 1 pruned, 1 diverged"
    assert table.loc["young", "best"] is None or table.loc["young"].isna()["best"]
    assert test.query_params["study"] == "young"
    assert "not started" in test.info[0].value


def test_a_link_opens_its_study(app, store):
    test = app(store, study="done")
    assert test.query_params["study"] == "done"
    assert [heading.value for heading in test.subheader][:2] == ["done", "How its trials ended"]
    failed = test.dataframe[-1].value
    assert failed[["outcome", "trials", "message", "which"]].values.tolist() == [
        ["diverged", 1, "the loss is nan", "3"]
    ]


def test_a_link_to_an_unknown_study_says_so(app, store):
    test = app(store, study="gone")
    assert "'gone'" in test.warning[0].value
    assert test.query_params["study"] == "young"


def test_progress_and_workers_of_a_study_that_runs(app, tracking, tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage = RDBStorage(url, heartbeat_interval=60)
    search = optuna.create_study(study_name="s", storage=storage)
    tags = TAGS | {"workbench.budget": json.dumps({"trials": 8}), "workbench.optuna": url}
    study = tracking.open_study("s", {}, tags, {})
    for number, trial in enumerate(TRIALS[:2]):
        write_trial(study, number, *trial)
        search.tell(search.ask(), 0.5)
    for name in ("host-a", ""):
        trial = search.ask()
        trial.set_user_attr("worker", name)
        storage.record_heartbeat(trial._trial_id)
        write_trial(study, trial.number, "lora", "running", 100, None, {})
    search.enqueue_trial({})
    test = app(tracking.uri)
    row = test.dataframe[0].value.iloc[0]
    assert (row["state"], row["progress"], row["trials"]) == ("running", 25, "2 of 8 trials")
    assert "1 live worker with 1 trial, 1 waiting, 1 left by workers that died or were stopped." in _words(test)
    assert test.dataframe[1].value[["worker", "trial", "method"]].values.tolist() == [
        ["nobody", 3, "lora"],
        ["host-a", 2, "lora"],
    ]


def test_a_study_whose_workers_are_gone_says_what_to_type(app, tracking, tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="s", storage=url)
    study = tracking.open_study("s", {}, TAGS | {"workbench.optuna": url, "workbench.file": "mine.yaml"}, {})
    write_trial(study, 0, *TRIALS[0])
    assert "workbench sweep mine.yaml" in app(tracking.uri).info[0].value


def test_an_unreadable_optuna_storage_leaves_the_rest(app, tracking, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_OPTUNA_URL", f"sqlite:///{tmp_path}/absent.db")
    write_trial(tracking.open_study("s", {}, TAGS, {}), 0, *TRIALS[0])
    test = app(tracking.uri)
    assert "Workers are not shown. There is no" in _words(test)
    assert len(test.dataframe[0].value) == 1


def test_imported_results_are_said_to_be_so(app, tracking):
    study = tracking.open_study("theirs", {}, TAGS | {"workbench.reference": "somewhere"}, {})
    write_trial(study, 0, *TRIALS[0])
    study.end("FINISHED")
    test = app(tracking.uri)
    assert "Imported from somewhere" in _words(test)
    assert test.dataframe[0].value["state"].tolist() == ["imported"]
    assert test.dataframe[0].value["metric"].tolist() == ["test accuracy"]


@pytest.mark.parametrize("page", ["studies", "compare"])
def test_no_study_yet_says_what_to_type(app, empty_store, page):
    test = app(empty_store, page)
    assert test.info[0].value == "No study has been run yet."
    assert "workbench sweep studies/quickstart.yaml" in test.markdown[0].value


@pytest.mark.parametrize("page", ["studies", "compare"])
def test_a_missing_store_says_what_to_type_and_is_not_made(app, tmp_path, page):
    test = app(f"sqlite:///{tmp_path}/absent.db", page)
    assert "absent.db" in test.error[0].value
    assert "workbench sweep studies/quickstart.yaml" in test.markdown[0].value
    assert not (tmp_path / "absent.db").exists()


def test_outcomes_are_counted(store):
    bars = charts.outcomes(frames.trials(store, "done")).to_dict()
    (data,) = bars["datasets"].values()
    assert [(row["outcome"], row["trials"]) for row in data] == [("complete", 2), ("pruned", 1), ("diverged", 1)]


def test_the_best_over_time_only_gets_better(store):
    trials = frames.trials(store, "done")
    drawn = charts.best_over_time(trials, "accuracy", "minimize").to_dict()
    best = [row["best"] for data in drawn["datasets"].values() for row in data if row.get("number") is not None]
    assert best == [0.71]


# -------------------------------------------------------------------- the app


def test_the_dashboard_is_served(store):
    with served(store) as url, urllib.request.urlopen(url) as page:
        assert b"Streamlit" in page.read()


def test_passwords_stay_off_the_command_line():
    command, variables = launch("http://me:secret@mlflow:5000", "postgresql://me:secret@db/optuna", 8501)
    assert "--server.address=127.0.0.1" in command
    assert "--browser.gatherUsageStats=false" in command
    assert "secret" not in " ".join(command)
    assert variables["MLFLOW_TRACKING_URI"] == "http://me:secret@mlflow:5000"
    assert variables["WORKBENCH_OPTUNA_URL"] == "postgresql://me:secret@db/optuna"


def test_the_app_never_imports_torch(store):
    script = f"""
import sys
from streamlit.testing.v1 import AppTest
test = AppTest.from_file({APP!r}, default_timeout=120)
test.query_params["study"] = "done"
test.run()
assert not test.exception and len(test.dataframe[0].value) == 2
import dashboards.compare
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "False False\n", done.stderr
