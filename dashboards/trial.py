"""The trial page: all that is known of one trial, beside another one if the address names it (`against`)."""

from __future__ import annotations

import os
import re
from typing import Any

import pandas as pd
import streamlit as st

from workbench.errors import DataError, StorageError
from workbench.tracking import artifacts, difference, examples, frames, layers, phases, rungs
from workbench.tracking.outcomes import spelt
from workbench.tracking.study_facts import Facts, facts

from . import address, commands
from . import charts_trial as charts
from .shell import Chosen, on_study

COLUMNS = 3
ROWS = 500  # examples that a table shows
ENDED = 3600  # seconds that what an ended run holds is kept; only a reading of the test split adds to it
SOON = 10  # seconds that anything else is
FAILED = ("crashed", "diverged", "out_of_memory", "timed_out", "infeasible")
BADGES = {"complete": "green", "running": "blue"}  # all others are grey, or red if they failed
NO_OTHER = ""


def page() -> None:
    """Draw the page for the trial that the address names, by default the best."""
    on_study("Trial", _body)


def _body(chosen: Chosen) -> None:
    trials = chosen.trials.set_index("number", drop=False)
    numbers = [int(number) for number in trials.index]
    named = dict(zip(numbers, _names(trials), strict=True)) | {NO_OTHER: "no other trial"}
    left, right = st.columns(2)
    address.hold("trial", numbers, numbers[0])
    number = left.selectbox("Trial", numbers, key="trial", format_func=named.__getitem__)
    address.put("trial", str(number))
    address.hold("against", [NO_OTHER, *numbers], NO_OTHER)
    other = right.selectbox("Compare with", [NO_OTHER, *numbers], key="against", format_func=named.__getitem__)
    address.put("against", str(other))
    one = trials.loc[number]
    two = trials.loc[other] if other not in (NO_OTHER, number) else None
    known = _facts(chosen)
    _what_it_is(chosen, one, trials)
    _curves(chosen, one, two, known)
    _costs(one, known)
    _layers(chosen, one)
    _examples(chosen, one)
    if two is not None:
        _difference(chosen, one, two)
    _commands(chosen, one)


def _names(trials: pd.DataFrame) -> list[str]:
    parts = zip(trials["number"], trials["label"], trials["objective"], trials["outcome"], trials["role"], strict=True)
    return [
        f"{number} · {label}{'' if pd.isna(value) else f' · {value:.4f}'} · {spelt(outcome)}"
        f"{'' if role == 'search' else f' · {role}'}"
        for number, label, value, outcome, role in parts
    ]


# -------------------------------------------------------------------- what stores hold
# `outcome` is part of the keys: a trial that was interrupted may go on


@st.cache_data(ttl=SOON, max_entries=64, show_spinner=False)
def _study_facts(uri: str, run_id: str) -> Facts:
    return facts(uri, run_id)


def _facts(chosen: Chosen) -> Facts:
    try:
        return _study_facts(chosen.uri, chosen.about["run_id"])
    except StorageError:
        return Facts({}, {})


@st.cache_data(ttl=ENDED, max_entries=64, show_spinner=False)
def _ended_history(uri: str, run_id: str, outcome: str) -> pd.DataFrame:
    return frames.history(uri, run_id)


def _history(chosen: Chosen, trial: pd.Series) -> pd.DataFrame:
    if trial["outcome"] == "running":
        return frames.history(chosen.uri, trial["run_id"])
    return _ended_history(chosen.uri, trial["run_id"], trial["outcome"])


@st.cache_data(ttl=SOON, max_entries=8, show_spinner=False)
def _reported(storage: str, study: str) -> pd.DataFrame:
    return rungs.reported(storage, study)


@st.cache_data(ttl=ENDED, max_entries=64, show_spinner=False)
def _text(uri: str, run_id: str, path: str) -> str:
    return (artifacts.fetch(uri, run_id, path) or b"").decode(errors="replace")


