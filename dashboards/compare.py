"""The page on which a study's methods and trials are compared."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from workbench.errors import WorkbenchError
from workbench.tracking import compare_formats
from workbench.tracking.comparison import Comparison, Row, compare
from workbench.tracking.leaderboard import MEMORY
from workbench.tracking.outcomes import spelt, tally

from . import address, charts, columns, shell

MOST = 200  # trials that can be selected at once, since the address names them all
CHART, TABLE = "compare-chart", "compare-table"  # keys of the session: what was seen of either, see `_Selection`
BOARD = "compare-board"  # the comparison that was shown last, with its study


@dataclass(frozen=True)
class Cost:
    """What something costs: its column in the tables, how it is called, and its attribute of a comparison's row."""

    column: str
    words: str
    attribute: str


def page() -> None:
    """Draw the page."""
    shell.on_study("Compare", _body)


def _body(chosen: shell.Chosen) -> None:
    if chosen.about["reference"]:
        st.caption(f"Imported from {chosen.about['reference']}: as published, one run each, on the test split.")
    _tiles(chosen)
    costs = _costs(chosen.trials)
    methods, limits, trials = _filtered(chosen, costs)
    board = st.container()
    _trials(chosen, trials, costs)
    with board:
        _leaderboard(chosen, methods, limits, costs)


def _costs(trials: pd.DataFrame) -> dict[str, Cost]:
    """What there is to hold the metric against, by its name in the address."""
    memory = next((key for key in MEMORY if key in trials), "")
    known = {
        "parameters": Cost("trainable_params", "trainable parameters", "trainable_params"),
        "memory": Cost(memory, f"memory ({MEMORY.get(memory, '')})", "memory"),
        "time": Cost("seconds/total", "seconds of training and evaluation", "seconds"),
        "size": Cost("adapter_bytes", "bytes of the adapter's file", "adapter_bytes"),
    }
    there = {name: cost for name, cost in known.items() if cost.column in trials and (trials[cost.column] > 0).any()}
    return there or {"parameters": known["parameters"]}


# -------------------------------------------------------------------- at a glance


def _tiles(chosen: shell.Chosen) -> None:
    trials = chosen.trials
    counts = trials["outcome"].value_counts()
    failed = trials.loc[~trials["outcome"].isin(["complete", "pruned", "running", "infeasible"]), "outcome"]
    first = trials[(trials["rank"] == 1) & trials["objective"].notna()]
    tiles = st.columns([2, 1, 1, 1, 1, 2])
    tiles[0].metric(
        f"Best {chosen.metric}",
        "none" if first.empty else f"{first['objective'].iloc[0]:.4f}",
        "no complete trial yet" if first.empty else f"trial {first['number'].iloc[0]}, {first['label'].iloc[0]}",
        delta_color="off",
        delta_arrow="off",
        border=True,
    )
    for tile, heading, count, note in (
        (tiles[1], "Running", counts.get("running", 0), None),
        (tiles[2], "Complete", counts.get("complete", 0), None),
        (tiles[3], "Pruned", counts.get("pruned", 0), None),
        (tiles[4], "Infeasible", counts.get("infeasible", 0), None),
        (tiles[5], "Failed", len(failed), tally(failed) or None),
    ):
        tile.metric(
            heading, f"{int(count):,}", note, delta_color="off", delta_arrow="off", border=True, height="stretch"
        )


# -------------------------------------------------------------------- filters


