"""A trial trained again from what MLflow holds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Done, workbench

from workbench.tracking.recorded import PARAMS, recorded
from workbench.tracking.runs import default_store

METHODS = """
lora:
  r: {values: [2, 4]}
  lora_dropout: 0.1
  target_modules: {values: [[query], [query, value]]}
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
tokens:
  method: trainable_tokens
  token_indices: {values: [{most_frequent: 8}, {new_tokens: [flurb]}]}
"""


@pytest.fixture(scope="module")
def swept(new_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    lab = new_lab(tmp_path_factory.mktemp("swept"))
    lab.data = shutil.copytree(lab.data, lab.folder / "data")  # a copy, which a test may change
    lab.write(METHODS, "{trials: 5}", "data_order: own", "search: {sampler: random, pruner: none, seed: 3}\n")
    assert lab.sweep("--workers", "2").code == 0
    return lab


def again(lab: Any, number: int, *words: object) -> Done:
    return workbench("reproduce", lab.name, "--trial", number, "--home", lab.home, *words)


def test_every_trial_comes_to_the_same(swept: Any) -> None:
    before = len(swept.runs)
    labels = set()
    for run in swept.trials:
        done = again(swept, int(run.data.tags["workbench.trial"]), "--tolerance", "1e-6")
        assert (done.code, done.err) == (0, "")
        assert "the same within 1e-06" in done.out
        assert f"{run.data.metrics['validation.loss']:.6f}" in done.out
        labels.add(run.data.tags["workbench.label"])
    assert labels == {"lora", "tokens"}
    assert len(swept.runs) == before, "nothing is recorded"


def test_the_file_as_it_was_counts(swept: Any) -> None:
    text = swept.file.read_text()
    swept.file.write_text("methods: none any more\n")
    try:
        assert again(swept, 0).code == 0
    finally:
        swept.file.write_text(text)


def test_metrics_that_are_off(swept: Any) -> None:
    run = swept.trials[0]
    swept.client.log_metric(run.info.run_id, "validation.accuracy", 2.0, step=10)
    done = again(swept, 0)
    assert done.code == 1
    assert "accuracy differ by more than 0.001" in done.out
    assert again(swept, 0, "--tolerance", "10").code == 0


def test_other_data_are_refused(swept: Any) -> None:
    file = swept.data / "train.csv"
    text = file.read_text()
    file.write_text("".join(text.splitlines(keepends=True)[:-1]))
    try:
        done = again(swept, 1)
    finally:
        file.write_text(text)
    assert (done.code, done.out) == (2, "")
    assert "The data changed since the study ran" in done.err


def test_a_pruned_trial_is_trained_as_far_as_it_came(lab: Any) -> None:
    lab.write(budget="{trials: 4}", more="search: {sampler: random, pruner: successive_halving, in_flight: 4}\n")
    assert lab.sweep("--workers", "1").code == 0
    pruned = next(run for run in lab.trials if run.data.tags["workbench.outcome"] == "pruned")
    done = again(lab, int(pruned.data.tags["workbench.trial"]), "--tolerance", "1e-6")
    assert done.code == 0
    assert "step 5" in done.out


def test_what_cannot_be_trained_again(swept: Any, lab: Any) -> None:
    done = again(swept, 99)
    assert (done.code, done.out) == (2, "")
    assert "has no trial 99; it has 5" in done.err
    assert "holds no study 'absent'" in workbench("reproduce", "absent", "--trial", 0, "--home", swept.home).err
    lab.write("lora: {r: 600, init_lora_weights: pissa}", "{trials: 1}")
    assert lab.sweep().code == 1
    assert "was never measured: it is infeasible" in again(lab, 0).err


def test_a_record_without_parameters(swept: Any) -> None:
    run = swept.trials[1]
    swept.client.delete_tag(run.info.run_id, PARAMS)
    done = again(swept, 1)
    assert done.code == 2
    assert "recorded without its parameters" in done.err


def test_what_is_recorded(swept: Any) -> None:
    known = recorded(default_store(swept.home)[0], swept.name, 2)
    assert Path(known.study.file).is_absolute()
    assert known.study.text == swept.file.read_text()
    assert (known.seeds, known.step) == ((0, 3), 10)
    assert known.metrics.keys() == {"loss", "accuracy", "f1", "mcc"}
    assert known.configuration.params == swept.study.get_trials()[2].params