@st.cache_data(ttl=ENDED, max_entries=64, show_spinner="Reading the adapter ...")
def _modules(uri: str, run_id: str, outcome: str) -> pd.DataFrame | None:
    content = artifacts.fetch(uri, run_id, artifacts.ADAPTER)
    return None if content is None else layers.layers(artifacts.header(content))


@st.cache_data(ttl=ENDED, max_entries=32, show_spinner="Reading the predictions ...")
def _predictions(uri: str, run_id: str, outcome: str) -> pd.DataFrame | None:
    content = artifacts.fetch(uri, run_id, artifacts.VALIDATION)
    return None if content is None else examples.errors(artifacts.parquet(content))


# -------------------------------------------------------------------- what it is


def _what_it_is(chosen: Chosen, one: pd.Series, trials: pd.DataFrame) -> None:
    rank, complete = int(one["rank"]), int((trials["rank"] > 0).sum())
    settings = [
        f"`{name.removeprefix('hp.')} = {_short(one[name])}`"
        for name in one.index
        if name.startswith("hp.") and pd.notna(one[name])
    ]
    colour = "red" if one["outcome"] in FAILED else BADGES.get(one["outcome"], "gray")
    st.markdown(
        f":{colour}-badge[{spelt(one['outcome'])}] **{_plain(one['label'])}** &nbsp; " + " &nbsp; ".join(settings)
    )
    tiles = st.columns(4)
    for tile, heading, value, note in (
        (
            tiles[0],
            chosen.metric,
            _number(one["objective"], "{:.4f}"),
            f"rank {rank} of {complete}" if rank else None,
        ),
        (tiles[1], "Trainable", _number(one["trainable_params"], "{:,.0f}"), _share(one)),
        (tiles[2], "Adapter file", _size(one["adapter_bytes"]), None),
        (tiles[3], "Time", _number(one.get("seconds/total"), "{:,.1f} s"), None),
    ):
        tile.metric(heading, value, note, delta_color="off", delta_arrow="off", border=True, height="stretch")
    st.caption(" · ".join(_story(chosen, one, trials)), unsafe_allow_html=False)
    if one["message"]:
        show = st.error if one["outcome"] in FAILED else st.info
        show(_plain(one["message"]), icon=":material/error:" if one["outcome"] in FAILED else ":material/info:")
    if one["outcome"] == "crashed":
        trace = _read(lambda: _text(chosen.uri, one["run_id"], artifacts.TRACEBACK))
        if trace:
            with st.expander("Traceback"):
                st.code(trace, language="pytb")


def _story(chosen: Chosen, one: pd.Series, trials: pd.DataFrame) -> list[str]:
    """Seeds, when, and which other trials it has to do with."""

    def linked(number: Any) -> str:
        return f"[trial {number}]({address.link('trial', study=chosen.name, trial=int(number))})"

    found = [str(one["role"])]
    if pd.notna(one["init_seed"]):
        found.append(f"seeds {one['init_seed']} (initialisation), {one['order_seed']} (order)")
    if pd.notna(one["finalist_of"]):
        found.append(f"repeats {linked(one['finalist_of'])} with other seeds")
    repeats = trials.loc[trials["finalist_of"] == one["number"], "number"]
    if len(repeats):
        found.append(f"trained again {len(repeats)} times, first as {linked(repeats.min())}")
    if one["resumes"]:
        found.append(f"takes up {linked(one['resumes'])}")
    if pd.notna(one["started"]):
        found.append(f"started {one['started']:%Y-%m-%d %H:%M} UTC")
    if chosen.about["reference"]:
        found.append(f"imported from {chosen.about['reference']}")
    return [*found, f"run {one['run_id']}"]


# -------------------------------------------------------------------- curves


