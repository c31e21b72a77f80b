"""The hyperparameters page: which of them mattered, and which values paid."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st

from workbench.errors import DataError, StorageError
from workbench.tracking import artifacts
from workbench.tracking import importance as ped_anova
from workbench.tracking.outcomes import tally
from workbench.tracking.searched import (
    NEAR_BEST,
    Field,
    Logs,
    fields,
    logarithmic,
    measured,
    paid,
    rank_by_scale,
    rates,
    searches,
)
from workbench.tracking.stats import Goal, Sensitivity

from . import address
from . import charts_hyperparameters as charts
from .shell import Chosen, on_study

ALL = "all methods"
COLUMNS = 3
KEPT = 600  # seconds that a study file is taken to be as it was; a study may be run again with another one
Key = tuple[str, str, int]
SHOWN = {"best": "best of the trials", "mean": "mean of the trials"}  # of a cell


def page() -> None:
    """Draw the page for the study that the address names."""
    on_study("Hyperparameters", _body)


def _body(chosen: Chosen) -> None:
    labels = sorted(chosen.trials["label"].unique())
    address.hold("method", [ALL, *labels], ALL)
    choice, said = st.columns([2, 5], vertical_alignment="bottom")
    method = choice.selectbox("Method", [ALL, *labels], key="method")
    address.put("method", None if method == ALL else method)
    own = chosen.trials if method == ALL else chosen.trials[chosen.trials["label"] == method]
    found = measured(own)
    said.caption(_counted(own, found))
    if found.empty:
        st.info("No trial of the search has been measured yet.", icon=":material/hourglass_top:")
        return
    logs = _logs(chosen)
    varied = fields(found, logs)
    if not varied:
        st.info(f"No hyperparameter varies among the trials of {method}.", icon=":material/tune:")
        return
    tables = _tables(own, logs, _goal(chosen), _key(chosen, own))
    _importance(chosen, found, logs)
    _slices(chosen, found, varied, labels, method)
    _rates(chosen, found, tables.rates, labels)
    _choices(chosen, tables.paid, labels)
    _rank_map(chosen, tables.cells)
    _parallel(chosen, found, varied)


def _goal(chosen: Chosen) -> Goal:
    return "maximize" if chosen.about["goal"] == "maximize" else "minimize"


def _counted(own: pd.DataFrame, found: pd.DataFrame) -> str:
    repeats = len(own) - len(searches(own))
    text = f"{len(found)} measured trials of the search"
    counts = tally(found["outcome"])
    text += f": {counts}." if counts else "."
    return text + (f" {repeats} more repeat what it found and are left out here." if repeats else "")


@st.cache_data(ttl=KEPT, max_entries=64, show_spinner=False)
def _study_file(uri: str, run_id: str) -> str:
    return (artifacts.fetch(uri, run_id, "study.yaml") or b"").decode(errors="replace")


def _logs(chosen: Chosen) -> Logs:
    """What was searched on a logarithmic scale; where the file cannot be had, the values themselves must tell."""
    try:
        return logarithmic(_study_file(chosen.uri, chosen.about["run_id"]))
    except StorageError:
        return set()


@dataclass(frozen=True)
class Tables:
    """What takes a while to find of many trials: see the functions of these names."""

    rates: dict[str, Sensitivity]
    paid: pd.DataFrame
    cells: pd.DataFrame


@st.cache_data(max_entries=64, show_spinner=False)
def _tables(_own: pd.DataFrame, _logs: Logs, goal: Goal, key: Key) -> Tables:
    """Kept by `key`, which says which trials these are."""
    return Tables(rates(_own, goal), paid(_own, _logs, goal), rank_by_scale(_own, _logs, goal))


def _key(chosen: Chosen, trials: pd.DataFrame) -> Key:
    """What is another one when a trial has ended."""
    return (
        chosen.uri,
        chosen.about["run_id"],
        int(pd.util.hash_pandas_object(trials["run_id"] + trials["outcome"]).sum()),
    )


# -------------------------------------------------------------------- importance


@st.cache_data(max_entries=64, show_spinner="Computing importances ...")
def _importances(_found: pd.DataFrame, _logs: Logs, goal: Goal, key: Key) -> ped_anova.Importance:
    """Kept by `key`, which says which trials these are."""
    return ped_anova.importance(_found, _logs, goal)


def _importance(chosen: Chosen, found: pd.DataFrame, logs: Logs) -> None:
    st.subheader("What mattered", anchor=False)
    try:
        result = _importances(found, logs, _goal(chosen), _key(chosen, found))
    except DataError as error:
        st.caption(f"Importance (PED-ANOVA): {error}")
        return
    clear = result.table.loc[result.table["importance"] > result.table["chance"], "field"].tolist()
    drawn, said = st.columns([3, 2], gap="large")
    drawn.altair_chart(charts.importances(result.table))
    said.markdown(
        f"**{', '.join(clear)}** {'stands' if len(clear) == 1 else 'stand'} out from chance."
        if clear
        else "**Nothing stands out from chance** among so few trials."
    )
    said.caption(
        f"PED-ANOVA: in what the best {result.best} of {result.trials} measured trials differ from all of them. The "
        f"tick is what shuffled results reach in one of 20 cases: a bar that ends before it (pale) may be chance. "
        "Pruned trials count as worse than complete ones."
    )


# -------------------------------------------------------------------- slices


def _slices(chosen: Chosen, found: pd.DataFrame, varied: list[Field], labels: list[str], method: str) -> None:
    st.subheader("One by one", anchor=False)
    if method == ALL:
        known = set().union(*(field.values.index for field in varied))
        st.altair_chart(charts.legend(sorted(found.loc[found.index.isin(known), "label"].unique()), labels))
    drawn = charts.thin(found, charts.POINTS)
    fewer = (
        f" {len(drawn):,} of {len(found):,} trials are drawn, the best among them." if len(drawn) < len(found) else ""
    )
    columns: list[st.delta_generator.DeltaGenerator] = []
    for place, field in enumerate(varied):
        if place % COLUMNS == 0:
            columns = st.columns(COLUMNS)
        columns[place % COLUMNS].altair_chart(charts.against(drawn, field, chosen.metric, labels))
    st.caption(f"Filled: complete. Hollow: pruned, with its last value.{fewer}")


# -------------------------------------------------------------------- learning rates


def _rates(chosen: Chosen, found: pd.DataFrame, curves: dict[str, Sensitivity], labels: list[str]) -> None:
    st.subheader("Sensitivity to the learning rate", anchor=False)
    if not curves:
        st.caption("It takes two complete trials with different learning rates; no method has them.")
        return
    drawn = charts.thin(found, charts.POINTS)
    table = pd.DataFrame(
        [
            (label, found.best, found.low, found.high, found.decades, len(found.rates))
            for label, found in curves.items()
        ],
        columns=["method", "best", "from", "to", "decades", "rates"],
    ).sort_values("decades", ascending=False)
    columns: list[st.delta_generator.DeltaGenerator] = []
    for place, (label, curve) in enumerate(curves.items()):
        if place % COLUMNS == 0:
            columns = st.columns(COLUMNS)
        columns[place % COLUMNS].altair_chart(charts.rates(drawn, label, curve, chosen.metric, labels))
    number = st.column_config.NumberColumn
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            "method": "method",
            "best": number("best rate", format="%.2g"),
            "from": number("near the best from", format="%.2g"),
            "to": number("to", format="%.2g"),
            "decades": number("decades", format="%.1f"),
            "rates": number("rates tried", help="different rates of complete trials"),
        },
    )
    st.caption(
        f"Line: complete trials, smoothed from ten rates on. Shaded: rates within {NEAR_BEST:.0%} of the best value of "
        "the line; many decades mean easy to tune. Other hyperparameters vary along."
    )


# -------------------------------------------------------------------- choices


def _choices(chosen: Chosen, table: pd.DataFrame, labels: list[str]) -> None:
    st.subheader("Which choices paid", anchor=False)
    if table.empty:
        st.caption("No method chose between modules, tokens or other words (target_modules, token_indices ...).")
        return
    if table["mean"].notna().any():
        st.altair_chart(charts.choices(table, chosen.metric, labels))
    number = st.column_config.NumberColumn
    st.dataframe(
        table.assign(
            link=[
                address.link("trial", study=chosen.name, trial=int(n)) if pd.notna(n) else None for n in table["trial"]
            ]
        ),
        hide_index=True,
        placeholder="",
        column_order=["label", "field", "value", "tried", "complete", "mean", "low", "high", "best", "link"],
        column_config={
            "label": "method",
            "field": "hyperparameter",
            "tried": number("trials"),
            "mean": number("mean", format="%.4f"),
            "low": number("from", format="%.4f", help="95 % interval of the mean"),
            "high": number("to", format="%.4f"),
            "best": number("best", format="%.4f"),
            "link": st.column_config.LinkColumn("best trial", display_text=r"trial=(\d+)"),
        },
    )
    st.caption(
        "Filled: mean of the complete trials with its 95 % interval (cut off where it leaves the chart). Hollow: the "
        "best of them. A choice whose trials were all pruned has no mean. Other hyperparameters vary along."
    )


# -------------------------------------------------------------------- rank and alpha


@st.fragment  # so that its widget draws nothing else anew
def _rank_map(chosen: Chosen, cells: pd.DataFrame) -> None:
    st.subheader("Rank and alpha", anchor=False)
    if cells.empty:
        st.caption("No method searched both its rank and its alpha.")
        return
    address.hold("cells", list(SHOWN), "best")
    shown = st.segmented_control(
        "Cells show",
        list(SHOWN),
        key="cells",
        format_func=SHOWN.__getitem__,
        label_visibility="collapsed",
        required=True,
    )
    shown = shown or "best"
    address.put("cells", None if shown == "best" else shown)
    labels = cells["label"].unique().tolist()
    columns: list[st.delta_generator.DeltaGenerator] = []
    for place, label in enumerate(labels):
        if place % COLUMNS == 0:
            columns = st.columns(COLUMNS)
        chart = charts.rank_map(cells[cells["label"] == label], shown, chosen.metric, _goal(chosen))
        columns[place % COLUMNS].altair_chart(chart)
    st.caption(
        f"{chosen.about['metric']} of complete trials, and how many of those tried were complete. Dashed: none was. "
        "Bright is good; colours are of each map alone."
    )


# -------------------------------------------------------------------- all together


def _parallel(chosen: Chosen, found: pd.DataFrame, varied: list[Field]) -> None:
    st.subheader("All together", anchor=False)
    most = max(len(field.values) for field in varied)
    common = [field for field in varied if len(field.values) >= 0.9 * most]
    if found["label"].nunique() > 1:
        common = [Field("method", found["label"].astype("str"), False, False), *common]
    size = found["trainable_params"].dropna().astype("float64")
    if size.nunique() > 1 and len(size) >= 0.9 * most:
        common.append(Field("trainable", size, True, True))
    whole = found[found.index.isin(set(found.index).intersection(*(field.values.index for field in common)))]
    if len(whole) < 2:
        st.caption("It takes two measured trials with the same hyperparameters.")
        return
    st.altair_chart(charts.parallel(whole, common, chosen.metric, chosen.about["goal"]))
    drawn = min(len(whole), charts.LINES)
    missing = len(found) - len(whole)
    parts = [f"{drawn} of {len(whole)} trials, the best among them" if drawn < len(whole) else f"{drawn} trials"]
    if missing:
        parts.append(f"{missing} that lack one of these are left out")
    st.caption(f"{'; '.join(parts)}. Blue: the best. Point at a line to follow it.")
