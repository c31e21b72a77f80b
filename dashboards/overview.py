"""The overview page: how a study stands, which trial is best, and what it costs in trainable parameters."""

from __future__ import annotations

import os
import zlib
from typing import Any

import pandas as pd
import streamlit as st

from dashboards import charts
from workbench.errors import StorageError
from workbench.tracking import frames
from workbench.tracking.outcomes import spelt, tally
from workbench.tracking.runs import default_store

REFRESH = "2s"
PHASES = ("load", "train", "eval")
FIRST_STEP = "Type this in a terminal, then reload this page:\n\n```shell\nworkbench sweep studies/quickstart.yaml\n```"


def page() -> None:
    """Draw the page for the store that the environment names."""
    st.header("workbench", anchor=False)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or default_store(os.environ.get("WORKBENCH_HOME", "runs"))[0]
    try:
        studies = frames.studies(uri)
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        st.markdown(FIRST_STEP)
        return
    if studies.empty:
        st.info("No study has been run yet.", icon=":material/science:")
        st.markdown(FIRST_STEP)
        return
    names = studies["study"].tolist()
    asked = st.query_params.get("study", names[0])
    if asked not in names:
        st.warning(f"There is no study {asked!r} here; this is the newest.")
    name = st.selectbox("Study", names, index=names.index(asked) if asked in names else 0, key="study", width=420)
    st.query_params["study"] = name  # always, so that a copied link still means this study when there is a newer one
    live = bool((studies.loc[studies["study"] == name, "status"] == "RUNNING").any())
    st.fragment(_body, run_every=REFRESH if live else None)(uri, name, live)


def _body(uri: str, name: str, live: bool) -> None:
    """Everything that changes while trials run."""
    try:
        trials = frames.trials(uri, name)
        study = frames.studies(uri).set_index("study").loc[name]
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        return
    if live and study["status"] != "RUNNING":
        st.rerun()  # the whole page, which stops the timer
    trials = frames.ranked(trials, study["goal"])
    if study["reference"]:
        study["metric"] = f"{study['split']} {study['metric']}"
        st.caption(f"Imported from {study['reference']}: as published, one run each.")
    _tiles(trials, study)
    if trials.empty:
        st.info("The first trial has not started yet.", icon=":material/hourglass_top:")
        return
    chart = st.container()
    selected = _table(trials, study["metric"])
    with chart:
        st.altair_chart(charts.scatter(trials, study["metric"], study["goal"], selected))
        undrawn = trials.loc[trials["objective"].isna(), "outcome"]
        absent = f" Without a value of {study['metric']}: {tally(undrawn)}." if len(undrawn) else ""
        st.caption(charts.KEY + absent)
        if "prediction_error_percent/train" in trials and trials["prediction_error_percent/train"].notna().any():
            errors = trials["prediction_error_percent/train"].dropna()
            st.caption(
                f"Memory was predicted before training: at most {errors.abs().max():.1f} % off the peak that was "
                f"measured, in {len(errors)} trials. The table has both."
            )


def _tiles(trials: pd.DataFrame, study: pd.Series) -> None:
    complete = trials[trials["outcome"] == "complete"]
    counts = trials["outcome"].value_counts()
    failures = trials.loc[~trials["outcome"].isin(["complete", "pruned", "running", "infeasible"]), "outcome"]
    tiles = st.columns([2, 1, 1, 1, 1, 2])
    best = complete.iloc[0] if len(complete) and pd.notna(complete["objective"].iloc[0]) else None
    tiles[0].metric(
        f"Best {study['metric']}",
        "none" if best is None else f"{best['objective']:.4f}",
        "no complete trial yet" if best is None else f"trial {best['number']}, {best['label']}",
        delta_color="off",
        delta_arrow="off",
        border=True,
    )
    waiting = _waiting(study)
    for tile, heading, count, note in (
        (tiles[1], "Running", counts.get("running", 0), f"{waiting} waiting" if waiting else None),
        (tiles[2], "Complete", counts.get("complete", 0), None),
        (tiles[3], "Pruned", counts.get("pruned", 0), None),
        (tiles[4], "Infeasible", counts.get("infeasible", 0), None),
        (tiles[5], "Failed", len(failures), tally(failures) or None),
    ):
        tile.metric(heading, int(count), note, delta_color="off", delta_arrow="off", border=True, height="stretch")