def _curves(chosen: Chosen, one: pd.Series, two: pd.Series | None, known: Facts) -> None:
    st.subheader("Curves", anchor=False)
    histories = _read(lambda: [_history(chosen, trial) for trial in (one, two) if trial is not None])
    if histories is None:
        return
    names = [f"trial {trial['number']}" for trial in (one, two) if trial is not None]
    points = pd.concat([history.assign(trial=name) for history, name in zip(histories, names, strict=True)])
    points = points[points["step"] > 0]
    own = points.loc[points["trial"] == names[0], "metric"]
    own = own[own.str.startswith("validation.") | (own == "train.loss")]
    if own.empty:
        st.caption(f"Nothing was measured step by step: the trial is {spelt(one['outcome'])}.")
        return
    metric, goal = chosen.about["metric"], chosen.about["goal"]
    compared, sign = rungs.compared(known.params, metric, goal)
    decisions = rungs.decisions(known.params)
    steps = max(rungs.evaluations(known.params), default=0)
    others = _others(chosen, one, sign)
    first = [f"validation.{metric}", f"validation.{compared}", "train.loss"]
    shown = sorted(own.unique(), key=lambda name: (first.index(name) if name in first else len(first), name))
    columns: list[Any] = []
    for place, name in enumerate(shown):
        if place % COLUMNS == 0:
            columns = st.columns(COLUMNS)
        beside = others if name == f"validation.{compared}" else None
        crossed = one["outcome"] == "pruned" and name.startswith("validation.")
        chart = charts.curve(name, points[points["metric"] == name], decisions, steps, beside, crossed)
        columns[place % COLUMNS].altair_chart(chart)
    st.caption(_reading(names, decisions, others, compared, one))


def _others(chosen: Chosen, one: pd.Series, sign: int) -> pd.DataFrame | None:
    """What the other trials reported to the pruner; None, where Optuna's storage cannot be read."""
    url = os.environ.get("WORKBENCH_OPTUNA_URL") or chosen.about["optuna"]
    if not url:
        return None
    try:
        table = _reported(url, chosen.name)
    except StorageError:
        return None
    return rungs.at_rungs(table.assign(value=sign * table["value"]), int(one["number"]))


def _reading(names: list[str], decisions: list[int], others: pd.DataFrame | None, compared: str, one: pd.Series) -> str:
    parts = [f"Blue: {names[0]}."]
    if len(names) > 1:
        parts.append(f"Orange: {names[1]}.")
    if others is not None and len(others):
        parts.append(f"Grey, of validation.{compared}: median and middle half of the other trials at each evaluation.")
    elif others is not None:
        parts.append("The other trials have reported nothing to a pruner that could stand beside.")
    else:
        parts.append("What the other trials had come to is not shown: Optuna's storage has it and cannot be read.")
    if decisions:
        parts.append(f"Dotted: steps at which trials may be pruned ({', '.join(map(str, decisions))}).")
    if one["outcome"] == "pruned":
        parts.append("Cross: pruned here.")
    return " ".join(parts)


# -------------------------------------------------------------------- time and memory


def _costs(one: pd.Series, known: Facts) -> None:
    st.subheader("Time and memory", anchor=False)
    table = phases.phases(one.to_dict(), known.metrics)
    if table.empty:
        st.caption(f"Neither was measured or predicted: the trial is {spelt(one['outcome'])}.")
        return
    number = st.column_config.NumberColumn
    columns: dict[str, Any] = {
        "phase": "phase",
        "seconds": number("time", format="%.1f s"),
        "peak": number("peak", format="%.1f MiB"),
        "kind": "the peak is of",
        "predicted": number("predicted", format="%.1f MiB", help="of the trial alone in a pass"),
        "in_pass": number("predicted of the pass", format="%.1f MiB", help="that it shared with other trials"),
        "error": number("error", format="%+.1f %%", help="how far the prediction is above the peak"),
    }
    there = [name for name in columns if table[name].replace("", None).notna().any()]
    parts = phases.parts(one.to_dict())
    where = st.columns([3, 2], gap="large") if len(parts) else [st.container()]
    where[0].dataframe(table, hide_index=True, column_order=there, column_config=columns, placeholder="")
    if len(parts):
        where[1].altair_chart(charts.parts(parts))
    else:
        st.caption("Memory was not predicted: that takes `constraints.vram_gib`, `track_memory` or a GPU.")


