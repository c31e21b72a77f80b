"""The page of all studies: how each stands, and of one of them who works on it, what came of its trials, and why."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from typing import Any

import pandas as pd
import streamlit as st

from workbench.errors import StorageError
from workbench.tracking import frames
from workbench.tracking.budgets import failures
from workbench.tracking.outcomes import spelt, tally
from workbench.tracking.progress import Progress, progress
from workbench.tracking.workers import seconds_spent, workers

from . import address, charts, shell

STATES = {"RUNNING": "running", "FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
SILENT = 120  # seconds without a sign of life after which a worker is said to be silent
LAST = "studies-last"  # keys of the session: the study that was chosen in the table,
TIMES = "studies-times"  # and how often it was chosen elsewhere


def page() -> None:
    """Draw the page."""
    uri = shell.store()
    st.header("Studies", anchor=False)
    studies = shell.known_studies(uri)
    if studies is None:
        return
    live = bool((studies["status"] == "RUNNING").any())
    st.fragment(_body, run_every=shell.REFRESH if live else None)(uri, live)


def _body(uri: str, live: bool) -> None:
    """Everything that changes while studies run."""
    studies = shell.known_studies(uri)
    if studies is None:
        return
    if live and not (studies["status"] == "RUNNING").any():
        st.rerun()  # the whole page, which stops the timer
    try:
        every = [shell.chosen(uri, about) for _, about in studies.iterrows()]
    except StorageError as error:
        st.error(str(error), icon=":material/database_off:")
        return
    chosen = _table(every)
    _links(chosen)
    if chosen.trials.empty:
        st.info("The first trial has not started yet.", icon=":material/hourglass_top:")
        return
    if chosen.live:
        _workers(chosen)
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("How its trials ended", anchor=False)
        st.altair_chart(charts.outcomes(chosen.trials))
    with right:
        st.subheader("Over time", anchor=False)
        ended = chosen.trials[chosen.trials["ended"].notna()]
        if chosen.about["reference"]:
            st.caption("Imported results have no course of their own.")
        elif ended.empty:
            st.caption("No trial has ended yet.")
        else:
            st.altair_chart(charts.best_over_time(ended, chosen.metric, chosen.about["goal"]))
            st.altair_chart(charts.ended_over_time(ended))
    _failures(chosen)


# -------------------------------------------------------------------- all studies


def _table(every: list[shell.Chosen]) -> shell.Chosen:
    """Draw a row a study; the one that is chosen."""
    names = [study.name for study in every]
    address.hold(address.STUDY, names, names[0])
    state = st.session_state
    if state[address.STUDY] != state.get(LAST):
        state[TIMES] = state.get(TIMES, 0) + 1  # a new widget, which begins with another row
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    event: Any = st.dataframe(
        pd.DataFrame([_row(study) for study in every]),
        hide_index=True,
        column_config={
            "study": text("study", pinned=True),
            "compare": st.column_config.ButtonColumn(
                "", type="tertiary", key="studies-compare", help="Compare its methods and trials"
            ),
            "state": text("state"),
            "progress": st.column_config.ProgressColumn("progress", format="%d %%", max_value=100),
            "trials": text("trials"),
            "best": number("best", format="%.4f"),
            "metric": text("metric"),
            "by": text("by"),
            "ended": text("how trials ended"),
            "began": st.column_config.DatetimeColumn("began", format="distance"),
            "took": text("took"),
        },
        placeholder="",
        height=min(38 + 35 * len(every), 400),
        key=f"studies-{zlib.crc32(','.join(names).encode())}-{state[TIMES]}",
        on_select="rerun",
        selection_mode="single-row-required",
        selection_default={"selection": {"rows": [names.index(state[address.STUDY])]}},
        alt="All studies, the newest first",
    )
    if clicked := state.get("studies-compare"):
        shell.go("compare", study=names[clicked["row"]])
    rows = event.selection.rows
    name = names[rows[0]] if rows else state[address.STUDY]
    state[address.STUDY] = state[LAST] = name
    address.put(address.STUDY, name)
    return every[names.index(name)]


def _row(study: shell.Chosen) -> dict[str, Any]:
    best = study.trials[study.trials["rank"] == 1]
    best = best[best["objective"].notna()]
    about = study.about
    until = pd.Timestamp.now("UTC") if study.live else about["ended"]
    known = _progress(study)
    return {
        "study": study.name,
        "compare": "Compare",
        "state": "imported" if about["reference"] else STATES.get(about["status"], about["status"].lower()),
        "progress": None if known.share is None else 100 if about["status"] == "FINISHED" else 100 * known.share,
        "trials": known.words,
        "best": best["objective"].iloc[0] if len(best) else None,
        "metric": study.metric,
        "by": f"{best['label'].iloc[0]}, trial {best['number'].iloc[0]}" if len(best) else "",
        "ended": tally(study.trials["outcome"]),
        "began": about["started"],
        "took": "" if about["reference"] else _duration((until - about["started"]).total_seconds()),
    }


def _progress(study: shell.Chosen) -> Progress:
    if study.about["reference"]:
        return Progress(None, f"{len(study.trials):,} trials")
    seconds = 0.0
    if "minutes" in study.tags.get("workbench.budget", ""):
        with suppress(StorageError):  # it is said where the workers are shown
            seconds = seconds_spent(_optuna(study), study.name)
    return progress(study.trials, study.tags, seconds)


def _duration(seconds: float) -> str:
    """Such as "2 h 05 min"."""
    if pd.isna(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


# -------------------------------------------------------------------- one study


def _links(study: shell.Chosen) -> None:
    st.subheader(study.name, anchor=False)
    if study.about["reference"]:
        st.caption(f"Imported from {study.about['reference']}: as published, one run each.")
    with st.container(horizontal=True):
        shell.page_link("compare", "Compare", ":material/leaderboard:", study=study.name)
        shell.page_link("hyperparameters", "Hyperparameters", ":material/tune:", study=study.name)
        best = study.trials.loc[study.trials["rank"] == 1, "number"]
        if len(best):
            shell.page_link(
                "trial", f"Best trial ({best.iloc[0]})", ":material/star:", study=study.name, trial=str(best.iloc[0])
            )


def _optuna(study: shell.Chosen) -> str:
    return os.environ.get("WORKBENCH_OPTUNA_URL") or study.about["optuna"]


def _workers(study: shell.Chosen) -> None:
    st.subheader("Who works on it", anchor=False)
    try:
        if not (url := _optuna(study)):
            raise StorageError("The study does not say where Optuna's storage is.")
        found = workers(url, study.name)
        waiting = frames.optuna_state(url, study.name)["waiting"]
    except StorageError as error:
        st.caption(f"Workers are not shown. {error}")
        return
    live = found[(found["worker"] != "") & ~(found["silent"] > SILENT)]
    words = [f"{_counted(live['worker'].nunique(), 'live worker')} with {_counted(len(live), 'trial')}"]
    words += [f"{waiting} waiting"] if waiting else []
    if left := len(found) - len(live):
        words.append(f"{left} left by workers that died or were stopped")
    st.caption(", ".join(words) + ".")
    if live.empty:
        st.info(
            f"No worker gives a sign of life. It may be between two trials; if not, "
            f"`workbench sweep {study.about['file'] or 'STUDY.yaml'}` goes on with it.",
            icon=":material/person_off:",
        )
    if len(found):
        labels = study.trials.set_index("number")["label"]
        st.dataframe(
            found.assign(method=found["trial"].map(labels), worker=found["worker"].replace("", "nobody")),
            hide_index=True,
            column_order=["worker", "trial", "method", "step", "silent"],
            column_config={
                "step": st.column_config.NumberColumn("step", help="Of the last evaluation"),
                "silent": st.column_config.NumberColumn("last sign of life", format="%.0f s ago"),
            },
            placeholder="",
            height=min(38 + 35 * len(found), 250),
            alt="Which worker has which trial",
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _failures(study: shell.Chosen) -> None:
    counts = failures(study.trials)
    st.subheader("What failed, and why", anchor=False)
    if not counts:
        st.caption("No trial failed.")
        return
    failed = study.trials.sort_values("number")
    which: dict[tuple[str, str], list[int]] = {}
    for number, outcome, message in failed[["number", "outcome", "message"]].itertuples(index=False):
        which.setdefault((spelt(outcome), (message or "no message").splitlines()[0]), []).append(number)
    rows = [
        {"outcome": outcome, "trials": count, "message": why, "which": ", ".join(map(str, which[outcome, why][:8]))}
        for (outcome, why), count in counts.most_common()
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        column_order=["outcome", "trials", "message", "which"],
        column_config={
            "message": st.column_config.TextColumn("message", width="large"),
            "which": st.column_config.TextColumn("trials, the first eight"),
        },
        height=min(38 + 35 * len(rows), 320),
        alt="Failed trials by outcome and message",
    )
