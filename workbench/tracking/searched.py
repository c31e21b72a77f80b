"""What a study searched: the hyperparameters of its trials, as numbers or as words, and what came of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from scipy import special

from . import stats
from .budgets import counted

NEAR_BEST = 0.01  # share of the best value, within which a learning rate is as good
CELLS = 6  # the most rows or columns of a map; more values than that are put into so many ranges
SPREAD = 20.0  # largest over smallest value, from which on an axis is logarithmic where nobody says how it was searched
RANKS, SCALES = ("r", "init_r"), ("lora_alpha", "alpha")

Logs = Collection[tuple[str, str]]  # labels and fields that were searched on a logarithmic scale


@dataclass(frozen=True)
class Field:
    """A hyperparameter that takes several values.

    Attributes:
        name: of the field, such as `learning_rate`.
        values: of each trial that has it, by the index of the table of trials; numbers or text.
        numeric: whether they are numbers.
        log: whether they were searched on a logarithmic scale.
        unit: of numbers of tokens, how these are chosen, such as `most_informative`; else "".
    """

    name: str
    values: pd.Series
    numeric: bool
    log: bool
    unit: str = ""


def searches(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials of the search: no finalists, which repeat what it found, none taken up again, no duplicates."""
    return counted(trials)


def measured(trials: pd.DataFrame) -> pd.DataFrame:
    """Those of them that were measured to their end or until they were pruned."""
    found = searches(trials)
    return found[found["outcome"].isin(["complete", "pruned"]) & found["objective"].notna()]


def logarithmic(text: str) -> set[tuple[str, str]]:
    """The label and the field of each hyperparameter that a study file searches on a logarithmic scale.

    Args:
        text: of the study file; one that cannot be read has none.
    """
    try:
        methods = YAML(typ="safe", pure=True).load(text)["methods"]
        pairs = [(label, field, value) for label, fields in methods.items() for field, value in (fields or {}).items()]
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {(str(label), str(field)) for label, field, value in pairs if _is_log(value)}


