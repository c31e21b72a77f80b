"""The pictures of a report: SVG text that takes its ink from the page, so that it reads in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from . import stats
from .budgets import counted
from .colours import COLOURS
from .compare_formats import number
from .searched import NEAR_BEST

if TYPE_CHECKING:
    from .comparison import Comparison, Row

MARKERS = ["o", "s", "^", "D", "P", "v", "X"]
INK, FAINT = "#010203", "#040506"  # stand for the page's own colours
WIDTH = 7.5  # inches
COSTS = {"trainable_params": "trainable parameters", "memory": "memory", "seconds": "seconds"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Picture:
    """A figure: its SVG, what it says to those who cannot see it, and how to read it."""

    title: str
    svg: str
    alt: str
    caption: str


class Looks:
    """One colour and marker a label, the same in every picture."""

    def __init__(self, labels: Iterable[str]):
        self.labels = sorted(set(labels))

    def __call__(self, label: str) -> dict[str, Any]:
        place = self.labels.index(label)
        return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def pictures(found: Comparison) -> list[Picture]:
    """All that there is something to draw of."""
    looks = Looks([*found.trials["label"], *(row.label for row in found.rows)])
    drawn = [forest(found, looks), costs(found, looks)]
    if not found.reference:
        drawn += [budget(found, looks), tuning(found, looks), rates(found, looks), spread(found, looks)]
    return [picture for picture in drawn if picture]


def forest(found: Comparison, looks: Looks) -> Picture | None:
    """The intervals, best first."""
    rows = _measured(found)
    if not rows:
        return None
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _one(0.9 + 0.32 * len(rows))
        for place, row in enumerate(rows):
            look = looks(row.label)
            if row.judged:
                ends = [row.judged.estimate.low, row.judged.estimate.high]
                axes.plot(ends, [place, place], color=look["color"], linewidth=2, solid_capstyle="round")
            filled = row.judged is not None and row.judged.tied
            axes.plot(row.value, place, markersize=7, linestyle="none", **_hollow(look, not filled))
            if row.judged and row.judged.best:
                axes.axvline(row.value, color=INK, linewidth=0.8, linestyle=":")
        _name_rows(axes, rows)
        axes.set_xlabel(f"{found.split} {found.metric}")
        svg = _svg(figure, "forest")
    alt = "; ".join(f"{row.name} {number(row.value)}{_words(row)}" for row in rows)
    caption = "Lines are 95 % intervals. Filled: the best and those tied with it. Without a line: one run."
    return Picture("Intervals", svg, f"{found.metric} of each method: {alt}.", caption)


def costs(found: Comparison, looks: Looks) -> Picture | None:
    """The metric against what it costs, with the front."""
    rows = _measured(found)
    names = [name for name in COSTS if any(getattr(row, name) > 0 for row in rows)]
    if not names:
        return None
    said = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.1 * len(names)), layout="constrained")
        for axes, name in zip(np.atleast_1d(figure.subplots(len(names))), names, strict=True):
            shown = [row for row in rows if getattr(row, name) > 0]
            said.append(_cost(axes, found, shown, name, looks))
        svg = _svg(figure, "costs")
    caption = (
        "Dashed: the Pareto front of the values as measured. In percent: how probable it is that a finalist lies on "
        "it, given the noise of examples and seeds. What costs nothing has no place on the axis."
    )
    return Picture("What it costs", svg, " ".join(said), caption)


def _cost(axes: Axes, found: Comparison, rows: list[Row], name: str, looks: Looks) -> str:
    finalists = [row for row in rows if row.judged]
    chances: dict[int, float] = {}
    if finalists:
        scores = [found.scores[row.trial] for row in finalists]
        price = np.array([[getattr(row, name)] for row in finalists])
        chances = dict(
            zip((row.trial for row in finalists), stats.front_probability(scores, price, found.goal), strict=True)
        )
    points = np.array([[row.value, getattr(row, name)] for row in rows])
    on_front = stats.front(points, [found.goal == "minimize", True])
    line = points[on_front][points[on_front][:, 1].argsort()]
    axes.step(line[:, 1], line[:, 0], where="post", color=INK, linewidth=0.8, linestyle="--")
    for place, row in enumerate(sorted(rows, key=lambda row: float(getattr(row, name)))):
        look, x = looks(row.label), getattr(row, name)
        if row.judged:
            axes.plot([x, x], [row.judged.estimate.low, row.judged.estimate.high], color=look["color"], linewidth=1.5)
        axes.plot(x, row.value, linestyle="none", markersize=7, **_hollow(look, row.judged is None))
        chance = f" {100 * chances[row.trial]:.0f} %" if row.trial in chances else ""
        where = (6, -11 if place % 2 else 5)  # so that neighbours do not write over one another
        axes.annotate(_text(f"{row.label}{chance}"), (x, row.value), where, textcoords="offset points", fontsize=8)
    _logarithmic(axes)
    axes.margins(x=0.12, y=0.12)
    words = found.memory if name == "memory" else COSTS[name]
    axes.set_xlabel(words)
    axes.set_ylabel(f"{found.split} {found.metric}")
    front = ", ".join(row.name for row, on in zip(rows, on_front, strict=True) if on)
    return f"{found.metric} against {words}: {front} on the Pareto front."


def budget(found: Comparison, looks: Looks) -> Picture | None:
    """What one may expect of a smaller budget."""
    searched = counted(found.trials)
    searched = searched[searched["outcome"] != "running"]
    measured = searched["objective"].dropna()
    if measured.empty:
        return None
    worst = measured.min() if found.goal == "maximize" else measured.max()
    said = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        by_trials, by_seconds = figure.subplots(1, 2, sharey=True)
        for label, own in searched.groupby("label"):
            best = stats.expected_best(own["objective"].fillna(worst).to_numpy(), found.goal)
            trials = np.arange(1, len(best) + 1)
            seconds = float(own["seconds/total"].mean()) if "seconds/total" in own else 0.0
            look = {"markersize": 4, "linewidth": 1.5, "markevery": max(1, len(best) // 6), **looks(str(label))}
            by_trials.plot(trials, best, label=_text(str(label)), **look)
            if seconds > 0:
                by_seconds.plot(trials * seconds, best, **look)
            said.append(f"{label} {number(best[0])} after one trial, {number(best[-1])} after {len(best)}")
        by_trials.set(xlabel="trials", ylabel=f"expected best validation {found.metric}")
        by_trials.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_seconds.set_xlabel("seconds of training")
        if by_seconds.lines:
            _logarithmic(by_seconds)
        figure.legend(loc="outside lower center", ncols=4)
        svg = _svg(figure, "budget")
    caption = (
        "The expected best of so many trials of the search, drawn from those that were made (Dodge et al. 2019, Tang "
        "et al. 2020). A pruned trial counts with its last value, a failed one with the worst of the study."
    )
    return Picture("Expected best against budget", svg, f"Expected best {found.metric}: {'; '.join(said)}.", caption)


def tuning(found: Comparison, looks: Looks) -> Picture | None:
    """From a method's defaults to what the search found."""
    rows = [row for row in found.rows if not math.isnan(row.default)]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _one(0.9 + 0.32 * len(rows))
        for place, row in enumerate(rows):
            look, tuned = looks(row.label), row.default + row.gain
            axes.plot([row.default, tuned], [place, place], color=look["color"], linewidth=2)
            axes.plot(row.default, place, linestyle="none", markersize=6, **_hollow(look, True))
            axes.plot(tuned, place, linestyle="none", markersize=6, **look)
        _name_rows(axes, rows)
        axes.set_xlabel(f"validation {found.metric}")
        svg = _svg(figure, "tuning")
    alt = "; ".join(f"{row.name} from {number(row.default)} to {number(row.default + row.gain)}" for row in rows)
    caption = "Hollow: the method's defaults, one run. Filled: tuned, of finalists the mean of their runs."
    return Picture("Tuned against default", svg, f"Validation {found.metric}, default and tuned: {alt}.", caption)


