"""A comparison as text: one list of columns, four formats."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

from .leaderboard import brief, there

if TYPE_CHECKING:
    from rich.table import Table

    from .comparison import Comparison, Row

Format = Literal["table", "markdown", "latex", "csv"]

TIED = "†"
LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "†": r"$^{\dagger}$",
}


@dataclass(frozen=True)
class Column:
    """One column of every format.

    Attributes:
        name: in CSV.
        heading: for a person; `{metric}` and `{memory}` are filled in.
        full: the value itself.
        short: the same in a few characters.
        number: whether it stands to the right.
        paper: whether it is in LaTeX, whose pages are narrow.
    """

    name: str
    heading: str
    full: Callable[[Row], Any]
    short: Callable[[Row], str]
    number: bool = True
    paper: bool = True


def number(value: float) -> str:
    """A metric in a few digits, "" if it is unknown."""
    return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return "" if math.isnan(value) else f"{value:+.4f}" if abs(value) < 10 else f"{value:+.2f}"


def _marked(row: Row) -> str:
    tied = row.judged is not None and row.judged.tied and not row.judged.best
    return f"{number(row.value)}{TIED if tied else ''}"


def _interval(row: Row) -> str:
    return f"[{number(row.judged.estimate.low)}, {number(row.judged.estimate.high)}]" if row.judged else ""


def _behind(row: Row) -> str:
    return signed(row.judged.behind.difference.value) if row.judged and row.judged.behind else ""


def _front(row: Row) -> str:
    return f"{row.judged.front:.2f}" if row.judged else ""


def _seconds(row: Row) -> str:
    return f"{row.seconds:,.1f}" if there(row.seconds) else ""


def _count(value: float) -> str:
    return f"{value:,.0f}" if there(value) else ""


def _kib(value: float) -> str:
    return f"{value / 1024:,.1f}" if there(value) else ""


def searched(row: Row) -> str:
    """Those hyperparameters that differ between trials."""
    return ", ".join(f"{name}={brief(row.hyperparameters[name])}" for name in row.searched)


def _everything(row: Row) -> str:
    return json.dumps(dict(row.hyperparameters))


def _estimate(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.judged.estimate, name) if row.judged else None


def _difference(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.judged.behind.difference, name) if row.judged and row.judged.behind else None


def _bootstrap(name: str) -> Callable[[Row], Any]:
    return lambda row: getattr(row.judged.behind.bootstrap, name) if row.judged and row.judged.behind else None


def _spread(name: str) -> Callable[[Row], str]:
    return lambda row: number(getattr(row.judged.estimate, name)) if row.judged else ""


COLUMNS = [
    Column("method", "method", lambda row: row.label, lambda row: row.name, number=False),
    Column("trial", "trial", lambda row: row.trial, lambda row: str(row.trial), paper=False),
    Column("value", "{metric}", lambda row: row.value, _marked),
    Column("low", "95 % interval", _estimate("low"), _interval),
    Column("runs", "runs", lambda row: row.runs, lambda row: str(row.runs)),
    Column("sd_initialisation", "sd init.", _estimate("sd_initialisation"), _spread("sd_initialisation")),
    Column("sd_order", "sd order", _estimate("sd_order"), _spread("sd_order")),
    Column("difference", "to best", _difference("value"), _behind),
    Column("pareto_probability", "Pareto", lambda row: row.judged.front if row.judged else None, _front),
    Column("trainable_params", "trainable", lambda row: row.trainable_params, lambda row: _count(row.trainable_params)),
    Column("adapter_bytes", "KiB", lambda row: row.adapter_bytes, lambda row: _kib(row.adapter_bytes), paper=False),
    Column("memory", "{memory}", lambda row: row.memory, lambda row: _count(row.memory)),
    Column("seconds", "seconds", lambda row: row.seconds, _seconds),
    Column("default", "default", lambda row: row.default, lambda row: number(row.default), paper=False),
    Column("gain", "gain", lambda row: row.gain, lambda row: signed(row.gain)),
    Column("hyperparameters", "hyperparameters", _everything, searched, number=False, paper=False),
]
ONLY_CSV: dict[str, Callable[[Row], Any]] = {
    "kind": lambda row: row.kind,
    "high": _estimate("high"),
    "se": _estimate("se"),
    "df": _estimate("df"),
    "seeds_known": _estimate("seeds_known"),
    "failed_runs": lambda row: row.failed,
    "best": lambda row: row.judged.best if row.judged else None,
    "tied_with_best": lambda row: row.judged.tied if row.judged else None,
    "difference_low": _difference("low"),
    "difference_high": _difference("high"),
    "p_holm": lambda row: row.judged.behind.p if row.judged and row.judged.behind else None,
    "bootstrap_low": _bootstrap("low"),
    "bootstrap_high": _bootstrap("high"),
    "bootstrap_method": _bootstrap("method"),
    "implementation": lambda row: row.method,
}


def title(found: Comparison) -> str:
    """What a table shows."""
    better = "higher" if found.goal == "maximize" else "lower"
    return f"{found.study}: {found.split} {found.metric} ({better} is better)"


def columns(found: Comparison) -> list[tuple[str, Column]]:
    """The columns in which some row has something, with their headings."""
    words = {"metric": found.metric, "memory": found.memory or "memory"}
    used = [column for column in COLUMNS if not found.rows or any(map(column.short, found.rows))]
    return [(column.heading.format(**words), column) for column in used]


def is_best(row: Row) -> bool:
    """Whether a row is to stand out."""
    return row.judged is not None and row.judged.best


def table(found: Comparison) -> Table:
    """For a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title(found)), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    shown = columns(found)
    for heading, column in shown:
        if column.number:
            made.add_column(escape(fill(heading, 10)), justify="right", no_wrap=True)
        else:
            made.add_column(escape(heading), overflow="fold")
    for row in found.rows:
        cells = [escape(column.short(row)) for _, column in shown]
        made.add_row(*cells, style="bold" if is_best(row) else None)
    return made


