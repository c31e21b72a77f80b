from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from filled import TAGS, write_trial

from dashboards import charts, columns
from workbench.tracking import frames
from workbench.tracking.comparison import compare
from workbench.tracking.stats import front


def _tiles(test) -> dict[str, str]:
    return {tile.label: tile.value for tile in test.metric}


def _captions(test) -> str:
    return " ".join(caption.value for caption in test.caption)


def test_a_study_at_a_glance(app, store):
    test = app(store, "compare", study="done")
    assert test.selectbox(key="study").value == "done"
    assert _tiles(test) == {
        "Best validation accuracy": "0.7700",
        "Running": "0",
        "Complete": "2",
        "Pruned": "1",
        "Infeasible": "0",
        "Failed": "1",
    }
    assert [tile.delta for tile in test.metric if tile.delta] == ["trial 1, ia3", "1 diverged"]
    assert test.dataframe[-1].value["number"].tolist() == [1, 0, 2, 3]
    assert "Without a value of validation accuracy: 1 diverged." in _captions(test)


def test_the_leaderboard_has_the_numbers_of_the_command(app, store):
    board = app(store, "compare", study="done").dataframe[0].value
    rows = compare(store, "done").rows
    assert board["name"].tolist() == [row.name for row in rows] == ["ia3", "lora"]
    assert board["value"].tolist() == [row.value for row in rows]


def test_the_newest_study_comes_first_and_another_can_be_chosen(app, store):
    test = app(store, "compare", sel="2")
    assert test.selectbox(key="study").value == "young"
    assert test.query_params["study"] == "young"
    assert "not started" in test.info[0].value
    test.selectbox(key="study").select("done").run()
    assert test.query_params["study"] == "done"
    assert "sel" not in test.query_params, "what was selected was of the other study"
    assert len(test.dataframe[-1].value) == 4
    assert not test.exception


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        ({"method": "ia3"}, [1]),
        ({"method": ["ia3", "lora"]}, [1, 0, 2, 3]),
        ({"outcome": "diverged"}, [3]),
        ({"max_parameters": "24000"}, [1, 0, 3]),
        ({"max_parameters": "24000", "method": "lora", "outcome": "complete"}, [0]),
    ],
)
def test_filters_of_the_address(app, store, asked, numbers):
    test = app(store, "compare", study="done", **asked)
    assert test.dataframe[-1].value["number"].tolist() == numbers
    for key, value in asked.items():
        assert test.query_params[key] == value


def test_a_filter_goes_into_the_address(app, store):
    test = app(store, "compare", study="done")
    test.multiselect(key="method").select("lora").run()
    assert test.query_params["method"] == "lora"
    test.number_input(key="max_parameters").set_value(24000).run()
    assert test.query_params["max_parameters"] == "24000"
    assert test.dataframe[-1].value["number"].tolist() == [0, 3]
    assert test.dataframe[0].value["name"].tolist() == ["lora"]
    test.multiselect(key="method").set_value([]).run()
    assert "method" not in test.query_params
    assert not test.exception


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "gone"),
        ("outcome", "gone"),
        ("max_parameters", "many"),
        ("cost", "gone"),
        ("sel", "99"),
        ("sel", "x"),
    ],
)
def test_what_is_not_there_gives_a_warning_and_the_default(app, store, key, value):
    test = app(store, "compare", study="done", **{key: value})
    assert len(test.warning) == 1
    assert len(test.dataframe[-1].value) == 4
    assert key not in test.query_params


def test_filters_that_nothing_passes(app, store):
    test = app(store, "compare", study="done", max_parameters="1")
    assert "No trial passes the filters." in [info.value for info in test.info]


def test_selected_trials_are_said(app, store):
    test = app(store, "compare", study="done", sel="0,3")
    assert test.query_params["sel"] == "0,3"
    test.button[0].click().run()
    assert "sel" not in test.query_params
    assert not test.exception


def test_what_was_predicted_stands_beside_what_was_measured(app, tracking):
    study = tracking.open_study("lean", {}, TAGS, {})
    for number, (measured, outcome) in enumerate([(100.0, "complete"), (None, "infeasible")]):
        trial = study.open_trial(number, {}, {"workbench.label": "lora", "workbench.method": "lora"})
        trial.summary({f"predicted_peak_mib/{phase}": 102.0 for phase in ("load", "train", "eval")})
        if measured:
            trial.summary({"tensor_peak_mib/train": measured, "prediction_error_percent/train": 2.0})
            trial.summary({"predicted_pass_mib/train": 102.0, "predicted_mib/weights": 50.0})
            trial.log(1, {"validation.accuracy": 0.5})
        trial.end(outcome)
    study.end("FINISHED")
    test = app(tracking.uri, "compare")
    assert "at most 2.0 % off the peak that was measured, in 1 trials" in _captions(test)
    order = list(test.dataframe[-1].proto.column_order)
    train = ["predicted_peak_mib/train", "tensor_peak_mib/train", "prediction_error_percent/train"]
    assert [name for name in order if name in train] == train
    assert order.index(train[-1]) < order.index("predicted_peak_mib/load") < order.index("predicted_peak_mib/eval")
    assert "predicted_mib/weights" in order
    assert "predicted_pass_mib/train" not in order, "nothing shared a pass"