def _filtered(chosen: shell.Chosen, costs: dict[str, Cost]) -> tuple[list[str], dict[str, float], pd.DataFrame]:
    """Draw the filters; the methods and the limits that are asked for (none: all), and the trials that are left."""
    trials = chosen.trials
    labels, found = sorted(trials["label"].unique()), list(trials["outcome"].value_counts().index)
    left, middle, right = st.columns([4, 3, 1], vertical_alignment="bottom")
    address.hold("method", labels, [], many=True)
    methods = left.multiselect("Methods", labels, key="method", placeholder="all methods")
    address.put("method", methods)
    address.hold("outcome", found, [], many=True)
    outcomes = middle.multiselect("Outcomes", found, key="outcome", format_func=spelt, placeholder="all outcomes")
    address.put("outcome", outcomes)
    limits = {}
    with right.popover("Limits", icon=":material/filter_alt:", width="stretch"):
        for name, cost in costs.items():
            key = f"max_{name}"
            address.hold(key, None, None, kind=float)
            limit = st.number_input(f"At most, {cost.words}", min_value=0.0, key=key, format="%g", placeholder="any")
            address.put(key, None if limit is None else f"{limit:g}")
            if limit is not None:
                limits[name] = limit
    kept = pd.Series(True, index=trials.index)
    if methods:
        kept &= trials["label"].isin(methods)
    if outcomes:
        kept &= trials["outcome"].isin(outcomes)
    for name, limit in limits.items():
        kept &= (trials[costs[name].column] <= limit).fillna(False)
    if limits:
        said = ", ".join(f"{costs[name].words} at most {limit:,g}" for name, limit in limits.items())
        st.caption(f"Limits: {said}. Trials of which that is not known are left out.")
    return methods, limits, trials[kept].reset_index(drop=True)


# -------------------------------------------------------------------- leaderboard


@st.cache_resource
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@st.cache_resource(max_entries=20, show_spinner=False)
def _begun(uri: str, study: str, version: int, _trials: pd.DataFrame) -> Future[Comparison]:
    """The comparison of a study's ended trials, which takes seconds: intervals and ties are computed from the scores of
    every example."""
    return _pool().submit(compare, uri, study, None, _trials.sort_values("number", ignore_index=True))


def _compared(chosen: shell.Chosen) -> Comparison | None:
    """The comparison; while the study runs the one before, until there is a new one."""
    future = _begun(chosen.uri, chosen.name, chosen.version, chosen.trials)
    study, before = st.session_state.get(BOARD, ("", None))
    if chosen.live and not future.done() and study == chosen.name:
        return before
    with st.spinner("Comparing the methods ..."):
        try:
            found = future.result()
        except WorkbenchError as error:
            _begun.clear(chosen.uri, chosen.name, chosen.version, chosen.trials)
            st.error(str(error), icon=":material/leaderboard:")
            return None
    st.session_state[BOARD] = chosen.name, found
    return found


def _leaderboard(
    chosen: shell.Chosen, methods: Sequence[str], limits: dict[str, float], costs: dict[str, Cost]
) -> None:
    found = _compared(chosen)
    if found is None:
        return
    rows = [
        row
        for row in found.rows
        if (not methods or row.label in methods)
        and all(getattr(row, costs[name].attribute) <= limit for name, limit in limits.items())
    ]
    st.subheader("Leaderboard", anchor=False)
    if not rows:
        st.caption("No method has a complete trial yet." if not found.rows else "No method passes the filters.")
        return
    better = "higher" if found.goal == "maximize" else "lower"
    size = f", {found.examples:,} examples" if found.examples else ""
    st.caption(f"{found.metric} on the {found.split} split{size} ({better} is better), as `workbench compare` has it.")
    board = pd.DataFrame([_board_row(row) for row in rows])
    judged = board["low"].notna().any()
    table, chart = st.columns([3, 2]) if judged else (st.container(), None)
    with table:
        headings = columns.of_board(found)
        st.dataframe(
            board.dropna(axis="columns", how="all"),
            hide_index=True,
            column_order=list(headings),
            column_config=headings,
            placeholder="",
            height=min(38 + 35 * len(board), 400),
            key="leaderboard",
            alt="The methods, best first",
        )
        if clicked := st.session_state.get("board-open"):
            shell.go("trial", study=chosen.name, trial=str(rows[clicked["row"]].trial))
    if chart is not None:
        chart.altair_chart(charts.intervals(board, f"{found.split} {found.metric}", chosen.trials["label"].unique()))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "CSV with every digit",
            lambda: compare_formats.comma_separated([found]),
            f"{chosen.name}.csv",
            "text/csv",
            icon=":material/download:",
            on_click="ignore",
        )
        with st.popover("About these numbers", icon=":material/info:"):
            st.markdown("\n".join(f"- {note}" for note in found.notes))
            if judged:
                st.markdown(
                    "- Lines are 95 % intervals. Filled: the best, and those that are not significantly worse. "
                    "*Pareto*: how probable it is that a method lies on the front of metric and costs."
                )


