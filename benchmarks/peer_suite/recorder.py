"""A pytest plugin: keeps the selected tests and records what comes of each, and which methods it is about."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")


@dataclass
class Result:
    """What came of one test.

    Attributes:
        id: as in the selection.
        outcome: "passed", "failed", "skipped", or "missing" if the test asked for a name that we lack.
        methods: those whose configurations its parameters or, if there are none, its source name.
        why: the first line of what was raised, or the reason of a skip.
        seconds: wall time.
    """

    id: str
    outcome: str = "passed"
    methods: list[str] = field(default_factory=list)
    why: str = ""
    seconds: float = 0.0


class Recorder:
    """Records the tests of one pytest run, of which only the `selected` ones are kept (None: all).

    Attributes:
        results: by test id, in order.
        seen: the ids of all tests that were collected, selected or not.
    """

    def __init__(self, selected: set[str] | None):
        self.selected = selected
        self.results: dict[str, Result] = {}
        self.seen: set[str] = set()

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line("markers", f"{marker}: the peer's own")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        shim = sys.modules["peft"]
        if hasattr(shim, "collected"):
            shim.collected()
        names = {cls.__name__: str(type_).lower() for type_, cls in shim.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        names = {name: method.removeprefix("pefttype.") for name, method in names.items()}
        self.seen = {item.nodeid for item in items}
        dropped = [item for item in items if self.selected is not None and item.nodeid not in self.selected]
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item.nodeid in (self.selected or ())]
        self.results |= {item.nodeid: Result(item.nodeid, methods=methods_of(item, names)) for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """A test that stops at a name that we lack is skipped, for the reason MISSING."""
        report = yield
        error = call.excinfo.value if report.failed and call.excinfo else None
        while error is not None:
            if type(error).__name__ == "MissingName":
                report.outcome = "skipped"
                report.longrepr = (str(item.path), 0, f"MISSING {error}")
            error = error.__cause__ or error.__context__
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results[report.nodeid]
        result.seconds = round(result.seconds + report.duration, 3)
        if report.outcome == "passed" or hasattr(report, "wasxfail"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        why = crash.message if crash else told
        result.outcome = "missing" if report.skipped and why.startswith("MISSING") else report.outcome
        result.why = why.partition("\n")[0][:300]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            raised = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.results[report.nodeid] = Result(report.nodeid, "failed", why="; ".join(raised)[:300])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Forget what other options (-k) left out."""
        kept = {item.nodeid for item in session.items}
        self.results = {id: r for id, r in self.results.items() if id in kept or r.outcome == "failed"}


def methods_of(item: Any, names: dict[str, str]) -> list[str]:
    """The methods that a test is about, `names` being those of the configuration classes."""
    parameters = getattr(item, "callspec", None)
    found = {names[name] for name in _class_names(parameters.params if parameters else {}) if name in names}
    if not found:
        found = {names[word] for word in re.findall(r"\w+Config\b", _source(item)) if word in names}
    return sorted(found)


def _class_names(value: Any) -> set[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return {name for element in value for name in _class_names(element)}
    return {value.__name__ if isinstance(value, type) else type(value).__name__}


def _source(item: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(item.function))
    except (OSError, TypeError):  # made at run time
        return ""
