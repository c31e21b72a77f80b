from __future__ import annotations

import json
import time

import optuna
import pandas as pd
import pytest
from optuna.storages import RDBStorage

from workbench.errors import StorageError
from workbench.tracking.progress import progress
from workbench.tracking.workers import seconds_spent, workers


def _trials(*rows):
    """Rows of label, role, outcome, steps."""
    table = pd.DataFrame(rows, columns=["label", "role", "outcome", "steps"])
    return table.assign(resumes="")


SIX = _trials(
    ("lora", "search", "complete", 100),
    ("lora", "search", "pruned", 50),
    ("ia3", "search", "running", 10),
    ("ia3", "search", "duplicate", 0),
    ("lora", "finalist", "complete", 100),
    ("lora", "finalist", "running", 100),
)


@pytest.mark.parametrize(
    ("tags", "seconds", "share", "words"),
    [
        ({}, 0, None, "2 trials"),
        ({"budget": {"trials": 8}}, 0, 2 / 8, "2 of 8 trials"),
        ({"budget": {"trials": 8, "steps": 200}}, 0, 160 / 200, "2 of 8 trials"),
        ({"budget": {"minutes": 2}}, 30, 30 / 120, "2 trials"),
        ({"per_method": {"trials": 3}}, 0, 2 / 6, "2 of 6 trials"),
        ({"per_method": {"trials": 3}, "budget": {"methods": 3}}, 0, 2 / 9, "2 of 9 trials"),
        (
            {"budget": {"trials": 4}, "finalists": {"per_method": 1, "initialisations": 2, "orders": 1}},
            0,
            (2 + 1) / (4 + 4),
            "2 of 4 trials, 1 of 4 finalists",
        ),
        ({"budget": {"trials": 1}}, 0, 1, "2 of 1 trials"),
    ],
)
def test_progress(tags, seconds, share, words):
    known = {f"workbench.{key}": json.dumps(value) for key, value in tags.items()}
    found = progress(SIX, known, seconds)
    assert found.words == words
    assert found.share == (None if share is None else pytest.approx(share))


def test_workers(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage = RDBStorage(url, heartbeat_interval=60)
    study = optuna.create_study(study_name="s", storage=storage)
    assert workers(url, "s").empty
    for name in ("host-b", "host-a", ""):
        trial = study.ask()
        trial.set_user_attr("worker", name)
        if name:
            storage.record_heartbeat(trial._trial_id)
        if name == "host-a":
            trial.set_user_attr("progress", {"step": 50})
    study.tell(study.ask(), 0.5)
    study.set_user_attr("seconds", 12.5)
    time.sleep(1.1)
    found = workers(url, "s")
    assert found["worker"].tolist() == ["", "host-a", "host-b"]
    assert found["trial"].tolist() == [2, 1, 0]
    assert found["step"].tolist() == [0, 50, 0]
    assert pd.isna(found["silent"][0])
    assert (found["silent"][1:] >= 1).all()
    assert (found["silent"][1:] < 600).all(), "seconds, by one clock and in one zone of time"
    assert seconds_spent(url, "s") == 12.5


def test_workers_of_a_storage_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="no "):
        workers(f"sqlite:///{tmp_path}/absent.db", "s")
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.create_study(study_name="s", storage=url)
    with pytest.raises(StorageError, match="holds no study 'other'"):
        workers(url, "other")
