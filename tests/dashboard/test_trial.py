from __future__ import annotations

from collections.abc import Callable

import pytest
import rich_study as rich
from streamlit.testing.v1 import AppTest

from dashboards import commands
from workbench.tracking import frames
from workbench.tracking.runs import default_store

Open = Callable[..., AppTest]


@pytest.fixture
def opened(app: Callable[..., AppTest], rich_store: str) -> Open:
    """Open the page at an address."""
    return lambda **address: app(rich_store, "trial", **({"study": "rich"} | address))


def _said(test: AppTest) -> str:
    return "\n".join(
        element.value for element in [*test.caption, *test.markdown, *test.error, *test.info, *test.warning]
    )


def _table(test: AppTest, *columns: str):
    """The first table with these columns."""
    return next(table.value for table in test.dataframe if set(columns) <= set(table.value.columns))


def _charts(test: AppTest) -> list[str]:
    """Specifications of the charts."""
    return [element.proto.spec for element in test.get("vega_lite_chart")]


def test_a_link_opens_its_trial(opened):
    test = opened(trial="3")
    assert test.selectbox(key="trial").value == 3
    tiles = {tile.label: tile.value for tile in test.metric}
    assert tiles["Adapter file"] == "4 KiB"
    assert tiles["Time"] == "3.0 s"
    assert ":green-badge[complete] **lora**" in _said(test)
    assert "`r = " in _said(test)
    assert "seeds 0 (initialisation), 0 (order)" in _said(test)


def test_the_best_trial_comes_first_and_another_can_be_chosen(opened, rich_store):
    best = frames.ranked(frames.trials(rich_store, "rich"), "maximize")["number"].iloc[0]
    test = opened()
    assert test.selectbox(key="trial").value == best
    test.selectbox(key="trial").select(rich.PRUNED).run()
    assert not test.exception
    assert test.query_params["trial"] == str(rich.PRUNED)


def test_a_trial_that_is_not_there_is_said(opened):
    test = opened(trial="999", against="nobody")
    assert "999" in test.warning[0].value
    assert "nobody" in test.warning[1].value
    assert test.selectbox(key="against").value == ""


def test_curves_have_rungs_and_the_other_trials(opened):
    test = opened(trial="3")
    specs = [spec for spec in _charts(test) if '"step"' in spec]
    assert len(specs) == 2
    assert [spec.count('"median"') > 0 for spec in specs] == [False, True], "others reported their loss"
    assert "median and middle half of the other trials" in _said(test)
    assert "may be pruned (30, 60)" in _said(test)