def _waiting(study: pd.Series) -> int:
    """How many trials wait in Optuna's queue; 0, with a note on the page, where its storage cannot be read."""
    url = os.environ.get("WORKBENCH_OPTUNA_URL") or study["optuna"]
    if not url:
        return 0
    try:
        return frames.optuna_state(url, study.name)["waiting"]
    except StorageError as error:
        st.caption(f"Waiting trials are not shown. {error}")
        return 0


def _table(trials: pd.DataFrame, metric: str) -> list[str]:
    """Draw the table; the run ids of the rows that the user has ticked."""
    columns = _columns(trials, metric)
    # rows are ticked by position, so a new order needs a new widget, which starts with the same trials ticked
    order = zlib.crc32(",".join(trials["run_id"]).encode())
    ticked = trials.index[trials["run_id"].isin(st.session_state.get("selected", []))].tolist()
    event: Any = st.dataframe(
        trials.assign(outcome=trials["outcome"].map(spelt)),
        hide_index=True,
        column_order=list(columns),
        column_config=columns,
        placeholder="",
        key=f"trials-{order}",
        on_select="rerun",
        selection_mode="multi-row",
        selection_default={"selection": {"rows": ticked}},
    )
    selected = trials["run_id"].iloc[event.selection.rows].tolist()
    st.session_state["selected"] = selected
    return selected


def _memory_columns(trials: pd.DataFrame) -> dict[str, Any]:
    """Headings and formats of memory, measured and predicted."""
    columns = {}
    found = [name for name in trials if "_mib/" in name or "prediction_error" in name]
    for name in sorted(found, key=_phase):
        alone = name.replace("predicted_pass", "predicted_peak")
        if name != alone and (trials[name].isna() | (trials[name] == trials[alone])).all():
            continue  # no trial shared a pass
        heading = name.replace("_mib/", ", ").replace("_percent/", ", ").replace("_", " ")
        unit = "%.1f MiB" if "_mib/" in name else "%+.1f %%"
        columns[name] = st.column_config.NumberColumn(heading, format=unit)
    return columns


def _phase(name: str) -> tuple[int, bool, bool, str]:
    """Where a column of memory stands: by phase, what was predicted first, its error last."""
    kind, _, phase = name.partition("/")
    place = PHASES.index(phase) if phase in PHASES else len(PHASES)
    return place, "error" in kind, "predicted" not in kind, kind


def _columns(trials: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Headings and formats of the columns to show, in their order."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    columns: dict[str, Any] = {
        "number": number("trial"),
        "label": text("method"),
        "outcome": text("outcome"),
        "role": text("role"),
        "objective": number(metric, format="%.4f"),
        "trainable_params": number("trainable", format="localized"),
        "trainable_percent": number("trainable %", format="%.3f"),
        "adapter_bytes": number("adapter file", format="bytes"),
    }
    memory = _memory_columns(trials)
    columns |= {name: heading for name, heading in memory.items() if name.endswith("/train")}
    for name in sorted(trials, key=lambda name: not name.startswith("hp.")):
        if name.startswith("hp."):
            columns[name] = st.column_config.Column(name.removeprefix("hp."))
        elif name.startswith("validation.") and name != f"validation.{metric}":
            columns[name] = number(name.replace(".", " "), format="%.4f")
        elif name.startswith("seconds/"):
            columns[name] = number(f"{name.removeprefix('seconds/')} time", format="%.1f s")
    columns |= {name: heading for name, heading in memory.items() if name not in columns}
    return columns | {
        "message": text("message"),
        "started": st.column_config.DatetimeColumn("started", format="distance"),
    }
