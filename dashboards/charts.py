"""Altair charts made from the tables of `workbench.tracking.frames`.

Text, grid and background have no colours here: Streamlit gives them those of its theme, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from workbench.tracking import stats
from workbench.tracking.colours import COLOURS
from workbench.tracking.leaderboard import brief
from workbench.tracking.outcomes import spelt
from workbench.tracking.runs import STATUS

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
NEUTRAL = "#8A8F98"  # is seen on white and on black
GOOD, BAD = COLOURS[0], COLOURS[1]
MANY = 1500  # points above which a line is thinned out
CANVAS = 1000  # points above which a chart is drawn as pixels, not as an element each
OFF, ON = 0.22, 1.0  # opacity of a point that is dominated, or not selected


def label_scale(labels: Sequence[str]) -> tuple[alt.Scale, alt.Scale]:
    """Colours and shapes of methods by label, the same on every page of a study: pass all labels of the study."""
    domain = sorted(set(labels))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(domain))]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(domain))]
    return alt.Scale(domain=domain, range=colours), alt.Scale(domain=domain, range=shapes)


def hyperparameters(trials: pd.DataFrame) -> pd.Series:
    """One line a trial, such as `r=8, learning_rate=0.001`, of the hyperparameters that it has."""
    lines = [""] * len(trials)
    for column in trials:
        if not column.startswith("hp."):
            continue
        name = column.removeprefix("hp.")
        for i, (value, known) in enumerate(zip(trials[column].tolist(), trials[column].notna(), strict=True)):
            if known:
                lines[i] += f"{', ' if lines[i] else ''}{name}={brief(value)}"
    return pd.Series(lines, index=trials.index, dtype="str")


# -------------------------------------------------------------------- trials


def pareto(
    trials: pd.DataFrame,
    cost: str,
    heading: str,
    metric: str,
    goal: str,
    selected: Sequence[int],
    labels: Sequence[str],
) -> alt.LayerChart | alt.FacetChart:
    """The metric against a cost, one point a trial, coloured and shaped by label; those that are dominated, and of
    selected ones the others, are dim. The Pareto front of complete trials is a line of steps.

    A click selects a trial (`click`, field `trial`), a drag those in a rectangle (`brush`).

    Args:
        trials: as `frames.trials` returns them; those without both numbers are left out.
        cost: its column; drawn on a logarithmic axis where values differ much.
        heading: what the column is.
        goal: "maximize" or "minimize".
        selected: numbers of trials.
        labels: all of the study.
    """
    points, front = pareto_points(trials, cost, goal, selected)
    colours, shapes = label_scale(labels)
    dashes = alt.Scale(domain=list(LOOKS), range=[dash for _, dash in LOOKS.values()])
    spread = points["cost"].max() / points["cost"].min() if len(points) and points["cost"].min() > 0 else 1
    linear = {"type": "linear", "zero": False} if spread <= 5 else {"type": "log"}
    scale = alt.Scale(**linear, nice=False, padding=20)
    x = alt.X("cost:Q", scale=scale, title=heading, axis=alt.Axis(format="~s", labelFlush=False))
    better = "higher" if goal == "maximize" else "lower"
    y = alt.Y("objective:Q", scale=alt.Scale(zero=False, padding=14), title=f"{metric} ({better} is better)")
    click = alt.selection_point("click", fields=["trial"], on="click", clear=False)
    brush = alt.selection_interval("brush", clear=False, mark=alt.BrushConfig(fill=NEUTRAL, stroke=NEUTRAL))
    steps = (
        alt.Chart(front)
        .mark_line(interpolate="step-after", color=NEUTRAL, strokeWidth=1.5, strokeDash=[6, 3])
        .encode(x=x, y=y)
    )
    size = 90 if len(points) < 400 else 45 if len(points) < 3000 else 25
    marks = (
        alt.Chart(points)
        .mark_point(strokeWidth=1.6)
        .encode(
            x=x,
            y=y,
            stroke=alt.Stroke("label:N", scale=colours, title="method"),
            fill=alt.Fill("label:N", scale=colours, title="method"),
            shape=alt.Shape("label:N", scale=shapes, title="method"),
            fillOpacity=alt.FillOpacity("fill:Q", scale=None),
            strokeDash=alt.StrokeDash("look:N", scale=dashes, legend=None),
            size=alt.condition("datum.selected", alt.value(3 * size), alt.value(size)),
            opacity=alt.Opacity("opacity:Q", scale=None),
            tooltip=[
                alt.Tooltip("trial:Q"),
                alt.Tooltip("label:N", title="method"),
                alt.Tooltip("outcome:N"),
                alt.Tooltip("objective:Q", title=metric, format=".4f"),
                alt.Tooltip("cost:Q", title=heading, format=",.4~f"),
                *([alt.Tooltip("hyperparameters:N")] if "hyperparameters" in points else []),
            ],
        )
        .add_params(click, brush)
    )
    drawn = alt.layer(*([steps] if len(front) else []), marks).properties(height=400)
    if len(points) > CANVAS:
        drawn.usermeta = {"embedOptions": {"renderer": "canvas"}}
    return drawn


def pareto_points(
    trials: pd.DataFrame, cost: str, goal: str, selected: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `pareto` draws: its points, and those of the front from the cheapest to the best."""
    drawn = trials[trials["objective"].notna() & (trials[cost] > 0)] if cost in trials else trials[:0]
    points = pd.DataFrame(
        {
            "trial": drawn["number"],
            "label": drawn["label"],
            "outcome": drawn["outcome"].map(spelt),
            "look": drawn["outcome"].where(drawn["outcome"].isin(LOOKS), "failed"),
            "objective": drawn["objective"],
            "cost": drawn[cost].astype("float64") if cost in drawn else pd.Series(dtype="float64"),
            "selected": drawn["number"].isin(list(selected)),
        }
    )
    if len(points) <= CANVAS:  # beyond, this would be most of what travels to the browser
        points["hyperparameters"] = hyperparameters(drawn)
    points["fill"] = points["look"].map({look: fill for look, (fill, _) in LOOKS.items()}).astype("float64")
    points["front"] = False
    complete = points[drawn["outcome"] == "complete"]
    points.loc[on_front(complete, goal), "front"] = True
    dim = ~points["selected"] if len(selected) else ~points["front"]
    points["opacity"] = np.where(dim, OFF if len(points) < 3000 else 0.15, ON)
    # what is to be seen is drawn last
    points = points.sort_values("opacity", kind="stable", ignore_index=True)
    return points, points.loc[points["front"], ["cost", "objective"]].sort_values(["cost", "objective"])


