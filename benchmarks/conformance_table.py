"""Which property holds for which method: the conformance suite as a table.

    python benchmarks/conformance_table.py

Rows are the properties (test functions), columns the methods, entries the number of cases that passed, or passed /
failed / skipped where not all did. The exit code is pytest's: 0 if nothing failed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

SUITE = Path(__file__).parent.parent / "tests" / "adapters" / "test_conformance.py"


class Tally:
    """A pytest plugin that counts outcomes by property and method."""

    def __init__(self) -> None:
        self.methods: dict[str, str] = {}  # by test id
        self.outcomes: Counter[tuple[str, str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            case: Any = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            if case is not None:
                self.methods[item.nodeid] = case.method

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.methods and (report.when == "call" or report.outcome != "passed"):
            name = report.nodeid.partition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
            self.outcomes[name, self.methods[report.nodeid], report.outcome] += 1

    def table(self) -> Table:
        """Properties in the order of the suite, methods in that of the cases."""
        methods = list(dict.fromkeys(self.methods.values()))
        properties = list(dict.fromkeys(name for name, _, _ in self.outcomes))
        table = Table("property", *methods, title="cases passed (or passed / failed / skipped)")
        for name in properties:
            counts = [[self.outcomes[name, m, o] for o in ("passed", "failed", "skipped")] for m in methods]
            table.add_row(name, *(" / ".join(map(str, n)) if any(n[1:]) else str(n[0] or "-") for n in counts))
        return table


def main() -> int:
    """Run the suite and print the table."""
    tally = Tally()
    code = pytest.main([str(SUITE), "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"], plugins=[tally])
    Console(width=1000).print(tally.table())  # as wide as it needs: a cut table says less than a wrapped one
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
