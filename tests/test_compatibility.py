"""docs/compatibility.md, the map of names and the selection of benchmarks/peer_suite fit together."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "peer_suite"
PAGE = ROOT / "docs" / "compatibility.md"
NAMES = json.loads((SUITE / "names.json").read_text())


def known_module() -> Any:
    spec = importlib.util.spec_from_file_location("known", SUITE / "known.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["known"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


known = known_module()
ROWS = known.read(PAGE)
SELECTED = gzip.decompress((SUITE / "public.txt.gz").read_bytes()).decode().splitlines()


def test_every_row_of_the_page_is_read() -> None:
    assert PAGE.read_text().count("\n| `tests/") == len(ROWS) > 0
    assert len(SELECTED) == len(set(SELECTED)) == 5712


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.pattern)
def test_every_row_speaks_of_selected_tests(row: Any) -> None:
    matched = [test for test in SELECTED if known.matching(test, ROWS) == row]
    assert len(matched) >= max(row.count, 1)


@pytest.mark.parametrize("name", NAMES["names"])
def test_every_mapped_name_exists(name: str) -> None:
    module, _, attribute = NAMES["names"][name].partition(":")
    assert hasattr(importlib.import_module(module), attribute)


def test_counts_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    first = next(test for test in SELECTED if known.matching(test, ROWS) == ROWS[0])
    known.write_counts(page, [first, "tests/test_none.py::test_unknown"])
    assert [row.count for row in known.read(page)] == [1, *[0] * (len(ROWS) - 1)]
    assert page.read_text().replace(" | 1 | ", "").count("\n") == PAGE.read_text().count("\n")