def _board_row(row: Row) -> dict[str, Any]:
    judged = row.judged
    known = judged.estimate if judged else None
    return {
        "name": row.name,
        "label": row.label,
        "trial": row.trial,
        "value": row.value,
        "standing": "" if judged is None else "best" if judged.best else "tied" if judged.tied else "",
        "low": known.low if known else float("nan"),
        "high": known.high if known else float("nan"),
        "interval": f"{compare_formats.number(known.low)} to {compare_formats.number(known.high)}" if known else None,
        "runs": row.runs,
        "behind": judged.behind.difference.value if judged and judged.behind else float("nan"),
        "front": judged.front if judged else float("nan"),
        "trainable_params": row.trainable_params,
        "adapter_bytes": row.adapter_bytes,
        "memory": row.memory,
        "seconds": row.seconds,
        "gain": row.gain,
        "hyperparameters": compare_formats.searched(row) or None,
        "open": "Open",
    }


# -------------------------------------------------------------------- trials


def _trials(chosen: shell.Chosen, trials: pd.DataFrame, costs: dict[str, Cost]) -> None:
    """The chart and the table of trials, whose selections are one."""
    st.subheader("Trials", anchor=False)
    if trials.empty:
        st.info("No trial passes the filters.", icon=":material/filter_alt_off:")
        return
    selection = _Selection(chosen.trials, trials)
    with st.container(horizontal=True, vertical_alignment="center"):
        address.hold("cost", list(costs), next(iter(costs)))
        st.segmented_control(
            f"{chosen.metric} against", list(costs), key="cost", required=True, label_visibility="collapsed"
        )
        address.put("cost", None if st.session_state["cost"] == next(iter(costs)) else st.session_state["cost"])
        if selection.numbers:
            st.button(
                f"Clear the selection of {len(selection.numbers)}",
                icon=":material/close:",
                type="tertiary",
                on_click=selection.clear,
            )
            if len(selection.numbers) == 2:
                one, other = selection.numbers
                shell.page_link(
                    "trial", f"Trial {one} beside {other}", study=chosen.name, trial=str(one), against=str(other)
                )
    cost = costs[st.session_state["cost"]]
    st.altair_chart(
        charts.pareto(
            trials,
            cost.column,
            cost.words,
            chosen.metric,
            chosen.about["goal"],
            selection.numbers,
            chosen.trials["label"].unique(),
        ),
        key=selection.chart,
        on_select="rerun",
        alt=f"{chosen.metric} against {cost.words}, one point a trial",
    )
    lost = trials.loc[trials["objective"].isna(), "outcome"]
    absent = f" Without a value of {chosen.metric}: {tally(lost)}." if len(lost) else ""
    dim = "others" if selection.numbers else "dominated trials"
    st.caption(
        f"{charts.KEY} Dashed line: the front of complete trials; pale: {dim}. "
        f"Click a point (more with shift), or drag over several, to select them in the table.{absent}"
    )
    _prediction(trials)
    headings = columns.of_trials(trials, chosen.metric)
    st.dataframe(
        trials[[name for name in headings if name in trials]].assign(outcome=trials["outcome"].map(spelt), open="Open"),
        hide_index=True,
        column_order=list(headings),
        column_config=headings,
        placeholder="",
        height=min(38 + 35 * max(len(trials), 3), 560),
        key=selection.table,
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": selection.rows}},
        alt="The trials, best first",
    )
    if clicked := st.session_state.get("trials-open"):
        shell.go("trial", study=chosen.name, trial=str(trials["number"].iloc[clicked["row"]]))


