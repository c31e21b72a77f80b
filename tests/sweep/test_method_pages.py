"""Every method has a page in docs/methods, the baselines share one, and the snippets there are entries of a study that
runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS

from workbench.adapters import METHODS
from workbench.sweep.spec import load_study

PAGES = Path(__file__).parents[2] / "docs" / "methods"
LLAMA = f"model: {{path: {ASSETS / 'tiny-llama'}, task: SEQ_CLS}}\n"
BASELINES = "baselines"
MODELS = {"adaption_prompt": LLAMA}  # what the tiny BERT of these tests is not


def snippets(method: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (PAGES / f"{method}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("method", "snippet"),
    [pytest.param(m, text, id=text.partition(":")[0]) for m in (*METHODS, BASELINES) for text in snippets(m)],
)
def test_a_snippet_runs(method: str, snippet: str, lab: Any) -> None:
    lab.write(snippet, budget="{trials: 1}", more=MODELS.get(method, ""))
    done = lab.sweep()
    assert (done.code, done.err) == (0, "")
    (trial,) = lab.trials
    assert trial.data.tags["workbench.outcome"] == "complete"
    assert trial.data.metrics["trainable_params"] > 0 or "zero_shot" in snippet


@pytest.mark.parametrize("method", METHODS)
def test_a_page_shows_its_method(method: str, lab: Any) -> None:
    files = [lab.write(snippet, more=MODELS.get(method, "")).file for snippet in snippets(method)[:1]]
    assert [spec.method for file in files for spec in load_study(file).methods.values()] == [method]


def test_no_page_is_left_over():
    assert {page.stem for page in PAGES.glob("*.md")} <= {*METHODS, BASELINES}
