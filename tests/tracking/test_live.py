from __future__ import annotations

import pandas as pd
import pytest
from made_up import open_study, trial

from workbench.errors import StorageError
from workbench.tracking import frames, live, stored
from workbench.tracking.live import Snapshot


@pytest.fixture(params=["tables", "client"])
def way(request, monkeypatch):
    """A database is read directly, a server by MLflow's client."""
    if request.param == "client":
        monkeypatch.setattr(stored, "DATABASES", ())
    return request.param


@pytest.fixture
def read(monkeypatch):
    """How many runs each look has read."""
    counts = []

    def counted(*arguments):
        found = stored.children(*arguments)
        counts.append(len(found))
        return found

    monkeypatch.setattr(live, "children", counted)
    return counts


def same(snapshot, uri):
    """Look, and compare with what is there."""
    seen = snapshot.look()
    there = frames.trials(uri, "s")
    pd.testing.assert_frame_equal(
        seen.trials, there[list(seen.trials.columns)], check_dtype=False, check_column_type=False
    )
    assert set(seen.trials.columns) == set(there.columns)
    return seen


def test_a_look_shows_what_is_there(tracking, way):
    study = open_study(tracking)
    snapshot = Snapshot(tracking.uri, "s")
    assert snapshot.look().trials.empty
    trial(study, 0, value=0.8)
    assert same(snapshot, tracking.uri).trials["outcome"].tolist() == ["complete"]
    running = trial(study, 1, value=0.5, outcome="running")
    before = same(snapshot, tracking.uri)
    assert before.trials["outcome"].tolist() == ["complete", "running"]
    running.log(45, {"validation.accuracy": 0.6})
    running.flush()
    now = same(snapshot, tracking.uri)
    assert now.trials["objective"].tolist() == [0.8, 0.6]
    assert now.version == before.version, "only a running trial went on"
    running.end("interrupted", "stopped")
    assert same(snapshot, tracking.uri).version > now.version
    again = study.reopen_trial(running.run_id)
    assert same(snapshot, tracking.uri).trials["outcome"].tolist() == ["complete", "running"]
    again.end("complete")
    assert same(snapshot, tracking.uri).trials["message"].tolist() == ["", ""]


def test_a_trial_that_is_taken_up_again_or_promoted_or_deleted(tracking, way):
    study = open_study(tracking)
    runs = [trial(study, number, value=0.1 * number, outcome="pruned") for number in (1, 2, 3)]
    snapshot = Snapshot(tracking.uri, "s")
    first = same(snapshot, tracking.uri)
    trial(study, 4, value=0.9, resumes=2)
    assert same(snapshot, tracking.uri).trials["resumes"].tolist() == ["", "", "", "2"]
    tracking.run(runs[0].run_id).summary({"test.accuracy": 0.7})
    study.tag("workbench.test_readings", "[]")  # as `workbench promote` does
    assert same(snapshot, tracking.uri).trials["test.accuracy"].tolist()[0] == 0.7
    tracking.client.delete_run(runs[1].run_id)
    seen = same(snapshot, tracking.uri)
    assert seen.trials["number"].tolist() == [1, 3, 4]
    assert seen.version > first.version
    tracking.client.restore_run(runs[1].run_id)
    assert same(snapshot, tracking.uri).trials["number"].tolist() == [1, 2, 3, 4]
    trial(study, 1, value=0.4)  # begun anew: the run before is deleted
    assert same(snapshot, tracking.uri).trials["outcome"].tolist()[0] == "complete"


def test_a_store_that_was_made_anew(tracking, tmp_path, template):
    trial(open_study(tracking), 0, value=0.8)
    snapshot = Snapshot(tracking.uri, "s")
    assert len(snapshot.look().trials) == 1
    tracking.client.delete_experiment(tracking.client.get_experiment_by_name("s").experiment_id)
    with pytest.raises(StorageError):
        snapshot.look()


def test_a_refresh_reads_only_what_may_have_changed(tracking, way, read, monkeypatch):
    study = open_study(tracking)
    for number in range(5):
        trial(study, number, value=0.5)
    running = trial(study, 5, outcome="running")
    monkeypatch.setattr(live, "SLACK", -1)  # what ended later than all that is known
    snapshot = Snapshot(tracking.uri, "s")
    snapshot.look()
    seen = snapshot.look()
    trial(study, 6, value=0.7)
    snapshot.look()
    running.end("complete")
    snapshot.look()
    assert snapshot.look().trials["outcome"].tolist() == ["complete"] * 7
    assert read == [6, 1, 2, 1, 0]
    assert len(seen.trials) == 6


def test_nothing_new_is_the_same_object(tracking):
    trial(open_study(tracking), 0, value=0.5)
    snapshot = Snapshot(tracking.uri, "s")
    assert snapshot.look() is snapshot.look()


def test_both_ways_of_reading_agree(tracking, monkeypatch):
    study = open_study(tracking)
    trial(study, 0, value=0.5)
    trial(study, 1, outcome="diverged", message="the loss is nan")
    trial(study, 2, outcome="running")
    directly = frames.trials(tracking.uri, "s")
    monkeypatch.setattr(stored, "DATABASES", ())
    pd.testing.assert_frame_equal(frames.trials(tracking.uri, "s")[list(directly)], directly)
    assert directly["steps"].tolist()[0] == 30