def _prediction(trials: pd.DataFrame) -> None:
    name = "prediction_error_percent/train"
    if name in trials and trials[name].notna().any():
        errors = trials[name].dropna()
        st.caption(
            f"Memory was predicted before training: at most {errors.abs().max():.1f} % off the peak that was measured, "
            f"in {len(errors):,} trials. The table has both."
        )


class _Selection:
    """The trials that are selected: in the address, in the chart and in the table.

    Whichever of the two the user touched since the last run counts. The other one, which knows only what was done in
    itself, is drawn as a new widget that begins with the selection: the table with its rows ticked, the chart, which
    marks selected trials by their data, without a rectangle or click of its own.

    Attributes:
        numbers: of the selected trials that pass the filters.
        rows: their places in the table.
        chart, table: the widgets' keys.
    """

    def __init__(self, every: pd.DataFrame, trials: pd.DataFrame):
        state = st.session_state
        address.hold("sel", None, "")
        known = set(every["number"].tolist())
        asked = [text for text in state["sel"].split(",") if text]
        selected = [int(text) for text in asked if text.isdecimal() and int(text) in known]
        if len(selected) < len(asked):
            st.warning("The address selects trials that this study does not have.")
        order = zlib.crc32(trials["number"].to_numpy().tobytes())  # rows are ticked by position
        chart, table = state.setdefault(CHART, _seen()), state.setdefault(TABLE, _seen())
        in_chart = _in_chart(state.get(f"{CHART}-{chart['times']}"), trials)
        ticked = state.get(f"{TABLE}-{table['order']}-{table['times']}")
        in_table = None if ticked is None else [table["numbers"][row] for row in ticked["selection"]["rows"]]
        if in_chart is not None and in_chart != chart["numbers"]:
            selected, chart["numbers"] = in_chart, in_chart
            table["times"] += 1
        elif in_table is not None and set(in_table) != table["ticked"]:
            hidden = [number for number in selected if number not in set(table["numbers"])]
            selected = in_table + hidden
            if chart["numbers"]:
                chart["numbers"] = []
                chart["times"] += 1
        elif set(selected) != table["selected"]:
            table["times"] += 1  # the address, or the button
            if chart["numbers"]:
                chart["numbers"] = []
                chart["times"] += 1
        if len(selected) > MOST:
            st.caption(f"Only the first {MOST} of {len(selected):,} trials are selected.")
            selected = selected[:MOST]
        state["sel"] = ",".join(map(str, selected))
        address.put("sel", state["sel"])
        places = {number: row for row, number in enumerate(trials["number"])}
        self.numbers = [number for number in selected if number in places]
        self.rows = [places[number] for number in self.numbers]
        if order != table["order"]:
            table |= {"order": order, "numbers": trials["number"].tolist()}
        table |= {"ticked": set(self.numbers), "selected": set(selected)}
        self.chart, self.table = f"{CHART}-{chart['times']}", f"{TABLE}-{order}-{table['times']}"

    @staticmethod
    def clear() -> None:
        """Select nothing."""
        st.session_state["sel"] = ""


def _seen() -> dict[str, Any]:
    return {"times": 0, "order": 0, "numbers": [], "ticked": set(), "selected": set()}


def _in_chart(event: Any, trials: pd.DataFrame) -> list[int] | None:
    """The trials that are selected in the chart; None if it was not touched."""
    if not event:
        return None
    found = [int(point["trial"]) for point in event["selection"].get("click", [])]
    brush = event["selection"].get("brush") or {}
    if brush:
        cost = _costs(trials).get(st.session_state.get("cost", ""))
        inside = trials["objective"].between(*sorted(brush["objective"]))
        if cost is not None and "cost" in brush:
            inside &= trials[cost.column].between(*sorted(brush["cost"])).fillna(False)
        found += [number for number in trials.loc[inside, "number"].tolist() if number not in set(found)]
    return found
