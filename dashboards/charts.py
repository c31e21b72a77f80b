"""Altair charts made from the tables of `workbench.tracking.frames`."""

from __future__ import annotations

import altair as alt
import pandas as pd

from workbench.tracking.colours import COLOURS
from workbench.tracking.outcomes import spelt

# seven beside six colours: the pairs repeat only after 42 labels
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]

# How a point tells its trial's outcome: opacity of its fill, dashes of its outline. Any other outcome is a failure.
LOOKS: dict[str, tuple[float, list[int]]] = {
    "complete": (0.8, [1, 0]),
    "running": (0.3, [1, 0]),
    "pruned": (0.0, [1, 0]),
    "failed": (0.0, [3, 2]),
}
KEY = "Filled: complete. Pale: running. Hollow: pruned. Dashed: failed."


def hyperparameters(trials: pd.DataFrame) -> pd.Series:
    """One line a trial, such as `r=8, learning_rate=0.001`, of the hyperparameters that it has."""
    columns = [column for column in trials if column.startswith("hp.")]
    lines = [
        ", ".join(f"{name.removeprefix('hp.')}={_short(row[name])}" for name in columns if pd.notna(row[name]))
        for row in trials[columns].to_dict("records")
    ]
    return pd.Series(lines, index=trials.index, dtype="str")


def scatter(trials: pd.DataFrame, metric: str, goal: str, selected: list[str]) -> alt.Chart:
    """The metric against the number of trainable parameters (log), one point a trial, coloured and shaped by label.

    Args:
        trials: as `frames.trials` returns them; those without both numbers are left out.
        metric: name of the objective.
        goal: "maximize" or "minimize".
        selected: run ids to stand out from the others.
    """
    drawn = trials[trials["objective"].notna() & (trials["trainable_params"] > 0)]
    points = pd.DataFrame(
        {
            "trial": drawn["number"],
            "label": drawn["label"],
            "outcome": drawn["outcome"].map(spelt),
            "look": drawn["outcome"].where(drawn["outcome"].isin(LOOKS), "failed"),
            "objective": drawn["objective"],
            "trainable": drawn["trainable_params"].astype("float64"),
            "hyperparameters": hyperparameters(drawn),
            "shown": drawn["run_id"].isin(selected) | (not selected),
        }
    )
    points["fill"] = points["look"].map({look: fill for look, (fill, _) in LOOKS.items()})
    labels = sorted(trials["label"].unique())
    colours = alt.Scale(domain=labels, range=[COLOURS[i % len(COLOURS)] for i in range(len(labels))])
    shapes = alt.Scale(domain=labels, range=[SHAPES[i % len(SHAPES)] for i in range(len(labels))])
    dashes = alt.Scale(domain=list(LOOKS), range=[dash for _, dash in LOOKS.values()])
    counts = alt.Axis(format="~s")
    better = "higher" if goal == "maximize" else "lower"
    return (
        alt.Chart(points, height=380)
        .mark_point(strokeWidth=1.8)
        .encode(
            x=alt.X(
                "trainable:Q",
                scale=alt.Scale(type="log", nice=False, padding=24),
                title="trainable parameters",
                axis=counts,
            ),
            y=alt.Y("objective:Q", scale=alt.Scale(zero=False, padding=12), title=f"{metric} ({better} is better)"),
            stroke=alt.Stroke("label:N", scale=colours, title="method"),
            fill=alt.Fill("label:N", scale=colours, title="method"),
            shape=alt.Shape("label:N", scale=shapes, title="method"),
            fillOpacity=alt.FillOpacity("fill:Q", scale=None),
            strokeDash=alt.StrokeDash("look:N", scale=dashes, legend=None),
            size=alt.condition("datum.shown", alt.value(110), alt.value(50)),
            opacity=alt.condition("datum.shown", alt.value(1.0), alt.value(0.25)),
            tooltip=[
                alt.Tooltip("trial:Q"),
                alt.Tooltip("label:N", title="method"),
                alt.Tooltip("outcome:N"),
                alt.Tooltip("objective:Q", title=metric, format=".4f"),
                alt.Tooltip("trainable:Q", title="trainable", format=",.0f"),
                alt.Tooltip("hyperparameters:N"),
            ],
        )
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