def test_without_optuna_there_are_no_others(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_OPTUNA_URL", f"sqlite:///{tmp_path}/absent.db")
    test = opened(trial="3")
    assert "What the other trials had come to is not shown" in _said(test)


def test_a_pruned_trial_has_a_cross_and_can_be_taken_up_again(opened):
    test = opened(trial=str(rich.PRUNED))
    assert "Cross: pruned here." in _said(test)
    assert [spec.count('"cross"') for spec in _charts(test)] == [1, 1]
    assert f"--resume-trial {rich.PRUNED}" in test.code[-1].value
    assert "There is no adapter: the trial is pruned." in _said(test)
    assert f"No predictions were kept: trial {rich.PRUNED} is pruned." in _said(test)


def test_a_crash_shows_its_message_and_traceback(opened):
    test = opened(trial=str(rich.CRASHED))
    assert test.error[0].value == "it broke"
    assert "ValueError: broken" in test.code[0].value
    assert "Nothing was measured step by step: the trial is crashed." in _said(test)
    assert "nothing to train again or to export: the trial is crashed" in _said(test)


def test_a_message_is_no_markdown():
    from dashboards.trial import _plain

    assert _plain("a_b *c* [d](e) $1 `f` :g: 64 of 32") == r"a\_b \*c\* \[d\](e) \$1 \`f\` \:g\: 64 of 32"


def test_a_trial_that_runs_downloads_nothing(opened, monkeypatch):
    def refuse(*_):
        raise AssertionError("an artifact was fetched")

    monkeypatch.setattr("dashboards.trial.artifacts.fetch", refuse)
    test = opened(trial=str(rich.RUNNING))
    assert "The adapter is kept when the trial has ended." in _said(test)
    assert "Predictions are kept when the trial has ended." in _said(test)
    assert len(_charts(test)) == 2


def test_an_infeasible_trial_says_why(opened):
    test = opened(trial=str(rich.INFEASIBLE))
    assert test.error[0].value == "64 of 32 parameters"
    assert {tile.label: tile.value for tile in test.metric}["Trainable"] == "none"
    assert "Neither was measured or predicted" not in _said(test), "loading is the study's, and known"


def test_phases_stand_side_by_side(opened):
    table = _table(opened(trial="3"), "phase")
    assert table["phase"].tolist() == ["load", "train"]
    assert table["seconds"].tolist() == [0.5, 2.0]
    assert table["predicted"].tolist()[1] == 81.0


def test_layers_and_their_shapes(opened):
    table = _table(opened(trial="3"), "tensors")
    assert table["kind"].tolist() == ["attention.self.query", "classifier"]
    assert table["layers"].tolist() == ["0-1", ""]
    assert table["parameters"].tolist() == [512, 32]


def test_a_damaged_adapter_leaves_the_rest(opened):
    test = opened(trial=str(rich.TEXTS))
    assert "adapter_model.safetensors cannot be read" in _said(test)
    assert "40 examples, the highest loss first" in _said(test)


def test_a_file_that_is_too_large_is_said(opened, monkeypatch):
    from dashboards import trial

    trial._modules.clear()
    monkeypatch.setattr("workbench.tracking.artifacts.fetch.__defaults__", (1e-6,))
    assert "only files of at most 1e-06 MiB are fetched" in _said(opened(trial="5"))


def test_examples_wrong_only_or_all_of_them(opened):
    test = opened(trial="3")
    assert "3 of 40 examples are wrong" in _said(test)
    assert "rows of the validation split of assets/reviews, counted from 0" in _said(test)
    assert _table(test, "row", "wrong")["row"].tolist() == [2, 1, 0]
    test.toggle(key="wrong").set_value(False).run()
    assert len(_table(test, "row", "wrong")) == 40
    assert test.query_params["wrong"] == "False"
    assert len(_table(opened(trial="3", wrong="False"), "row", "wrong")) == 40


def test_two_trials_side_by_side(opened):
    test = opened(trial="3", against="7")
    told = _table(test, "what", "one")
    assert "learning_rate" in told["what"].tolist()
    assert "label" not in told["what"].tolist()
    changed = _table(test, "became")
    assert changed["row"].tolist() == [6, 5, 4, 3]
    assert set(changed["became"]) == {"wrong"}
    assert "4 of 40 examples" in _said(test)
    names = [spec for spec in _charts(test) if "trial 7" in spec]
    assert len(names) == 2, "both trials are in each curve"


def test_a_trial_without_predictions_beside_one_that_has_them(opened):
    test = opened(trial="3", against=str(rich.BARE))
    assert f"No predictions were kept: trial {rich.BARE} is complete." in _said(test)


def test_imported_results_have_no_commands(opened):
    test = opened(study="theirs")
    said = _said(test)
    assert "Imported results have nothing to train again or to export." in said
    assert "Nothing was measured step by step" in said
    assert "Neither was measured or predicted" in said
    assert not test.code


def test_the_command_that_reproduces_a_trial(opened, rich_store):
    test = opened(trial="3")
    home = rich_store.removeprefix("sqlite:///").removesuffix("/mlflow.db")
    assert test.code[0].value == f"workbench reproduce rich --trial 3 --home {home}"
    assert test.code[1].value == f"workbench export rich --trial 3 --format peft exported/rich-3 --home {home}"


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        (default_store("runs")[0], []),
        ("sqlite:////a/b/mlflow.db", ["--home", "/a/b"]),
        ("sqlite:////a/b/other.db", ["--tracking-uri", "sqlite:////a/b/other.db"]),
        ("http://me:secret@mlflow:5000", ["--tracking-uri", "http://me:***@mlflow:5000"]),
    ],
)
def test_commands_find_the_store_and_name_no_password(uri, options):
    assert commands.store_options(uri) == options