def test_imported_results_are_said_to_be_of_the_test_split(app, tracking):
    study = tracking.open_study("theirs", {}, TAGS | {"workbench.reference": "somewhere"}, {})
    trial = study.open_trial(0, {}, {"workbench.label": "lora/rank4", "workbench.method": "lora"})
    trial.log(9, {"validation.accuracy": 0.6, "test.accuracy": 0.5, "peft_memory_max_mib/published": 300})
    trial.end("complete")
    study.end("FINISHED")
    test = app(tracking.uri, "compare")
    assert _tiles(test)["Best test accuracy"] == "0.5000"
    assert "Imported from somewhere" in _captions(test)
    assert {"validation.accuracy", "peft_memory_max_mib/published"} <= set(test.dataframe[-1].proto.column_order)
    assert test.dataframe[0].value["value"].tolist() == [0.5]


def test_a_study_without_a_complete_trial(app, tracking):
    write_trial(tracking.open_study("s", {}, TAGS, {}), 0, "lora", "running", 100, None, {})
    test = app(tracking.uri, "compare")
    assert "No method has a complete trial yet." in _captions(test)
    assert _tiles(test)["Best validation accuracy"] == "none"


# -------------------------------------------------------------------- charts


def test_the_chart_has_what_has_both_numbers_and_tells_outcomes_apart(store):
    trials = frames.trials(store, "done")
    points, _ = charts.pareto_points(trials, "trainable_params", "maximize", [])
    points = points.set_index("trial").sort_index()
    assert points.index.tolist() == [0, 1, 2]
    assert points["fill"][0] > points["fill"][2]
    assert points["hyperparameters"].tolist() == [
        "r=8, learning_rate=0.001",
        "learning_rate=0.01",
        "r=16, learning_rate=0.0001",
    ]
    failed, _ = charts.pareto_points(trials.assign(outcome="out_of_memory"), "trainable_params", "maximize", [])
    assert set(failed["look"]) == {"failed"}
    assert charts.pareto_points(trials, "absent", "maximize", [])[0].empty


def test_the_front_stands_out_until_something_is_selected(store):
    trials = frames.trials(store, "done")
    points, line = charts.pareto_points(trials, "trainable_params", "maximize", [])
    assert points.loc[points["front"], "trial"].tolist() == [1]  # the pruned trial is no part of it
    assert line.values.tolist() == [[4600, 0.77]]
    assert points.set_index("trial")["opacity"].to_dict() == {1: charts.ON, 0: charts.OFF, 2: charts.OFF}
    points, _ = charts.pareto_points(trials, "trainable_params", "maximize", [2])
    assert points.set_index("trial")["opacity"].to_dict() == {2: charts.ON, 0: charts.OFF, 1: charts.OFF}


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_the_front_is_that_of_the_statistics(goal):
    random = np.random.default_rng(0)
    points = pd.DataFrame(random.integers(0, 12, (200, 2)), columns=["cost", "objective"]).astype(float)
    known = front(points.to_numpy(), [True, goal == "minimize"])
    assert sorted(charts.on_front(points, goal)) == np.flatnonzero(known).tolist()


def test_labels_keep_their_own_colour_and_shape():
    labels = [f"method {i}" for i in range(42)]
    colours, shapes = charts.label_scale(labels)
    assert len(set(zip(colours.to_dict()["range"], shapes.to_dict()["range"], strict=True))) == 42
    assert charts.label_scale(labels[::-1])[0].to_dict() == colours.to_dict()


def test_a_table_of_many_rows_has_fewer_columns(store):
    trials = frames.trials(store, "done")
    few = columns.of_trials(pd.concat([trials] * 1000), "accuracy")
    assert "validation.loss" in columns.of_trials(trials, "accuracy")
    assert "validation.loss" not in few
    assert {"number", "objective", "hp.r", "seconds/total"} <= set(few)


def test_best_first(store):
    trials = frames.trials(store, "done")
    assert frames.ranked(trials, "maximize")["number"].tolist() == [1, 0, 2, 3]
    assert frames.ranked(trials, "minimize")["number"].tolist() == [0, 1, 2, 3]
    assert frames.ranked(trials.iloc[:0], "maximize").empty
