"""The best of each method, trained again on seeds that did not choose it, and the one look at the test split."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from command import workbench
from pyarrow.parquet import read_table

from workbench.sweep.finalists import APART, chosen, expected, missing
from workbench.sweep.promote import READINGS
from workbench.sweep.roles import About
from workbench.sweep.spec import load_study
from workbench.training import data

METHODS = """
lora:
  r: {values: [2, 4]}
  target_modules: [query, value]
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
ia3:
  target_modules: [key, value]
  feedforward_modules: []
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
zero_shot:
"""
MORE = """search: {sampler: random, pruner: none}
finalists: {per_method: 1, initialisations: 2, orders: 2}
"""


@pytest.fixture(scope="module")
def swept(new_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study with a test split, its finalists trained."""
    lab = new_lab(tmp_path_factory.mktemp("finalists"))
    lab.data = shutil.copytree(lab.data, lab.folder / "data")
    shutil.copy(lab.data / "validation.csv", lab.data / "test.csv")
    lab.write(METHODS, "{per_method: {trials: 3}}", more=MORE)
    done = lab.sweep("--workers", "2")
    assert done.code == 0, done.err
    assert "trial 5 on seeds" in done.out or "on seeds 10000 and 10001" in done.out
    return lab


def finalists(lab: Any, label: str = "") -> list[Any]:
    runs = [run for run in lab.trials if run.data.tags["workbench.role"] == "finalist"]
    return [run for run in runs if label in ("", run.data.tags["workbench.label"])]


def test_the_best_of_each_method_is_trained_on_every_pair_of_seeds(swept: Any) -> None:
    for label in ("lora", "ia3"):
        searched = [
            run
            for run in swept.trials
            if run.data.tags["workbench.label"] == label and run.data.tags["workbench.role"] != "finalist"
        ]
        best = max(searched, key=lambda run: run.data.metrics["validation.accuracy"])
        again = finalists(swept, label)
        assert {run.data.tags["workbench.finalist_of"] for run in again} == {best.data.tags["workbench.trial"]}
        assert {run.data.tags["workbench.config"] for run in again} == {best.data.tags["workbench.config"]}
        seeds = [(run.data.tags["workbench.init_seed"], run.data.tags["workbench.order_seed"]) for run in again]
        assert sorted(seeds) == [(str(APART + i), str(APART + j)) for i in (0, 1) for j in (0, 1)]
        assert len({run.data.metrics["validation.loss"] for run in again}) == 4, "each pair gives something else"
    (only,) = finalists(swept, "zero_shot")  # no seed changes what it does
    assert only.data.metrics["trainable_params"] == 0


def test_predictions_are_kept(swept: Any) -> None:
    for run in finalists(swept):
        file = swept.client.download_artifacts(run.info.run_id, "predictions/validation.parquet")
        table = read_table(file).to_pandas()
        assert len(table) == 50
        assert table["score.accuracy"].mean() == pytest.approx(run.data.metrics["validation.accuracy"])
        assert (table["actual"] == table["predicted"]).mean() == pytest.approx(run.data.metrics["validation.accuracy"])
        assert table["loss"].mean() == pytest.approx(run.data.metrics["validation.loss"])


def test_the_study_is_finished_and_a_larger_one_goes_on(swept: Any, tmp_path: Path) -> None:
    assert "is finished" in swept.sweep().out
    study = load_study(swept.file)
    trials = swept.study.get_trials()
    assert not list(missing(study, trials))
    more = study.finalists.model_copy(update={"per_method": 2})  # type: ignore[union-attr]
    larger = study.model_copy(update={"finalists": more})
    assert len(list(missing(larger, trials))) == 8
    assert [About.of_trial(trial).role for trial in chosen(study, trials)].count("finalist") == 0


def test_a_finalist_can_be_reproduced(swept: Any) -> None:
    number = finalists(swept, "lora")[3].data.tags["workbench.trial"]
    done = workbench("reproduce", swept.name, "--trial", number, "--home", swept.home, "--tolerance", "1e-6")
    assert done.code == 0, done.err
    assert "the same within 1e-06" in done.out


def test_killed_between_finalists(new_lab: Any, tmp_path: Path) -> None:
    """What is missing is trained, nothing twice. Where the worker was is not known, so that its silence tells."""
    lab = new_lab(tmp_path)
    lab.write(METHODS, "{per_method: {trials: 1}}", more=MORE.replace("initialisations: 2", "initialisations: 1"))
    assert lab.sweep("--workers", "1", "--heartbeat", "1").code == 0
    study = lab.study
    last = study.get_trials()[-1]
    study._storage.remove_session()
    with sqlite3.connect(lab.home / "optuna.db") as store:
        store.execute("UPDATE trials SET state = 'RUNNING' WHERE trial_id = ?", (last._trial_id,))
    assert lab.sweep("--workers", "1", "--heartbeat", "1").code == 0
    roles = [About.of_trial(trial).role for trial in lab.study.get_trials()]
    assert roles.count("finalist") == 5
    assert len(lab.trials) == len(roles)


