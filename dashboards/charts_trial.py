"""Altair charts of one trial, or of two."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

GREY = "#7d828b"  # reads on white and on black
ONE, OTHER = "#0072B2", "#D55E00"
FEW = 30  # values of which each has a point
LABELS = 15  # so many rows still have room for their numbers
Layers = alt.LayerChart | alt.FacetChart


def curve(
    metric: str,
    points: pd.DataFrame,
    rungs: Sequence[int],
    steps: int,
    others: pd.DataFrame | None,
    pruned: bool,
) -> Layers:
    """A metric by step.

    Args:
        points: columns step, value, trial (as text: the first is the trial shown).
        rungs: steps at which trials may be pruned.
        steps: of a whole trial; 0 if that is not known.
        others: median, low and high of the other trials by step, if known.
        pruned: whether the trial shown ends with a cross.
    """
    last = max(int(points["step"].max()), steps)
    x = alt.X("step:Q", scale=alt.Scale(domain=[0, last], nice=False), title="step", axis=alt.Axis(tickCount=5))
    trials = points["trial"].unique().tolist()
    colours = alt.Scale(domain=trials, range=[ONE, OTHER][: len(trials)])
    layers: list[alt.Chart] = []
    if rungs:
        marks = alt.Chart(pd.DataFrame({"step": list(rungs)}))
        layers.append(marks.mark_rule(color=GREY, strokeDash=[2, 3]).encode(x=x))
    if others is not None and len(others):
        grey = alt.Chart(others)
        layers.append(grey.mark_area(color=GREY, opacity=0.18).encode(x=x, y=_y("low", ""), y2="high:Q"))
        line = grey.mark_line(color=GREY, strokeDash=[5, 3], strokeWidth=1.4, point={"color": GREY, "size": 24})
        tooltip = ["step:Q", alt.Tooltip("median:Q", format=".4f"), "trials:Q"]
        layers.append(line.encode(x=x, y=_y("median", ""), tooltip=tooltip))
    base = alt.Chart(points).encode(
        x=x,
        y=_y("value", ""),
        color=alt.Color("trial:N", scale=colours, legend=None),
        tooltip=["trial:N", "step:Q", alt.Tooltip("value:Q", format=".4f")],
    )
    layers.append(base.mark_line(strokeWidth=1.8))
    if len(points) <= FEW:
        layers.append(base.mark_point(filled=True, size=34, opacity=1))
    if pruned:
        own = points[points["trial"] == trials[0]]
        cross = alt.Chart(own[own["step"] == own["step"].max()]).mark_point(
            shape="cross", size=140, angle=45, opacity=1
        )
        layers.append(cross.encode(x=x, y=_y("value", ""), color=alt.value(ONE), fill=alt.value(ONE)))
    return alt.layer(*layers).properties(height=230, title=metric)


def parts(table: pd.DataFrame) -> alt.Chart:
    """What the training step was predicted to hold, as one bar."""
    order = table["part"].tolist()
    return (
        alt.Chart(table, height=130)
        .mark_bar(color=ONE, height={"band": 0.6})
        .encode(
            x=alt.X("mib:Q", title="predicted of the training step, MiB", axis=alt.Axis(tickCount=5)),
            y=alt.Y("part:N", sort=order, title=None),
            tooltip=["part:N", alt.Tooltip("mib:Q", format=",.2f", title="MiB")],
        )
    )


def grid(modules: pd.DataFrame) -> Layers:
    """Parameters by kind of module and layer.

    Args:
        modules: rows of `layers.layers` that have a layer.
    """
    table = modules.groupby(["kind", "layer"], as_index=False)["parameters"].sum()
    table["layer"] = table["layer"].astype("int64")
    kinds = sorted(table["kind"].unique())
    top = float(table["parameters"].max()) or 1.0
    table["share"] = table["parameters"] / top
    base = alt.Chart(table).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kind:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=220, labelFlush=False, labelBound=False)),
        tooltip=["kind:N", "layer:O", alt.Tooltip("parameters:Q", format=",")],
    )
    cells = base.mark_rect().encode(color=_shade())
    words = _words(base, alt.Text("parameters:Q", format=",.3~s"))
    shown = [cells, *words] if table["layer"].nunique() <= LABELS else [cells]
    return alt.layer(*shown).properties(height=26 * len(kinds) + 80)


def confusion(table: pd.DataFrame) -> Layers:
    """How often each label was answered by which; dark: a large share of the label's examples."""
    labels = sorted({*table["actual"], *table["predicted"]})
    base = alt.Chart(table).encode(
        x=alt.X("predicted:N", sort=labels, title="predicted", axis=alt.Axis(labelAngle=-45, labelLimit=90)),
        y=alt.Y(
            "actual:N", sort=labels, title="actual", axis=alt.Axis(labelLimit=110, labelFlush=False, labelBound=False)
        ),
        tooltip=["actual:N", "predicted:N", "count:Q", alt.Tooltip("share:Q", format=".0%")],
    )
    cells = base.mark_rect().encode(color=_shade())
    shown = [cells, *_words(base, alt.Text("count:Q"))] if len(labels) <= LABELS else [cells]
    return alt.layer(*shown).properties(height=max(150, 24 * len(labels) + 90))


def _y(column: str, title: str) -> alt.Y:
    return alt.Y(f"{column}:Q", scale=alt.Scale(zero=False, padding=8), title=title or None)


def _shade() -> alt.Color:
    """Blue, the more of it the larger the share; nothing is the page itself, in light and dark."""
    return alt.Color("share:Q", scale=alt.Scale(range=["#0072B21f", "#0072B2"], domain=[0, 1]), legend=None)


def _words(base: alt.Chart, text: alt.Text) -> list[alt.Chart]:
    """Numbers in the cells."""
    dark = base.transform_filter("datum.share > 0.4").mark_text(fontSize=11, color="white")
    light = base.transform_filter("datum.share <= 0.4").mark_text(fontSize=11, color=GREY)
    return [dark.encode(text=text), light.encode(text=text)]
