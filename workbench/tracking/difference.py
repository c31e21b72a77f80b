"""In what two trials differ: what they were told to do, and what came of it."""

from __future__ import annotations

from typing import Any

import pandas as pd

TOLD = ("label", "method", "role", "init_seed", "order_seed")
CAME = ("trainable_params", "adapter_bytes", "tokens_seen", "seconds/total")
SPLITS = ("validation.", "test.")
COLUMNS = ["what", "one", "other"]


def configuration(one: pd.Series, other: pd.Series) -> pd.DataFrame:
    """What the trials were told, where it is not the same: columns what, one, other as text; "" is "not set"."""
    names = [*TOLD, *(name for name in one.index if name.startswith("hp."))]
    rows = [(name.removeprefix("hp."), _text(one.get(name)), _text(other.get(name))) for name in names]
    return pd.DataFrame([row for row in rows if row[1] != row[2]], columns=COLUMNS)


def results(one: pd.Series, other: pd.Series) -> pd.DataFrame:
    """What came of them: columns what, one, other (numbers), by (how far the other one is above), percent."""
    names = [name for name in one.index if name.startswith(SPLITS)] + [name for name in CAME if name in one.index]
    rows = [(name, _number(one[name]), _number(other[name])) for name in names]
    frame = pd.DataFrame([row for row in rows if not all(map(pd.isna, row[1:]))], columns=COLUMNS)
    by = frame["other"] - frame["one"]
    return frame.assign(by=by, percent=100 * by / frame["one"].abs().where(frame["one"] != 0))


def _number(value: Any) -> float:
    return float("nan") if pd.isna(value) else float(value)


def _text(value: Any) -> str:
    if value is None or pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