def markdown(found: Comparison) -> str:
    """A table for GitHub, and the notes."""
    shown = columns(found)
    lines = [
        [_markdown(heading) for heading, _ in shown],
        ["---:" if column.number else "---" for _, column in shown],
    ]
    for row in found.rows:
        cells = [_markdown(column.short(row)) for _, column in shown]
        lines.append([f"**{cell}**" if cell else "" for cell in cells] if is_best(row) else cells)
    made = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {_markdown(note)}" for note in found.notes)
    return f"**{_markdown(title(found))}**\n\n{made}\n\n{notes}\n"


def latex(found: Comparison) -> str:
    """A table that needs the package booktabs, with the notes below."""
    shown = [(heading, column) for heading, column in columns(found) if column.paper]
    places = "".join("r" if column.number else "l" for _, column in shown)
    body = []
    for row in found.rows:
        cells = [_latex(column.short(row)) for _, column in shown]
        body.append([rf"\textbf{{{cell}}}" if cell else "" for cell in cells] if is_best(row) else cells)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{_latex(title(found))}}}",
        rf"\begin{{tabular}}{{{places}}}",
        r"\toprule",
        " & ".join(_latex(heading) for heading, _ in shown) + r" \\",
        r"\midrule",
        *(" & ".join(cells) + r" \\" for cells in body),
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"\medskip\raggedright " + "\n".join(_latex(note) for note in found.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(several: Sequence[Comparison]) -> str:
    """All studies in one table, with every digit; what is unknown is empty."""
    text = io.StringIO()
    fields = {column.name: column.full for column in COLUMNS} | ONLY_CSV
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "metric", "goal", "split", "reference", *fields])
    for found in several:
        about = [found.study, found.metric, found.goal, found.split, found.reference]
        writer.writerows([*about, *(_plain(full(row)) for full in fields.values())] for row in found.rows)
    return text.getvalue()


def _plain(value: Any) -> str:
    return (repr(value) if isinstance(value, float) else str(value)) if there(value) else ""


def _markdown(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", r"\|") if i % 2 else re.sub(r"([\\*_<>|\[\]~])", r"\\\1", part)
        for i, part in enumerate(parts)
    )


def _latex(text: str) -> str:
    words = re.sub(r"`([^`]*)`", r"'\1'", text)
    return "".join(LATEX.get(character, character) for character in words)
