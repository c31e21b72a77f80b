"""Altair charts of what a study searched, made from the tables of `workbench.tracking.searched`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import altair as alt
import numpy as np
import pandas as pd

from workbench.tracking.outcomes import spelt
from workbench.tracking.searched import Field
from workbench.tracking.stats import Sensitivity

from .charts import LOOKS, hyperparameters, label_scale

Layers = alt.LayerChart | alt.FacetChart  # what `alt.layer` is said to return

GREY = "#7d828b"  # reads on white and on black
BEST = "#0072B2"
POINTS = 1500  # the most that a chart draws
LINES = 300
FEW = 6  # values that all have their tick
RAMP: Final = "viridis"


def thin(trials: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many trials, of a table with the best first: the best half of them, and others drawn evenly."""
    if len(trials) <= most:
        return trials
    rest = trials.iloc[most // 2 :]
    return pd.concat([trials.iloc[: most // 2], rest.iloc[np.linspace(0, len(rest) - 1, most - most // 2).astype(int)]])


def _named(column: str, rows: pd.DataFrame, width: int) -> alt.Y:
    """An axis with a name for each row, in the order of the rows, whose names may be that wide (pixels)."""
    axis = alt.Axis(labelLimit=width, labelFlush=False, labelBound=False)
    return alt.Y(f"{column}:N", sort=rows[column].tolist(), title=None, axis=axis)


def importances(table: pd.DataFrame) -> Layers:
    """Bars, with a tick at what chance alone would come to."""
    base = alt.Chart(table).encode(
        y=_named("field", table, 220),
        tooltip=[
            alt.Tooltip("field:N", title="hyperparameter"),
            alt.Tooltip("importance:Q", format=".1%"),
            alt.Tooltip("chance:Q", format=".1%", title="by chance"),
        ],
    )
    # what chance comes to may be beyond all
    scale = alt.Scale(domain=[0, 1], clamp=True)
    x = alt.X("importance:Q", title="importance", scale=scale, axis=alt.Axis(format="~%", tickCount=5))
    clear = alt.condition("datum.importance > datum.chance", alt.value(1.0), alt.value(0.35))
    bars = base.mark_bar(color="#0072B2", height={"band": 0.62}).encode(x=x, opacity=clear)
    ticks = base.mark_tick(color=GREY, thickness=2, height=20).encode(x="chance:Q")
    return alt.layer(bars, ticks).properties(height=24 * len(table) + 76)


def against(trials: pd.DataFrame, field: Field, metric: str, labels: Sequence[str]) -> alt.Chart:
    """The metric against one hyperparameter, one point a measured trial.

    Args:
        trials: measured ones.
        field: a hyperparameter of these.
        labels: all of the study, for their colours.
    """
    drawn = trials.loc[trials.index.intersection(field.values.index)]
    points = _points(drawn).assign(value=field.values[drawn.index])
    title = f"{field.name} ({field.unit.replace('_', ' ')})" if field.unit else field.name
    if field.numeric:
        kind = {"type": "log"} if field.log else {"type": "linear", "zero": False}
        scale = alt.Scale(**kind, nice=False, padding=14)
        values = sorted(field.values.unique().tolist())
        few = {"values": values} if len(values) <= FEW else {"tickCount": 4}
        axis = alt.Axis(format=".6~g", labelOverlap=True, **few)
        x: alt.X = alt.X("value:Q", scale=scale, title=title, axis=axis)
    else:
        x = alt.X("value:N", title=title, axis=alt.Axis(labelAngle=0, labelLimit=110))
    chart = _marks(points, labels, metric).encode(
        x=x,
        y=alt.Y("objective:Q", scale=alt.Scale(zero=False, padding=10), title=metric),
        tooltip=_tooltip(metric),
    )
    if not field.numeric:  # points of one value side by side
        points["shift"] = np.random.default_rng(0).uniform(-1, 1, len(points))
        chart = chart.encode(xOffset=alt.XOffset("shift:Q", scale=alt.Scale(domain=[-2, 2])))
    return chart.properties(height=230)


def legend(labels: Sequence[str], all_labels: Sequence[str]) -> Layers:
    """The methods' colours and shapes in one line."""
    colours, shapes = label_scale(all_labels)
    table = pd.DataFrame({"label": list(labels), "at": np.cumsum([0, *(28 + 7.2 * len(name) for name in labels)])[:-1]})
    base = alt.Chart(table, height=18).encode(
        x=alt.X("at:Q", axis=None, scale=alt.Scale(domain=[-8, 1000], nice=False))
    )
    marks = base.mark_point(filled=True, size=60).encode(
        color=alt.Color("label:N", scale=colours, legend=None), shape=alt.Shape("label:N", scale=shapes, legend=None)
    )
    words = base.mark_text(align="left", dx=8, color=GREY, fontSize=12).encode(text="label:N")
    return alt.layer(marks, words)


def rates(trials: pd.DataFrame, label: str, found: Sensitivity, metric: str, labels: Sequence[str]) -> Layers:
    """The metric against the learning rate of one method, with the smoothed curve and the rates near the best."""
    colours, _ = label_scale(labels)
    colour = colours.range[colours.domain.index(label)]
    own = trials[(trials["label"] == label) & trials["objective"].notna()]
    points = _points(own).assign(rate=pd.to_numeric(own["hp.learning_rate"], errors="coerce"))
    line = pd.DataFrame({"rate": found.rates, "objective": found.curve})
    band = pd.DataFrame({"low": [found.low], "high": [found.high]})
    scale = alt.Scale(type="log", nice=False, padding=12)
    axis = alt.Axis(format=".6~g", tickCount=4, labelOverlap=True)
    x = alt.X("rate:Q", scale=scale, title="learning rate", axis=axis)
    y = alt.Y("objective:Q", scale=alt.Scale(zero=False, padding=8), title=metric)
    marks = _marks(points[points["rate"] > 0], labels, metric).encode(x=x, y=y, tooltip=_tooltip(metric))
    near = alt.Chart(band).mark_rect(color=colour, opacity=0.16).encode(x=alt.X("low:Q", scale=scale), x2="high:Q")
    curve = alt.Chart(line).mark_line(color=colour, strokeWidth=1.8).encode(x=x, y=y)
    return alt.layer(near, curve, marks).properties(height=240, title=label)


def choices(table: pd.DataFrame, metric: str, labels: Sequence[str]) -> Layers:
    """Mean and interval of each value that was chosen; the best as a hollow mark."""
    colours, _ = label_scale(labels)
    rows = table.dropna(subset=["mean"])
    low, high = rows[["mean", "best"]].min(axis=None), rows[["mean", "best"]].max(axis=None)
    ends = [low - 0.2 * ((high - low) or 0.1), high + 0.2 * ((high - low) or 0.1)]
    rows = rows.assign(
        name=rows["label"] + ": " + rows["field"] + " = " + rows["value"],
        shown_low=rows["low"].clip(*ends),
        shown_high=rows["high"].clip(*ends),
    )
    base = alt.Chart(rows).encode(
        y=_named("name", rows, 320),
        color=alt.Color("label:N", scale=colours, legend=None),
        tooltip=[
            alt.Tooltip("name:N", title="choice"),
            alt.Tooltip("tried:Q"),
            alt.Tooltip("complete:Q"),
            alt.Tooltip("mean:Q", format=".4f"),
            alt.Tooltip("low:Q", format=".4f"),
            alt.Tooltip("high:Q", format=".4f"),
            alt.Tooltip("best:Q", format=".4f"),
        ],
    )

    def x(column: str) -> alt.X:
        scale = alt.Scale(domain=ends, nice=False, zero=False)
        return alt.X(f"{column}:Q", title=metric, scale=scale, axis=alt.Axis(tickCount=8))

    lines = base.mark_rule(strokeWidth=2).encode(x=x("shown_low"), x2="shown_high:Q")
    means = base.mark_point(filled=True, size=70, opacity=1).encode(x=x("mean"))
    best = base.mark_point(filled=False, size=60, strokeWidth=1.5).encode(x=x("best"))
    return alt.layer(lines, means, best).properties(height=24 * len(rows) + 76)


def rank_map(cells: pd.DataFrame, shown: str, metric: str, goal: str) -> Layers:
    """The metric by rank and alpha of one method: the best or the mean of each cell, and how many were complete."""
    low, high = cells[shown].min(), cells[shown].max()
    span = (high - low) or 1.0
    better = (cells[shown] - low) / span if goal == "maximize" else (high - cells[shown]) / span
    table = cells.assign(
        better=better,
        words=[f"{value:.3f}" if pd.notna(value) else "none" for value in cells[shown]],
        counts=cells["complete"].astype(str) + " of " + cells["tried"].astype(str),
    )
    ranks = table.sort_values("r_order")["r"].unique().tolist()
    scales = table.sort_values("scale_order", ascending=False)["scale"].unique().tolist()
    rank, alpha = cells["rank"].iloc[0], cells["alpha"].iloc[0]
    base = alt.Chart(table).encode(
        x=alt.X("r:N", sort=ranks, title=rank, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("scale:N", sort=scales, title=alpha, axis=alt.Axis(labelFlush=False, labelBound=False)),
        tooltip=[
            alt.Tooltip("r:N", title=rank),
            alt.Tooltip("scale:N", title=alpha),
            alt.Tooltip("best:Q", format=".4f"),
            alt.Tooltip("mean:Q", format=".4f"),
            alt.Tooltip("complete:Q"),
            alt.Tooltip("tried:Q"),
        ],
    )
    colour = alt.Color("better:Q", scale=alt.Scale(scheme=RAMP, domain=[0, 1]), legend=None)
    filled = base.transform_filter("isValid(datum.better)")
    empty = base.transform_filter("!isValid(datum.better)").mark_rect(fill=None, stroke=GREY, strokeDash=[3, 3])
    ink = alt.condition("datum.better > 0.55", alt.value("black"), alt.value("white"))
    grey = alt.value(GREY)
    return alt.layer(
        empty,
        filled.mark_rect().encode(color=colour),
        filled.mark_text(dy=-6, fontSize=13).encode(text="words:N", color=ink),
        filled.mark_text(dy=9, fontSize=10).encode(text="counts:N", color=ink),
        base.transform_filter("!isValid(datum.better)").mark_text(fontSize=10).encode(text="counts:N", color=grey),
    ).properties(height=46 * len(scales) + 70, title=str(cells["label"].iloc[0]))


def parallel(trials: pd.DataFrame, fields: Sequence[Field], metric: str, goal: str) -> Layers:
    """One line a measured trial through all its hyperparameters to the metric, on the right; the best are blue.

    Args:
        trials: measured ones, the best first, that have all the fields.
        fields: at least one.
    """
    drawn = thin(trials, LINES)
    objective = Field(metric, drawn["objective"], True, False)
    axes = [*fields, objective]
    places = drawn["objective"].rank(pct=True, ascending=goal == "maximize")
    lines, ticks = [], []
    for at, field in enumerate(axes):
        values = field.values.reindex(drawn.index)
        heights, marks = _axis(field, values)
        ticks += [(at, field.name, height, word) for height, word in marks]
        lines.append(
            pd.DataFrame({"trial": drawn["number"], "at": at, "height": heights, "place": places, "good": -places})
        )
    table = pd.concat(lines).sort_values(["place", "at"])  # the best are drawn last
    words = pd.DataFrame(ticks, columns=["at", "name", "height", "word"])
    x = alt.X("at:Q", axis=None, scale=alt.Scale(domain=[-0.35, len(axes) - 0.75], nice=False))
    y = _height("height")
    hover = alt.selection_point(fields=["trial"], on="pointerover", clear="pointerout", empty=False)
    paths = (
        alt.Chart(table)
        .mark_line(strokeWidth=1.4)
        .encode(
            x=x,
            y=y,
            detail="trial:N",
            color=alt.Color("place:Q", scale=alt.Scale(range=[GREY, GREY, BEST], domain=[0, 0.6, 1]), legend=None),
            opacity=alt.condition(hover, alt.value(1.0), alt.Opacity("place:Q", legend=None, scale=_FADE)),
            strokeWidth=alt.condition(hover, alt.value(4), alt.value(1.4)),
            order="at:Q",
            tooltip=["trial:Q"],
        )
        .add_params(hover)
    )
    heads = words.drop_duplicates("at").assign(low=0.0, high=1.0, top=1.11)
    rules = alt.Chart(heads).mark_rule(color=GREY).encode(x=x, y=_height("low"), y2="high:Q")
    names = alt.Chart(heads).mark_text(fontWeight="bold", color=GREY, fontSize=12)
    outside = alt.Chart(words[words["at"] == 0]).mark_text(align="right", dx=-6, color=GREY, fontSize=11)
    inside = alt.Chart(words[words["at"] > 0]).mark_text(align="left", dx=6, color=GREY, fontSize=11)
    values = [mark.encode(x=x, y=y, text="word:N") for mark in (outside, inside)]
    return alt.layer(rules, paths, *values, names.encode(x=x, y=_height("top"), text="name:N")).properties(height=340)


_FADE = alt.Scale(domain=[0, 0.7, 1], range=[0.25, 0.4, 0.95])


def _height(column: str) -> alt.Y:
    return alt.Y(f"{column}:Q", axis=None, scale=alt.Scale(domain=[-0.06, 1.16], nice=False))


def _axis(field: Field, values: pd.Series) -> tuple[pd.Series, list[tuple[float, str]]]:
    """Where values stand on an axis from 0 to 1, and its labels."""
    if not field.numeric:
        levels = sorted(values.dropna().unique())
        steps = {level: (place + 0.5) / len(levels) for place, level in enumerate(levels)}
        return values.map(steps), [(height, _cut(level)) for level, height in steps.items()]
    low, high = values.min(), values.max()
    if field.log:
        heights = np.log(values / low) / (np.log(high / low) or 1.0)
        middle = float(np.sqrt(low * high))
    else:
        heights, middle = (values - low) / ((high - low) or 1.0), (low + high) / 2
    return heights, [(0.0, _brief(low)), (0.5, _brief(middle)), (1.0, _brief(high))]


def _brief(value: float) -> str:
    """Such as "0.0032" or "8.6M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _cut(text: str, most: int = 18) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _points(trials: pd.DataFrame) -> pd.DataFrame:
    look = trials["outcome"].where(trials["outcome"].isin(LOOKS), "failed")
    return pd.DataFrame(
        {
            "trial": trials["number"],
            "label": trials["label"],
            "outcome": trials["outcome"].map(spelt),
            "objective": trials["objective"],
            "hyperparameters": hyperparameters(trials),
            "fill": look.map({name: fill for name, (fill, _) in LOOKS.items()}),
        }
    )


def _marks(points: pd.DataFrame, labels: Sequence[str], metric: str) -> alt.Chart:
    """Points in the look of the other pages: colour and shape by method, hollow where pruned."""
    colours, shapes = label_scale(labels)
    return (
        alt.Chart(points)
        .mark_point(size=42, strokeWidth=1.4)
        .encode(
            stroke=alt.Stroke("label:N", scale=colours, legend=None),
            fill=alt.Fill("label:N", scale=colours, legend=None),
            shape=alt.Shape("label:N", scale=shapes, legend=None),
            fillOpacity=alt.FillOpacity("fill:Q", scale=None),
        )
    )


def _tooltip(metric: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("trial:Q"),
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("outcome:N"),
        alt.Tooltip("objective:Q", title=metric, format=".4f"),
        alt.Tooltip("hyperparameters:N"),
    ]