def on_front(points: pd.DataFrame, goal: str) -> pd.Index:
    """The index of those rows that no other one dominates."""
    # only the best of equal cost, and only if it is better than everything cheaper, can be on the front
    order = points.sort_values(["cost", "objective"], ascending=[True, goal == "minimize"])
    best = order["objective"].cummax() if goal == "maximize" else order["objective"].cummin()
    likely = order[order["objective"] == best]
    values = likely[["cost", "objective"]].to_numpy(dtype="float64")
    return likely.index[stats.front(values, [True, goal == "minimize"])] if len(likely) else likely.index


# -------------------------------------------------------------------- methods


def intervals(board: pd.DataFrame, metric: str, labels: Sequence[str]) -> alt.LayerChart | alt.FacetChart:
    """The leaderboard as points with their intervals, in its order.

    Args:
        board: columns name, label, value, low, high (NaN without interval), standing ("best", "tied" or "").
        labels: all of the study.
    """
    colours, shapes = label_scale(labels)
    data = board[board["value"].notna()].assign(filled=lambda rows: np.where(rows["standing"] != "", 0.9, 0.0))
    y = alt.Y("name:N", sort=data["name"].tolist(), title=None, axis=alt.Axis(labelLimit=220))
    x = alt.X("value:Q", scale=alt.Scale(zero=False, padding=12), title=metric)
    base = alt.Chart(data)
    colour = alt.Color("label:N", scale=colours, legend=None)
    rules = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(
        y=y, x=alt.X("low:Q", scale=alt.Scale(zero=False, padding=12), title=metric), x2="high:Q", color=colour
    )  # fmt: skip
    points = base.mark_point(size=80, strokeWidth=1.8).encode(
        y=y,
        x=x,
        stroke=alt.Stroke("label:N", scale=colours, legend=None),
        fill=alt.Fill("label:N", scale=colours, legend=None),
        shape=alt.Shape("label:N", scale=shapes, legend=None),
        fillOpacity=alt.FillOpacity("filled:Q", scale=None),
        tooltip=[
            alt.Tooltip("name:N", title="method"),
            alt.Tooltip("value:Q", title=metric, format=".4f"),
            alt.Tooltip("low:Q", format=".4f"),
            alt.Tooltip("high:Q", format=".4f"),
            alt.Tooltip("standing:N"),
        ],
    )
    best = base.transform_filter("datum.standing == 'best'").mark_rule(strokeDash=[2, 3], color=NEUTRAL).encode(x=x)
    layers = [best] if (data["standing"] == "best").any() else []
    return alt.layer(*layers, rules, points).properties(height=26 * len(data) + 70)