# -------------------------------------------------------------------- layers


def _layers(chosen: Chosen, one: pd.Series) -> None:
    st.subheader("Layers", anchor=False)
    if one["outcome"] == "running":
        st.caption("The adapter is kept when the trial has ended.")
        return
    modules = _read(lambda: _modules(chosen.uri, one["run_id"], one["outcome"]), default="failed")
    if isinstance(modules, str):
        return
    if modules is None:
        st.caption(f"There is no adapter: the trial is {spelt(one['outcome'])}. Only complete trials keep theirs.")
        return
    kinds = layers.by_kind(modules)
    number = st.column_config.NumberColumn
    inner = modules[modules["layer"].notna() & (modules["part"] == "adapter")]
    where = st.columns([3, 2], gap="large") if inner["layer"].nunique() > 1 else [st.container()]
    where[0].dataframe(
        kinds,
        hide_index=True,
        placeholder="",
        column_order=["kind", "part", "layers", "modules", "each", "parameters", "tensors"],
        column_config={
            "kind": "module",
            "part": "what is trained",
            "layers": "layers",
            "modules": number("modules", format="localized"),
            "each": number("parameters", format="localized", help="of each of these modules"),
            "parameters": number("in all", format="localized"),
            "tensors": "tensors of each",
        },
    )
    if len(where) > 1:
        where[1].altair_chart(charts.grid(inner))
    sums = modules.groupby("part")["parameters"].sum()
    words = ", ".join(f"{total:,} in {part}" for part, total in sums.items())
    empty = int((inner["parameters"] == 0).sum())
    without = f" {empty} modules have rank 0: all of it was pruned away." if empty else ""
    st.caption(f"Numbers in {artifacts.ADAPTER}: {words}.{without}")


# -------------------------------------------------------------------- examples


@st.fragment  # so that its widget draws nothing else anew
def _examples(chosen: Chosen, one: pd.Series) -> None:
    st.subheader("Examples", anchor=False)
    found = _found(chosen, one)
    if found is None:
        st.caption(_no_predictions(one))
        return
    place = examples.place(_study_text(chosen))
    knows, only = bool(found["wrong"].notna().any()), False
    table = examples.confusion(found)
    where = st.columns([2, 3], gap="large") if len(table) else [st.container()]
    right = where[-1]
    if len(table):
        where[0].altair_chart(charts.confusion(table))
    if knows:
        address.hold("wrong", [True, False], True)
        only = right.toggle("Wrong only", key="wrong")
        address.put("wrong", None if only else "False")
        wrong = int(found["wrong"].sum())
        right.caption(f"{wrong:,} of {len(found):,} examples are wrong. Highest loss first; {place}.")
        found = found[found["wrong"].fillna(False)] if only else found
    else:
        right.caption(f"{len(found):,} examples, the highest loss first; {place}.")
    shown = ["row", *(name for name in ("actual", "predicted") if found[name].notna().any()), "loss"]
    shown += ["wrong"] if knows and not only else []
    right.dataframe(
        found.head(ROWS),
        hide_index=True,
        placeholder="",
        column_order=shown,
        column_config={"loss": st.column_config.NumberColumn("loss", format="%.3f", help="nats")},
    )
    if len(found) > ROWS:
        right.caption(f"The first {ROWS} of {len(found):,} are shown.")


def _found(chosen: Chosen, trial: pd.Series) -> pd.DataFrame | None:
    if trial["outcome"] == "running":
        return None
    return _read(lambda: _predictions(chosen.uri, trial["run_id"], trial["outcome"]))


def _no_predictions(trial: pd.Series) -> str:
    if trial["outcome"] == "running":
        return "Predictions are kept when the trial has ended."
    return f"No predictions were kept: trial {trial['number']} is {spelt(trial['outcome'])}."


def _study_text(chosen: Chosen) -> str:
    return _read(lambda: _text(chosen.uri, chosen.about["run_id"], "study.yaml")) or ""


