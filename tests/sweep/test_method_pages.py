"""Every method has a page in docs/methods, and the snippets there are entries that a study accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workbench.adapters import METHODS
from workbench.sweep.spec import load_study

PAGES = Path(__file__).parents[2] / "docs" / "methods"
STUDY = """
study: page
model: {path: some/model, task: SEQ_CLS}
data: {path: some/data, text: text, label: label}
training: {steps: 10}
budget: {trials: 2}
methods:
"""


def snippets(page: Path) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_page_whose_snippets_are_right(method: str, tmp_path: Path):
    page = PAGES / f"{method}.md"
    found = snippets(page)
    assert found
    used = set()
    for i, snippet in enumerate(found):
        file = tmp_path / f"{i}.yaml"
        file.write_text(STUDY + "".join(f"  {line}\n" for line in snippet.splitlines()))
        used |= {spec.method for spec in load_study(file).methods.values()}
    assert method in used


def test_no_page_is_left_over():
    assert {page.stem for page in PAGES.glob("*.md")} <= set(METHODS)
