"""Headings and formats of the tables' columns, in their order."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from workbench.tracking.comparison import Comparison

PHASES = ("load", "train", "eval")
WIDE = 2000  # rows of a table above which columns that say little are left out: every cell travels to the browser


def of_board(found: Comparison) -> dict[str, Any]:
    """Of the leaderboard."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    return {
        "name": text("method", pinned=True, width=150),
        "value": number(found.metric, format="%.4f"),
        "standing": text("", help="The best, and those that are not significantly worse (tied)"),
        "interval": text("95 % interval", width=130),
        "runs": number("runs"),
        "behind": number("to best", format="%+.4f"),
        "front": number("Pareto", format="%.2f", help="Probability of lying on the front of metric and costs"),
        "trainable_params": number("trainable", format="localized"),
        "adapter_bytes": number("adapter file", format="bytes"),
        "memory": number(found.memory or "memory", format="%.0f"),
        "seconds": number("seconds", format="%.1f"),
        "gain": number("over defaults", format="%+.4f"),
        "hyperparameters": text("hyperparameters"),
        "trial": number("trial"),
        "open": st.column_config.ButtonColumn("", type="tertiary", key="board-open", help="Look at the trial"),
    }


def of_trials(trials: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Of the table of trials."""
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    columns: dict[str, Any] = {
        "number": number("trial", pinned=True),
        "open": st.column_config.ButtonColumn("", type="tertiary", key="trials-open", help="Look at the trial"),
        "label": text("method"),
        "outcome": text("outcome"),
        "role": text("role"),
        "objective": number(metric, format="%.4f"),
        "trainable_params": number("trainable", format="localized"),
        "trainable_percent": number("trainable %", format="%.3f"),
        "adapter_bytes": number("adapter file", format="bytes"),
    }
    memory = _of_memory(trials)
    columns |= {name: heading for name, heading in memory.items() if name.endswith("/train")}
    for name in sorted(trials, key=lambda name: not name.startswith("hp.")):
        if name.startswith("hp."):
            columns[name] = st.column_config.Column(name.removeprefix("hp."))
        elif name.startswith("validation.") and name != f"validation.{metric}":
            columns[name] = number(name.replace(".", " "), format="%.4f")
        elif name.startswith("seconds/"):
            columns[name] = number(f"{name.removeprefix('seconds/')} time", format="%.1f s")
    columns |= {name: heading for name, heading in memory.items() if name not in columns}
    columns |= {"message": text("message"), "started": st.column_config.DatetimeColumn("started", format="distance")}
    if len(trials) > WIDE:
        dear = ("validation.", "test.", "seconds/train", "seconds/eval", "predicted_mib", "trainable_percent")
        columns = {name: each for name, each in columns.items() if not name.startswith(dear)}
    return columns


def _of_memory(trials: pd.DataFrame) -> dict[str, Any]:
    """Of memory, measured and predicted."""
    columns = {}
    found = [name for name in trials if "_mib/" in name or "prediction_error" in name]
    for name in sorted(found, key=_phase):
        alone = name.replace("predicted_pass", "predicted_peak")
        if name != alone and alone in trials and (trials[name].isna() | (trials[name] == trials[alone])).all():
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
