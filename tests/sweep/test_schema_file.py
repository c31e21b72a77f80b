"""The schema that editors use beside the shipped studies is the one that `workbench schema` prints."""

from __future__ import annotations

import json
from pathlib import Path

from workbench.sweep.schema import json_schema

FILE = Path(__file__).parents[2] / "studies" / "study.schema.json"


def test_the_shipped_schema_is_up_to_date():
    assert json.loads(FILE.read_text()) == json_schema(), "run: workbench schema > studies/study.schema.json"