# -------------------------------------------------------------------- a study


def outcomes(trials: pd.DataFrame) -> alt.LayerChart | alt.FacetChart:
    """How many trials ended how: a bar an outcome with its number."""
    counts = trials["outcome"].value_counts()
    known = [outcome for outcome in ("running", *STATUS) if outcome in counts]
    order = known + [outcome for outcome in counts.index if outcome not in known]
    data = pd.DataFrame({"outcome": [spelt(outcome) for outcome in order], "trials": counts[order].to_numpy()})
    data["good"] = [outcome in ("complete", "pruned", "running", "duplicate") for outcome in order]
    base = alt.Chart(data, height=28 * len(data) + 70).encode(
        y=alt.Y("outcome:N", sort=data["outcome"].tolist(), title=None),
        x=alt.X("trials:Q", title="trials", axis=alt.Axis(tickMinStep=1, format="~s")),
        tooltip=["outcome", "trials"],
    )
    colour = alt.Color("good:N", scale=alt.Scale(domain=[True, False], range=[GOOD, BAD]), legend=None)
    return base.mark_bar(height=16).encode(color=colour) + base.mark_text(
        align="left", dx=4, color=NEUTRAL, fontSize=12
    ).encode(text=alt.Text("trials:Q", format=","))


def best_over_time(ended: pd.DataFrame, metric: str, goal: str) -> alt.LayerChart | alt.FacetChart:
    """The best value so far.

    Args:
        ended: those trials that have ended, at least one.
    """
    ended = ended.sort_values("ended")
    complete = ended[(ended["outcome"] == "complete") & ended["objective"].notna() & (ended["role"] != "finalist")]
    best = complete["objective"].cummax() if goal == "maximize" else complete["objective"].cummin()
    dots = complete.assign(best=best)[best != best.shift()][["ended", "best", "number", "label"]]
    first = pd.DataFrame({"ended": [ended["started"].min()], "best": [float("nan")]})  # both charts begin there
    last = ended[["ended"]].tail(1).assign(best=best.iloc[-1] if len(best) else float("nan"))
    line = pd.concat([first, dots[["ended", "best"]], last])
    x = alt.X("ended:T", title=None)
    y = alt.Y("best:Q", scale=alt.Scale(zero=False, padding=8), title=f"best {metric}")
    tooltip = [
        alt.Tooltip("number:Q", title="trial"),
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("best:Q", title=metric, format=".4f"),
        alt.Tooltip("ended:T", format="%d %b %H:%M:%S"),
    ]
    steps = alt.Chart(line).mark_line(interpolate="step-after", color=GOOD).encode(x=x, y=y)
    points = alt.Chart(dots).mark_point(color=GOOD, filled=True, size=45, opacity=1).encode(x=x, y=y, tooltip=tooltip)
    return alt.layer(steps, points).properties(height=190)


def ended_over_time(ended: pd.DataFrame) -> alt.Chart:
    """How many trials have ended, as an area.

    Args:
        ended: as of `best_over_time`.
    """
    times = pd.concat([ended["started"].nsmallest(1), ended["ended"].sort_values()], ignore_index=True)
    counts = pd.DataFrame({"ended": times, "trials": np.arange(len(times))})
    counts = counts.iloc[np.unique(np.linspace(0, len(counts) - 1, min(len(counts), MANY)).astype(int))]
    return (
        alt.Chart(counts, height=120)
        .mark_area(interpolate="step-after", color=NEUTRAL, opacity=0.35, line={"color": NEUTRAL})
        .encode(
            x=alt.X("ended:T", title=None),
            y=alt.Y("trials:Q", title="trials ended", axis=alt.Axis(format="~s", tickMinStep=1)),
        )
    )