# -------------------------------------------------------------------- two trials


def _difference(chosen: Chosen, one: pd.Series, two: pd.Series) -> None:
    names = [f"trial {trial['number']}" for trial in (one, two)]
    st.subheader(f"{names[0].capitalize()} and {names[1]}", anchor=False)
    told, came = difference.configuration(one, two), difference.results(one, two)
    left, right = st.columns(2, gap="large")
    heads: dict[str, Any] = {"what": "", "one": names[0], "other": names[1]}
    if told.empty:
        left.caption("They have the same configuration and seeds.")
    else:
        left.dataframe(told, hide_index=True, column_config=heads)
        left.caption("Configuration: only what differs.")
    number = st.column_config.NumberColumn
    text = st.column_config.TextColumn
    formats = {name: text(heads[name], alignment="right") for name in ("one", "other")}
    formats |= {"by": text("difference", alignment="right"), "percent": number("%", format="%+.1f")}
    if came.empty:
        right.caption("Neither was measured.")
    else:
        spelt_out = {name: came[name].map(_figure) for name in ("one", "other")}
        spelt_out["by"] = came["by"].map(lambda value: _figure(value, "+"))
        right.dataframe(came.assign(**spelt_out), hide_index=True, placeholder="", column_config=heads | formats)
    both = [_found(chosen, trial) for trial in (one, two)]
    if both[0] is None or both[1] is None:
        lacking = one if both[0] is None else two
        st.caption(f"Which examples changed cannot be told. {_no_predictions(lacking)}")
        return
    try:
        moved = examples.changed(both[0], both[1])
    except DataError as error:
        st.caption(str(error))
        return
    counts = moved["became"].value_counts()
    st.markdown(
        f"**{len(moved):,} of {len(both[0]):,} examples** are answered otherwise by {names[1]}: "
        f"{counts.get('right', 0)} became right, {counts.get('wrong', 0)} wrong, {counts.get('other', 0)} wrong in "
        "another way."
    )
    loss = {
        "loss": number(f"loss, {names[0]}", format="%.3f"),
        "loss_other": number(f"loss, {names[1]}", format="%.3f"),
    }
    heads = {"predicted": names[0], "predicted_other": names[1], "became": f"with {names[1]}"}
    if len(moved):
        st.dataframe(moved.head(ROWS), hide_index=True, column_config=heads | loss)


# -------------------------------------------------------------------- commands


def _commands(chosen: Chosen, one: pd.Series) -> None:
    st.subheader("Commands", anchor=False)
    if chosen.about["reference"]:
        st.caption("Imported results have nothing to train again or to export.")
        return
    found = commands.of_trial(chosen.uri, chosen.about, one)
    if not found:
        st.caption(f"There is nothing to train again or to export: the trial is {spelt(one['outcome'])}.")
    for words, command in found:
        st.caption(words)
        st.code(command, language="shell", wrap_lines=True)


# -------------------------------------------------------------------- parts


def _read(read: Any, default: Any = None) -> Any:
    """What a function reads; where it cannot, the default, and the reason on the page."""
    try:
        return read()
    except (StorageError, DataError) as error:
        st.caption(f":material/warning: {error}")
        return default


def _number(value: Any, form: str) -> str:
    return "none" if value is None or pd.isna(value) else form.format(value)


def _figure(value: float, sign: str = "") -> str:
    """A number of any size: counts in full, measures to four decimals."""
    if pd.isna(value):
        return ""
    return f"{value:{sign},.0f}" if float(value).is_integer() and not 0 < abs(value) < 10 else f"{value:{sign},.4f}"


def _share(one: pd.Series) -> str | None:
    return None if pd.isna(one["trainable_percent"]) else f"{one['trainable_percent']:.3g} % of the model"


def _size(value: Any) -> str:
    if pd.isna(value):
        return "none"
    return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"


def _plain(text: str) -> str:
    """Text that means nothing to Markdown."""
    return re.sub(r"([\\`*_\[\]<>$:~#|])", r"\\\1", text)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
