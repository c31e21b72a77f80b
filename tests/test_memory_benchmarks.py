"""benchmarks/gemma_embedding.py and benchmarks/memory.py, on models that take no time: what they say holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from workbench.training.config import DataSection, ModelSection
from workbench.training.tracker import Tracker

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gemma_embedding as gemma  # noqa: E402
import memory  # noqa: E402
from plain_step import PAGE, plain_peak, write_into  # noqa: E402

# as gemma-2-2b in what matters here: the matrix is far larger than a layer, and the logits are smaller than it
THIN = Gemma2Config(
    vocab_size=4_000,
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=256,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    tie_word_embeddings=True,
    use_cache=False,
)
BATCH = gemma.some_text(THIN, rows=1, length=16)
TRIAL = ("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"]})


@pytest.fixture(scope="module")
def tiny() -> memory.Subject:
    data = DataSection(path=str(memory.DATA), text="text", max_rows={"train": 16, "validation": 8})
    return memory.Subject(ModelSection(path=str(memory.TOKENIZER), task="CAUSAL_LM"), data, batch_size=4)


@pytest.mark.parametrize("foreach", [False, True], ids=["by tensor", "foreach"])
@pytest.mark.parametrize("case", gemma.CASES, ids=lambda case: case.name)
def test_a_plain_step_takes_what_is_predicted(case: gemma.Case, foreach: bool) -> None:
    tracked = plain_peak(Tracker(), gemma.build(THIN), BATCH, case.adapt, foreach)
    assert gemma.predicted(THIN, BATCH, case.adapt, foreach) == pytest.approx(tracked, rel=memory.BAR)


def test_ours_never_takes_more() -> None:
    peak = {case.name: gemma.predicted(THIN, BATCH, case.adapt) for case in gemma.CASES}
    pairs = [(name, name.replace("ours", "peft")) for name in peak if name.endswith("ours")]
    assert len(pairs) == 3
    for ours, theirs in pairs:
        assert peak[ours] <= peak[theirs] < peak["the embedding matrix"]


@pytest.mark.parametrize("trials", [[TRIAL], [TRIAL, TRIAL], []], ids=["LoRA", "two in one pass", "full"])
def test_a_row_of_the_table(trials: list[memory.Trial], tiny: memory.Subject, tmp_path: Path) -> None:
    found = memory.measure(tiny, memory.Combination("tiny", "x", trials), tmp_path)
    assert found.met(cuda=False)
    assert memory.off(found.step[0], found.allocated) == pytest.approx(0, abs=memory.BAR)
    assert memory.line("tiny/x", found).count("|") == memory.HEAD.splitlines()[0].count("|")


def test_what_is_measured() -> None:
    labels = [combination.label for combination in memory.combinations()]
    assert len(set(labels)) == len(labels) >= 14


def test_tables_find_their_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_into("gemma", "old", page)
    write_into("accuracy", "b", page)
    write_into("gemma", "new \\1", page)
    assert page.read_text() == (
        "# Memory\n\n<!-- gemma -->\nnew \\1\n<!-- /gemma -->\n\n<!-- accuracy -->\nb\n<!-- /accuracy -->\n"
    )
    assert [name for name in ("gemma", "accuracy") if f"<!-- /{name} -->" not in PAGE.read_text()] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", [gemma, memory], ids=lambda module: module.__name__)
def test_without_a_gpu_none_is_measured(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", "--cuda"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "there is no GPU" in capsys.readouterr().err
