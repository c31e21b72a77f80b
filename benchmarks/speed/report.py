"""Results as tables for people and as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench.tracking.runs import environment

PEERS = ("torch", "transformers", "peft", "optuna")


@dataclass
class Row:
    """One bar: what was compared, what was asked, what came out; `met` is None where nothing was asked."""

    what: str
    bar: str
    measured: str
    met: bool | None = None


@dataclass
class Report:
    """What a section found: its rows, a few words on how, and every figure behind them."""

    rows: list[Row]
    how: str
    figures: dict[str, Any]


def times(what: str, ratios: Sequence[float], bar: float | None) -> Row:
    """A row that says how many times sooner, the median of ratios."""
    middle = statistics.median(ratios)
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    asked = f"≥ {bar:g} times" if bar else ""
    return Row(what, asked, f"{middle:.2f} times{spread}", middle >= bar if bar else None)


def markdown(report: Report) -> str:
    """A section's rows and how they were measured."""
    marks = {True: "met", False: "**not met**", None: ""}
    lines = ["| | bar | measured | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.bar} | {row.measured} | {marks[row.met]} |" for row in report.rows]
    return "\n".join([*lines, "", f"{report.how} {date.today():%B %Y}: {machine()}."])


def machine() -> str:
    """Where it was measured, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in PEERS)
    return f"{environment()['cpu']}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def save(file: Path, name: str, report: Report) -> None:
    """Keep a section's figures in a JSON file beside those of the other sections."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = {"date": date.today().isoformat(), "machine": machine(), **asdict(report)}
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False))


def write_into(page: Path, name: str, content: str) -> None:
    """Put a section's text into a page, between its markers `<!-- makespan NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such markers.
    """
    marked = re.compile(rf"(<!-- makespan {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, found = marked.subn(lambda marks: f"{marks[1]}{content}\n{marks[2]}", page.read_text())
    if not found:
        raise ValueError(f"{page} has no place for the results: write <!-- makespan {name} --> and <!-- end --> there.")
    page.write_text(text)
