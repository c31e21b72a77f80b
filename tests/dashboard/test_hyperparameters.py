from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboards import charts_hyperparameters as charts
from workbench.tracking.searched import Field

Open = Callable[..., AppTest]
HEADINGS = [
    "What mattered",
    "One by one",
    "Sensitivity to the learning rate",
    "Which choices paid",
    "Rank and alpha",
    "All together",
]


@pytest.fixture
def opened(app: Callable[..., AppTest], rich_store: str) -> Open:
    """Open the page at an address, of a store of one's own if one is named."""
    return lambda store=rich_store, **address: app(store, "hyperparameters", **({"study": "rich"} | address))


def _said(test: AppTest) -> str:
    return "\n".join(element.value for element in [*test.caption, *test.markdown, *test.info, *test.warning])


def _charts(test: AppTest, field: str) -> list[str]:
    """Specifications of the charts that draw a field."""
    specs = [element.proto.spec for element in test.get("vega_lite_chart")]
    return [spec for spec in specs if f'"field": "{field}"' in spec]


def test_every_section_has_something_to_show(opened):
    test = opened()
    assert [heading.value for heading in test.subheader] == HEADINGS
    assert len(_charts(test, "chance")) == 1
    assert len(_charts(test, "value")) == 4, "one for each hyperparameter"
    assert len(_charts(test, "rate")) == 1, "head has one rate only"
    assert len(_charts(test, "shown_low")) == 1
    assert len(_charts(test, "better")) == 1
    assert len(_charts(test, "place")) == 1
    assert "28 measured trials of the search: 27 complete, 1 pruned" in _said(test)


def test_the_rate_that_the_metric_hangs_on_stands_out(opened):
    test = opened(method="lora")
    assert "**learning_rate**" in _said(test)
    assert "the best 5 of 27" in _said(test)


def test_rates_were_searched_on_a_logarithmic_scale(opened):
    logarithmic = {
        name: '"type": "log"' in spec
        for spec in _charts(opened(method="lora"), "value")
        for name in ("learning_rate", "lora_alpha", "target_modules")
        if f'"title": "{name}"' in spec
    }
    assert logarithmic == {"learning_rate": True, "lora_alpha": False, "target_modules": False}


def test_a_method_in_the_address_is_chosen_and_has_too_few_trials(opened):
    test = opened(method="head")
    assert test.selectbox(key="method").value == "head"
    assert "No hyperparameter varies among the trials of head." in test.info[0].value
    test.selectbox(key="method").select("lora").run()
    assert test.query_params["method"] == "lora"
    test.selectbox(key="method").select("all methods").run()
    assert "method" not in test.query_params
    assert not test.exception


def test_an_unknown_method_is_said(opened):
    test = opened(method="gone")
    assert "gone" in test.warning[0].value
    assert test.selectbox(key="method").value == "all methods"


def test_too_few_trials_are_said(opened, store):
    test = opened(store, study="done")
    said = _said(test)
    assert "It takes at least 20 measured trials of the search; there are 3." in said
    assert "It takes two complete trials with different learning rates" in said
    assert "No method chose between modules, tokens or other words" in said
    assert "No method searched both its rank and its alpha." in said


def test_a_study_without_trials_and_one_without_hyperparameters(opened, store):
    assert "not started" in _said(opened(store, study="young"))
    assert "No hyperparameter varies" in _said(opened(study="theirs"))


def test_choices_link_to_their_best_trial(opened):
    test = opened(method="lora")
    table = next(table.value for table in test.dataframe if "field" in table.value.columns)
    assert table["value"].tolist() == table.sort_values("mean", ascending=False)["value"].tolist()
    assert set(table["value"]) == {"query", "all-linear"}
    best = table.iloc[0]
    assert best["link"] == f"trial?study=rich&trial={best['trial']}"


def test_the_map_shows_the_best_or_the_mean(opened):
    test = opened(method="lora", cells="mean")
    assert test.query_params["cells"] == "mean"
    assert test.get("button_group")[0].value == "mean"


# -------------------------------------------------------------------- charts


def _trials(count: int) -> pd.DataFrame:
    columns = {"number": range(count), "label": "lora", "outcome": "complete", "hp.r": 4.0}
    return pd.DataFrame(columns | {"objective": [1 - n / count for n in range(count)]})


def test_of_many_trials_the_best_are_drawn_and_some_of_the_others():
    drawn = charts.thin(_trials(10_000), 100)["number"].tolist()
    assert drawn[:50] == list(range(50))
    assert len(set(drawn)) == 100
    assert drawn[-1] == 9_999
    assert charts.thin(_trials(100), 100)["number"].tolist() == list(range(100))


def test_the_best_line_is_drawn_last():
    trials = _trials(10)
    spec = charts.parallel(trials, [Field("r", pd.Series(range(1, 11)), True, True)], "accuracy", "maximize").to_dict()
    (lines,) = [rows for rows in spec["datasets"].values() if "place" in rows[0]]
    assert [lines[0]["trial"], lines[-1]["trial"]] == [9, 0]
    assert {line["height"] for line in lines if line["trial"] == 0} == {0.0, 1.0}


def test_intervals_end_within_the_chart():
    row = {"label": "lora", "field": "target_modules", "tried": 3, "complete": 3, "best": 0.6}
    table = pd.DataFrame(
        [
            row | {"value": "a", "mean": 0.5, "low": -5.0, "high": 6.0},
            row | {"value": "b", "mean": 0.55, "low": 0.54, "high": 0.56},
        ]
    )
    spec = charts.choices(table, "accuracy", ["lora"]).to_dict()
    (rows,) = spec["datasets"].values()
    assert [rows[0]["shown_low"], rows[0]["shown_high"]] == pytest.approx([0.48, 0.62])
    assert [rows[1]["shown_low"], rows[1]["shown_high"]] == [0.54, 0.56]


@pytest.mark.parametrize(
    ("value", "text"), [(8_635_404, "8.64M"), (4_620, "4.62k"), (512, "512"), (0.00031, "0.00031"), (2e9, "2G")]
)
def test_numbers_on_an_axis_are_brief(value, text):
    assert charts._brief(value) == text