# ---------------------------------------------------------------- the test split


def test_promotion_reads_the_test_split_once(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert swept.parent.data.tags["workbench.test_rows"] == "50"
    assert not any("test." in name for run in swept.trials for name in run.data.metrics)
    done = workbench("promote", swept.name, "--home", swept.home)
    assert done.code == 0, done.err
    assert "9 trials of tiny were measured on the test split" in done.out
    for run in finalists(swept):
        metrics = run.data.metrics
        assert metrics["test.accuracy"] == metrics["validation.accuracy"], "here the splits are the same"
        assert metrics["test.loss"] == pytest.approx(metrics["validation.loss"], rel=1e-4)
        file = swept.client.download_artifacts(run.info.run_id, "predictions/test.parquet")
        assert read_table(file).num_rows == 50
    (reading,) = json.loads(swept.parent.data.tags[READINGS])
    assert reading["ended"]
    assert reading["trials"] == [int(run.data.tags["workbench.trial"]) for run in finalists(swept)]

    again = workbench("promote", swept.name, "--home", swept.home)
    assert again.code == 2
    assert "was read on" in again.err
    assert "--again" in again.err
    assert workbench("promote", swept.name, "--home", swept.home, "--again", "a referee asked").code == 0
    readings = json.loads(swept.parent.data.tags[READINGS])
    assert [reading["reason"] for reading in readings] == ["", "a referee asked"]
    shown = workbench("compare", swept.name, "--home", swept.home)
    assert shown.code == 0, shown.err
    assert "read 2 times" in " ".join(shown.out.split())


def test_a_reading_that_was_cut_off_is_finished(new_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab(tmp_path)
    lab.data = shutil.copytree(lab.data, lab.folder / "data")
    shutil.copy(lab.data / "validation.csv", lab.data / "test.csv")
    assert lab.write(budget="{trials: 2}").sweep().code == 0
    monkeypatch.setattr("workbench.sweep.promote.predicted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert workbench("promote", lab.name, "--home", lab.home).code != 0
    (reading,) = json.loads(lab.parent.data.tags[READINGS])
    assert not reading["ended"], "it counts, whatever came of it"
    monkeypatch.undo()
    assert workbench("promote", lab.name, "--home", lab.home).code == 0
    (reading,) = json.loads(lab.parent.data.tags[READINGS])
    assert reading["ended"]
    assert len(reading["trials"]) == 1, "without finalists, the best of each method"


def test_no_sweep_opens_the_vault(new_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = new_lab(tmp_path)
    lab.data = shutil.copytree(lab.data, lab.folder / "data")
    shutil.copy(lab.data / "validation.csv", lab.data / "test.csv")
    opened: list[str] = []
    encoded = data.encoded
    monkeypatch.setattr(data, "encoded", lambda raw, name, *rest: opened.append(name) or encoded(raw, name, *rest))
    assert lab.write(METHODS, "{per_method: {trials: 1}}", more=MORE).sweep("--workers", "1").code == 0
    assert set(opened) == {"train", "validation"}


def test_without_a_test_split_there_is_nothing_to_promote(lab: Any) -> None:
    assert lab.write(budget="{trials: 1}").sweep().code == 0
    done = workbench("promote", lab.name, "--home", lab.home)
    assert done.code == 2
    assert "has no test split" in done.err
    assert "no test split" in workbench("compare", lab.name, "--home", lab.home).out


@pytest.mark.parametrize(
    ("budget", "more", "trials"),
    [
        ("{per_method: {trials: 5}}", MORE, 5 + 4 + 5 + 4 + 1 + 1),
        ("{per_method: {trials: 5}}", "", 5 + 5 + 1),
        ("{trials: 6}", "", 6),
        ("{trials: 6, per_method: {trials: 5}}", "", 2 + 2 + 1),
        ("{steps: 100}", MORE, None),
    ],
)
def test_how_many_trials_there_will_be(lab: Any, budget: str, more: str, trials: int | None) -> None:
    lab.write(METHODS, budget, more=more)
    found = expected(load_study(lab.file))
    assert (found and round(sum(found.values()))) == trials


def test_the_plan_counts_finalists(swept: Any) -> None:
    done = workbench("plan", swept.file, "--home", swept.home)
    assert done.code == 0, done.err
    assert "for 16 trials" in done.out
    assert len(swept.study.get_trials()) == 3 + 4 + 3 + 4 + 1 + 1 == 16
