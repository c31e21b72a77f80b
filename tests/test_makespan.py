"""benchmarks/makespan.py: both sides are given the same work, and results find their place."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from torch import nn

from workbench.adapters import get_peft_model
from workbench.sweep.configure import peft_config
from workbench.sweep.spec import load_study
from workbench.training.base import load_base
from workbench.training.config import ModelSection
from workbench.training.data import batches

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from speed import ours, peer, report, studies  # noqa: E402
from speed.work import SHIPPED, Work  # noqa: E402


@pytest.fixture(scope="module")
def work() -> Work:
    trials = studies.mixed_trials(str(SHIPPED), layers=3)
    return Work(str(SHIPPED), trials, steps=7, eval_every=3, train_rows=96, eval_rows=32)


def test_the_peer_sees_the_same_batches(work: Work) -> None:
    own = batches(work.train_rows, work.batch_size, work.steps, work.seed)
    assert peer.row_order(work) == list(chain(*own))


def test_our_side_is_a_study_that_is_right(work: Work, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    with file.open("w") as stream:
        YAML().dump(ours.study_file(work), stream)
    study = load_study(file)
    assert list(study.methods) == list(work.trials)
    assert len(study.methods) == study.budget.trials == 16


@pytest.mark.parametrize("kind", ["lora", "last", "ia3", "tokens", "head"])
def test_both_sides_train_as_many_parameters(work: Work, kind: str) -> None:
    label = next(label for label in work.trials if label.startswith(kind))
    fields = {key: value for key, value in work.trials[label].items() if key != "learning_rate"}
    theirs = trainable(peer.adapted_model(work.model, dict(fields)))
    if kind == "head":
        fields = dict(ours.HEAD_ONLY)
    base = load_base(ModelSection(path=work.model, task="SEQ_CLS"), ["negative", "positive"], 0, "cpu")
    own = trainable(get_peft_model(base.model, peft_config(fields.pop("method"), "SEQ_CLS", fields, work.steps)))
    assert theirs == own > 0


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_results_find_their_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- makespan step -->\nold\n<!-- end -->\nb\n<!-- makespan lora -->\n<!-- end -->\n")
    report.write_into(page, "step", "new \\1")
    assert page.read_text() == (
        "a\n<!-- makespan step -->\nnew \\1\n<!-- end -->\nb\n<!-- makespan lora -->\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="no place"):
        report.write_into(page, "linear", "new")


def test_every_section_has_a_place_in_the_page() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    sections = ("mixed", "lora", "step", "tokens", "orchestration", "linear")
    assert [name for name in sections if f"<!-- makespan {name} -->" not in text] == []


def test_a_bar_is_met_by_the_median() -> None:
    assert report.times("x", [3.9, 4.1, 9.0], 4).met is True
    assert report.times("x", [3.9, 3.8, 9.0], 4).met is False
