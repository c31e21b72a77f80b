"""The page of registered models, on versions that hold next to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filled import TAGS, write_trial

from dashboards import registry as page
from workbench.errors import StorageError
from workbench.tracking import registry


@pytest.fixture
def filled(tracking: Any, tmp_path: Path) -> str:
    """A model with two versions, the first one the champion, and one with a single version."""
    study = tracking.open_study("done", {}, TAGS, {})
    for number, (rate, accuracy) in enumerate([(0.001, 0.71), (0.01, 0.77)]):
        write_trial(study, number, "lora", "complete", 24_000, accuracy, {"r": 8, "learning_rate": rate})
    folder = tmp_path / "version"
    (folder / registry.VERSION).mkdir(parents=True)
    (folder / registry.VERSION / "recipe.json").write_text("{}")
    runs = tracking.client.search_runs([tracking.client.get_experiment_by_name("done").experiment_id])
    by_trial = {run.data.tags.get("workbench.trial"): run.info.run_id for run in runs}
    for model, trial, rate, accuracy in (("best", 0, 0.001, 0.71), ("best", 1, 0.01, 0.77), ("other", 1, 0.01, 0.77)):
        facts = {
            "study": "done",
            "trial": str(trial),
            "label": "lora",
            "method": "lora",
            "base": "models/tiny",
            "metric": "accuracy",
            "metrics": json.dumps({"validation": {"accuracy": [accuracy, accuracy - 0.02, accuracy + 0.02]}}),
            "hyperparameters": json.dumps({"r": 8, "learning_rate": rate}),
            "trainable_params": "24000",
            "adapter_bytes": "99000",
            "parity": "50 of 50 rows of validation are predicted as the trial did",
        }
        if trial:
            facts["contest"] = "test accuracy +0.0600 [+0.0100, +0.1100] against version 1, p = 0.02"
        registry.publish(tracking.client, by_trial[str(trial)], model, folder, facts, f"# {model}")
    registry.set_alias(tracking.uri, "best", "champion", "1")
    return tracking.uri


def tables(test: Any) -> list[Any]:
    return [element.value for element in test.dataframe]


def test_what_is_registered_is_read_back(filled: str, tmp_path: Path):
    models = registry.versions(filled)
    assert [*models] == ["best", "other"]
    table = registry.table([version for found in models.values() for version in found])
    assert table[["name", "version", "study", "value", "split"]].values.tolist() == [
        ["best", 2, "done", 0.77, "validation"],
        ["best", 1, "done", 0.71, "validation"],
        ["other", 1, "done", 0.77, "validation"],
    ]
    assert table["aliases"].tolist() == [[], ["champion"], []]
    found = registry.find(filled, "models:/best@champion")
    assert found == registry.find(filled, "models:/best/1")
    assert (registry.fetch(filled, found, tmp_path / "here") / "recipe.json").read_text() == "{}"
    for uri, message in {
        "models:/best/7": r"has no best/7; it has 2, 1@champion",
        "models:/none/1": "no registered model 'none'",
        "best": "write models:/NAME@ALIAS",
    }.items():
        with pytest.raises(StorageError, match=message):
            registry.find(filled, uri)


def test_the_newest_version_against_the_champion(app: Any, filled: str):
    test = app(filled, "registry")
    versions, measured, settings = tables(test)
    assert versions["version"].tolist() == [2, 1]
    assert versions["interval"].tolist() == ["0.7500 to 0.7900", "0.6900 to 0.7300"]
    assert measured.values.tolist() == [["validation accuracy", 0.71, 0.77, pytest.approx(0.06)]]
    assert settings.values.tolist() == [["trial", "0", "1"], ["learning_rate", "0.001", "0.01"]]
    words = " ".join(element.value for element in test.caption)
    assert "When it was registered: test accuracy +0.0600" in words
    assert "50 of 50 rows" in words
    (predict, serve) = (element.value for element in test.code)
    assert predict.startswith("workbench predict models:/best/2 --input rows.csv --home ")
    assert serve.endswith("mlflow models serve -m models:/best/2 --env-manager local")
    assert test.query_params["model"] == "best"
    assert test.query_params["version"] == "2"


def test_the_address_says_which(app: Any, filled: str):
    test = app(filled, "registry", model="best", version="1")
    assert test.code[0].value.startswith("workbench predict models:/best@champion --input")
    assert tables(test)[1].values.tolist() == [["validation accuracy", 0.77, 0.71, pytest.approx(-0.06)]]
    test = app(filled, "registry", model="other")
    assert "This is the only version." in [element.value for element in test.caption]
    test = app(filled, "registry", model="nobody")
    assert "model = 'nobody', which is not there" in test.warning[0].value


def test_promotion_asks_first(app: Any, filled: str):
    test = app(filled, "registry")
    (ask,) = [button for button in test.button if "point at version 2" in button.label]
    ask.click().run()
    assert "`models:/best@champion` will be version 2. It points at version 1 now." in test.warning[0].value
    assert registry.find(filled, "models:/best@champion").number == "1"
    next(button for button in test.button if button.label == "Cancel").click().run()
    assert not test.warning
    next(button for button in test.button if "point at version 2" in button.label).click().run()
    next(button for button in test.button if button.label == "Yes, promote it").click().run()
    assert not test.exception
    assert test.success[0].value == "models:/best@champion is version 2 now."
    assert registry.find(filled, "models:/best@champion").number == "2"
    assert "`@champion` points at version 2 already." in [element.value for element in test.caption]


def test_nothing_and_no_store(app: Any, store: str, tmp_path: Path):
    test = app(store, "registry")
    assert test.info[0].value == "No model has been registered yet."
    assert "workbench register STUDY --name NAME --alias champion" in test.markdown[0].value
    test = app(f"sqlite:///{tmp_path}/none.db", "registry")
    assert "There is no" in test.error[0].value


def test_settings_that_only_one_version_has():
    one = registry.Version("best", "1", (), {"hyperparameters": '{"r": 8}', "labels": "[]"}, "", 0)
    other = registry.Version("best", "2", (), {"hyperparameters": '{"learning_rate": 0.1}', "labels": "[]"}, "", 0)
    assert page.settings(one, other) == [("r", "8", ""), ("learning_rate", "", "0.1")]
    assert page.metrics(one, other) == []
