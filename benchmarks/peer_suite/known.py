"""The failures of the peer's tests that docs/compatibility.md explains: the rows of its table

    | tests that fail | count | why |

where the first column is a test id in backticks, in which `*` stands for anything. Of several rows that match a test,
the first counts.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROW = re.compile(r"^\| `(?P<pattern>tests/[^`]+)` \| (?P<count>\d+) \| (?P<reason>.+) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Known:
    """One row: how many of the tests that a pattern matches fail, and why."""

    pattern: str
    count: int
    reason: str

    def matches(self, test: str) -> bool:
        """Whether the row speaks of a test."""
        return re.fullmatch(re.escape(self.pattern).replace(r"\*", ".*"), test) is not None


def read(page: Path) -> list[Known]:
    """The rows of a page, in order."""
    rows = ROW.finditer(page.read_text())
    return [Known(row["pattern"].replace(r"\|", "|"), int(row["count"]), row["reason"]) for row in rows]


def matching(test: str, listed: list[Known]) -> Known | None:
    """The row that explains a test."""
    return next((known for known in listed if known.matches(test)), None)


def write_counts(page: Path, failures: list[str]) -> None:
    """Set the count of every row to the number of these failures that it explains."""
    listed = read(page)
    counts = Counter(matching(test, listed) for test in failures)
    found = iter(listed)
    page.write_text(
        ROW.sub(lambda row: f"| `{row['pattern']}` | {counts[next(found)]} | {row['reason']} |", page.read_text())
    )