def rates(found: Comparison, looks: Looks) -> Picture | None:
    """How much the learning rate matters, method by method."""
    if "hp.learning_rate" not in found.trials:
        return None
    searched = found.trials[found.trials["role"] != "finalist"]
    searched = searched[pd.to_numeric(searched["hp.learning_rate"], errors="coerce") > 0]
    complete = searched[(searched["outcome"] == "complete") & searched["objective"].notna()]
    enough = complete.groupby("label")["hp.learning_rate"].nunique()
    labels = [str(label) for label in enough[enough > 1].index]
    if not labels:
        return None
    said, columns = [], min(3, len(labels))
    lines = math.ceil(len(labels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        for axes, label in zip(grid, labels, strict=False):
            said.append(_rates_of(axes, searched[searched["label"] == label], label, found, looks))
        for axes in list(grid)[len(labels) :]:
            axes.set_axis_off()
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel(f"validation {found.metric}", fontsize=9)
        svg = _svg(figure, "rates")
    caption = (
        f"A robust local regression over complete trials (from {stats.RATES_TO_SMOOTH} rates on, else their means); "
        f"shaded: the rates that come within {100 * NEAR_BEST:g} % of its best value. Hollow: pruned. Crosses below: "
        f"trials that failed. Other hyperparameters vary along."
    )
    return Picture("Sensitivity to the learning rate", svg, " ".join(said), caption)


def _rates_of(axes: Axes, trials: pd.DataFrame, label: str, found: Comparison, looks: Looks) -> str:
    look = looks(label)
    complete = trials[(trials["outcome"] == "complete") & trials["objective"].notna()]
    pruned = trials[(trials["outcome"] == "pruned") & trials["objective"].notna()]
    failed = trials[trials["objective"].isna() & (trials["outcome"] != "running")]
    x = "hp.learning_rate"
    best = complete["objective"].max() if found.goal == "maximize" else complete["objective"].min()
    curve = stats.sensitivity(
        complete[x].to_numpy(), complete["objective"].to_numpy(), found.goal, NEAR_BEST * abs(best)
    )
    axes.axvspan(curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=1)
    axes.plot(curve.rates, curve.curve, color=look["color"], linewidth=1.5)
    axes.plot(complete[x], complete["objective"], linestyle="none", markersize=4, **look)
    hollow = _hollow(look, True) | {"markersize": 5.5, "markeredgewidth": 0.9}
    axes.plot(pruned[x], pruned["objective"], linestyle="none", **hollow)
    axes.plot(failed[x], [0.02] * len(failed), "x", color=INK, markersize=5, transform=axes.get_xaxis_transform())
    _logarithmic(axes)
    axes.set_title(_text(label), fontsize=9)
    return (
        f"{label}: best at a learning rate of {curve.best:.2g}, within {100 * NEAR_BEST:g} % from {curve.low:.2g} to "
        f"{curve.high:.2g} ({curve.decades:.1f} decades)."
    )


def spread(found: Comparison, looks: Looks) -> Picture | None:
    """What seeds do: every run, and the spread over either kind of seeds."""
    rows = [row for row in found.rows if row.judged and row.judged.estimate.seeds_known]
    if not rows:
        return None
    said = []
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.42 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for place, row in enumerate(rows):
            look, scores = looks(row.label), found.scores[row.trial]
            orders = sorted({order for _, order in scores.seeds})
            shifts = np.array([orders.index(order) - (len(orders) - 1) / 2 for _, order in scores.seeds])
            left.plot(
                scores.runs, place + 0.5 * shifts / len(orders), linestyle="none", markersize=5, alpha=0.8, **look
            )
            known = row.judged.estimate if row.judged else None
            sds = (known.sd_initialisation, known.sd_order) if known else (math.nan, math.nan)
            for sd, shift, hatch in zip(sds, (-0.18, 0.18), ("", "////"), strict=True):
                fill = {"facecolor": "none" if hatch else look["color"], "hatch": hatch}
                right.barh(place + shift, np.nan_to_num(sd), 0.3, edgecolor=look["color"], **fill)
            words = ["unknown" if math.isnan(sd) else number(sd) for sd in sds]
            said.append(f"{row.name} {words[0]} over initialisations, {words[1]} over orders")
        _name_rows(left, rows)
        left.set_xlabel(f"{found.split} {found.metric} of each run")
        right.set_xlabel("standard deviation")
        right.tick_params(left=False)
        right.xaxis.set_major_locator(MaxNLocator(4))
        svg = _svg(figure, "spread")
    caption = (
        "Left: runs, those with the same order of the data on one line. Right: spread over initialisations (filled) "
        "and over orders of the data (hatched), without what is noise of single runs."
    )
    return Picture("Spread by source", svg, f"Standard deviations of {found.metric}: {'; '.join(said)}.", caption)


# -------------------------------------------------------------------- parts


def _measured(found: Comparison) -> list[Row]:
    return [row for row in found.rows if not math.isnan(row.value)]


def _words(row: Row) -> str:
    if not row.judged:
        return " (one run)"
    tied = ", best" if row.judged.best else ", tied with the best" if row.judged.tied else ""
    return f" ({number(row.judged.estimate.low)} to {number(row.judged.estimate.high)}{tied})"


def _one(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _name_rows(axes: Axes, rows: list[Row]) -> None:
    """A row each from the top down, with its name."""
    axes.set_yticks(range(len(rows)), [_text(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers, where values differ enough for one."""
    low, high = axes.dataLim.intervalx
    if high < 5 * low:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=8))
    plain, short = FuncFormatter(lambda x, _: f"{x:g}"), EngFormatter(sep="")
    axes.xaxis.set_major_formatter(short if high > 2000 else plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _hollow(look: dict[str, Any], hollow: bool) -> dict[str, Any]:
    return look | ({"markerfacecolor": "none", "markeredgewidth": 1.5} if hollow else {})


def _text(label: str) -> str:
    """A label as it is: matplotlib leaves those out of legends that begin with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _svg(figure: Figure, name: str) -> str:
    """The figure for a page: its ids are its own, its ink the page's."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(?<= id=")(?=[^"]+")', f"{name}-", svg)
    svg = re.sub(r'(?<=[("]#)(?=[\w-]+[")])', f"{name}-", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