def _is_log(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "distribution" in value:
        return "log" in str(value["distribution"])
    return any(isinstance(inner, dict) and "log" in str(inner.get("distribution")) for inner in value.values())


def fields(trials: pd.DataFrame, logs: Logs) -> list[Field]:
    """The hyperparameters that vary among these trials, those of most trials first."""
    found = []
    for column in [column for column in trials if column.startswith("hp.")]:
        values = trials[column].dropna()
        if values.nunique() < 2:
            continue
        name = column.removeprefix("hp.")
        numbers, unit = _numbers(values)
        if numbers is None:
            found.append(Field(name, values.astype("str"), False, False))
            continue
        known = {(label, name) for label in trials.loc[values.index, "label"].unique()} & set(logs)
        positive = bool((numbers > 0).all())
        log = positive and (bool(known) or (not logs and numbers.max() > SPREAD * numbers.min()))
        found.append(Field(name, numbers, True, log, unit))
    return sorted(found, key=lambda field: -len(field.values))


def _numbers(values: pd.Series) -> tuple[pd.Series | None, str]:
    """Text as numbers, if that is what it is: plain ones, or counts of tokens such as `most_informative=64`."""
    if pd.api.types.is_bool_dtype(values):
        return None, ""
    plain = pd.to_numeric(values, errors="coerce")
    if plain.notna().all():
        return plain.astype("float64"), ""
    counts = values.astype("str").str.extract(r"^(\w+)=(\d+)$")
    if counts.notna().all(axis=None) and counts[0].nunique() == 1:
        return counts[1].astype("float64"), str(counts[0].iloc[0])
    return None, ""


def rates(trials: pd.DataFrame, goal: stats.Goal) -> dict[str, stats.Sensitivity]:
    """How much the learning rate matters, for each label of which two rates were trained to the end."""
    found: dict[str, stats.Sensitivity] = {}
    if "hp.learning_rate" not in trials:
        return found
    complete = _narrow(measured(trials))
    complete = complete[complete["outcome"] == "complete"]
    complete = complete.assign(rate=pd.to_numeric(complete["hp.learning_rate"], errors="coerce"))
    for label, own in complete[complete["rate"] > 0].groupby("label"):
        if own["rate"].nunique() > 1:
            best = own["objective"].max() if goal == "maximize" else own["objective"].min()
            drop = NEAR_BEST * abs(best)
            found[str(label)] = stats.sensitivity(own["rate"].to_numpy(), own["objective"].to_numpy(), goal, drop)
    return found


def paid(trials: pd.DataFrame, logs: Logs, goal: stats.Goal) -> pd.DataFrame:
    """What came of each value of those hyperparameters that are no plain numbers: modules, tokens, words.

    Columns: label, field, value, tried (trials of the search), complete, mean (of the complete ones), low and high (its
    95 % interval, Student's; NaN of fewer than two), best, trial (number of the best). By label and field, the best
    mean first. Other hyperparameters vary along.
    """
    rows = []
    for label, own in _narrow(searches(trials)).groupby("label"):
        for field in fields(own, logs):
            if field.numeric and not field.unit:
                continue
            for value, index in own.loc[field.values.index].groupby(f"hp.{field.name}").groups.items():
                mine = own.loc[index]
                ended = mine[(mine["outcome"] == "complete") & mine["objective"].notna()]
                found = {"label": label, "field": field.name, "value": str(value), "tried": len(mine)}
                rows.append(found | {"complete": len(ended)} | _summary(ended, goal))
    columns = ["label", "field", "value", "tried", "complete", "mean", "low", "high", "best", "trial"]
    frame = pd.DataFrame(rows, columns=columns).astype({"trial": "Int64"})
    order = frame["mean"] if goal == "minimize" else -frame["mean"]
    return frame.assign(order=order).sort_values(["label", "field", "order"], ignore_index=True).drop(columns="order")


def _narrow(trials: pd.DataFrame) -> pd.DataFrame:
    """What is needed here of a table that may have fifty columns."""
    return trials[["number", "label", "outcome", "objective", *(name for name in trials if name.startswith("hp."))]]


def _summary(complete: pd.DataFrame, goal: stats.Goal) -> dict[str, Any]:
    values = complete["objective"]
    if values.empty:
        return dict.fromkeys(("mean", "low", "high", "best"), np.nan) | {"trial": None}
    at = values.idxmax() if goal == "maximize" else values.idxmin()
    mean, half = float(values.mean()), np.nan
    if len(values) > 1:
        half = float(special.stdtrit(len(values) - 1, (1 + stats.LEVEL) / 2) * values.std() / np.sqrt(len(values)))
    best = {"best": float(values[at]), "trial": int(complete["number"][at])}
    return {"mean": mean, "low": mean - half, "high": mean + half} | best


def rank_by_scale(trials: pd.DataFrame, logs: Logs, goal: stats.Goal) -> pd.DataFrame:
    """The metric by rank and alpha, of each label that searches both.

    Columns: label, rank and alpha (names of the fields), r and scale (text: a value, or a range where there are more
    than a few), r_order and scale_order (to sort by), tried, complete, best, mean (of the complete ones).
    """
    rows = []
    for label, own in _narrow(searches(trials)).groupby("label"):
        found = {field.name: field for field in fields(own, logs) if field.numeric}
        rank = next((found[name] for name in RANKS if name in found), None)
        scale = next((found[name] for name in SCALES if name in found), None)
        if not rank or not scale:
            continue
        cells = pd.DataFrame({"r": _cells(rank), "scale": _cells(scale)}).dropna()
        for (r, alpha), index in cells.groupby(["r", "scale"], observed=True).groups.items():
            mine = own.loc[index]
            values = mine.loc[mine["outcome"] == "complete", "objective"].dropna()
            best = values.max() if goal == "maximize" else values.min()
            place = {"r": str(r), "scale": str(alpha), "r_order": _start(r), "scale_order": _start(alpha)}
            names = {"label": label, "rank": rank.name, "alpha": scale.name}
            numbers = {"tried": len(mine), "complete": len(values), "best": best, "mean": values.mean()}
            rows.append(names | place | numbers)
    columns = ["label", "rank", "alpha", "r", "scale", "r_order", "scale_order", "tried", "complete", "best", "mean"]
    return pd.DataFrame(rows, columns=columns)


def _cells(field: Field) -> pd.Series:
    """Each trial's cell as text: its value, or the range that this lies in."""
    values = field.values
    if values.nunique() <= CELLS:
        return values.map("{:g}".format)
    low, high = values.min(), values.max()
    edges = np.geomspace(low, high, CELLS + 1) if field.log else np.linspace(low, high, CELLS + 1)
    names = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
    places = np.searchsorted(edges, values, side="right").clip(1, CELLS) - 1
    return pd.Series([names[place] for place in places], index=values.index)


def _start(cell: Any) -> float:
    return float(cast("re.Match[str]", re.match(r"[^ ]+", str(cell)))[0])
