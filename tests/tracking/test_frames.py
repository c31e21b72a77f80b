from __future__ import annotations

import shutil
from pathlib import Path

import optuna
import pandas as pd
import pytest

from workbench.errors import StorageError
from workbench.tracking import frames, stored


@pytest.fixture
def study(tracking):
    tags = {"workbench.metric": "accuracy", "workbench.goal": "maximize", "workbench.file": "s.yaml"}
    return tracking.open_study("s", {}, tags, {})


def _trial(study, number, params, label="lora", outcome="complete", accuracy=None):
    trial = study.open_trial(number, params, {"workbench.label": label, "workbench.method": "lora"})
    trial.summary({"trainable_params": 100 * (number + 1), "all_params": 10_000, "seconds/train": 1.5})
    if accuracy is not None:
        trial.log(50, {"validation.accuracy": accuracy / 2})
        trial.log(100, {"validation.accuracy": accuracy})
    if outcome != "running":
        trial.end(outcome, "why" if outcome == "diverged" else "")
    else:
        trial.flush()
    return trial


def test_trials(tracking, study):
    _trial(study, 1, {"lora.r": 8, "lora.learning_rate": 1e-3, "lora.target_modules": "all-linear"}, accuracy=0.8)
    _trial(study, 0, {"lora.r": 16, "lora.learning_rate": 2e-3, "lora.target_modules": "4"}, outcome="diverged")
    last = _trial(study, 2, {"wide.lora.r": 4}, label="wide.lora", outcome="running", accuracy=0.6)
    table = frames.trials(tracking.uri, "s")
    assert table["number"].tolist() == [0, 1, 2]
    assert table["outcome"].tolist() == ["diverged", "complete", "running"]
    assert table["message"].tolist() == ["why", "", ""]
    assert table["objective"].tolist()[1:] == [0.8, 0.6]  # the last evaluation, not the first
    assert pd.isna(table["objective"][0])
    assert table["hp.r"].tolist() == [16, 8, 4]
    assert table["hp.learning_rate"].dtype == "float64"
    assert table["hp.target_modules"].tolist()[:2] == ["4", "all-linear"]  # one word keeps the column text
    assert table["trainable_params"].tolist() == [100, 200, 300]
    assert table["trainable_params"].dtype == "Int64"
    assert table["adapter_bytes"].isna().all()
    assert table["seconds/train"].tolist() == [1.5] * 3
    assert table["run_id"][2] == last.run_id
    assert str(table["started"].dt.tz) == "UTC"


def test_all_pages_are_read(tracking, study, monkeypatch):
    for number in range(5):
        _trial(study, number, {"lora.r": number})
    monkeypatch.setattr(stored, "PAGE", 2)
    monkeypatch.setattr(stored, "DATABASES", ())  # as if it was a server
    assert frames.trials(tracking.uri, "s")["hp.r"].tolist() == list(range(5))


def test_trials_of_other_studies_are_left_out(tracking, study):
    _trial(study, 0, {})
    _trial(tracking.open_study("other", {}, {}, {}), 7, {})
    assert frames.trials(tracking.uri, "s")["number"].tolist() == [0]


def test_a_study_without_trials(tracking, study):
    table = frames.trials(tracking.uri, "s")
    assert table.empty
    assert list(table.columns) == frames.TRIAL_COLUMNS


def test_studies_newest_first(tracking, study):
    tracking.open_study("t", {}, {"workbench.goal": "minimize"}, {}).end("FINISHED")
    table = frames.studies(tracking.uri)
    assert list(table.columns) == frames.STUDY_COLUMNS
    assert table["study"].tolist() == ["t", "s"]
    assert table["status"].tolist() == ["FINISHED", "RUNNING"]
    assert table.loc[1, ["metric", "goal", "file", "optuna"]].tolist() == ["accuracy", "maximize", "s.yaml", ""]


def test_a_store_without_studies(tracking):
    assert frames.studies(tracking.uri).empty


def test_history(tracking, study):
    trial = _trial(study, 0, {}, accuracy=0.8)
    table = frames.history(tracking.uri, trial.run_id)
    accuracy = table[table["metric"] == "validation.accuracy"]
    assert accuracy[["step", "value"]].values.tolist() == [[50, 0.4], [100, 0.8]]
    assert set(table["metric"]) == {"validation.accuracy", "trainable_params", "all_params", "seconds/train"}


def test_what_is_not_there_is_a_storage_error(tracking, tmp_path):
    with pytest.raises(StorageError, match="no study 'absent'"):
        frames.trials(tracking.uri, "absent")
    with pytest.raises(StorageError):
        frames.history(tracking.uri, "0" * 32)
    for read in (frames.studies, lambda uri: frames.trials(uri, "s"), lambda uri: frames.optuna_state(uri, "s")):
        with pytest.raises(StorageError):
            read(f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_optuna_state(tmp_path: Path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(study_name="s", storage=url)
    shutil.copy(tmp_path / "optuna.db", tmp_path / "fresh.db")
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), state=optuna.trial.TrialState.PRUNED)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    running = study.ask()
    study.enqueue_trial({})
    expected = {"running": 1, "waiting": 1, "complete": 1, "pruned": 1, "fail": 1}
    assert frames.optuna_state(url, "s") == expected
    study.tell(running, 2.0)
    assert frames.optuna_state(url, "s") == expected | {"running": 0, "complete": 2}
    with pytest.raises(StorageError, match="no study 'absent'"):
        frames.optuna_state(url, "absent")
    (tmp_path / "fresh.db").replace(tmp_path / "optuna.db")  # a store deleted and made anew under an open dashboard
    assert frames.optuna_state(url, "s") == dict.fromkeys(expected, 0)
