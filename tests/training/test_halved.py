"""A base in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.training import bench as bench_file
from workbench.training.halved import halve

from .places import Place, Trained, config_of, made_settings, make_base, make_data, weights_in

pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = [
    ("bert", "SEQ_CLS"),
    ("roberta", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("llama", "CAUSAL_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
]


@pytest.mark.parametrize(("kind", "task"), TASKS)
def test_weights_are_half_and_heads_are_not(kind: str, task: str) -> None:
    base = make_base(kind, task)
    buffers = {name: buffer.dtype for name, buffer in base.model.named_buffers()}
    halved, difference = halve(base, make_data(task).validation)
    heads = ("classifier", "bert.pooler")
    for name, parameter in halved.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(heads) else torch.bfloat16), name
    assert {name: buffer.dtype for name, buffer in halved.model.named_buffers()} == buffers
    assert halved.fingerprint != base.fingerprint
    assert 0 < difference.logits < 0.15
    assert 0.9 <= difference.agreement <= 1


def test_the_difference_is_what_changes_in_the_answers() -> None:
    base, split = make_base("bert", "SEQ_CLS"), make_data("SEQ_CLS").validation
    with torch.no_grad():
        for parameter in base.model.parameters():  # what bfloat16 holds exactly
            parameter.copy_(parameter.bfloat16())
    _, exact = halve(base, split)
    base = make_base("bert", "SEQ_CLS")
    base.model.bert.embeddings.LayerNorm.weight.data *= 100  # type: ignore[union-attr]
    _, rough = halve(base, split)
    assert exact.logits < rough.logits


@pytest.mark.parametrize(
    ("kind", "task", "method"),
    [
        ("bert", "SEQ_CLS", "lora"),
        ("bert", "SEQ_CLS", "trainable_tokens"),
        ("bert", "TOKEN_CLS", "ia3"),
        ("llama", "CAUSAL_LM", "lora"),
        ("llama", "CAUSAL_LM", "prompt_tuning"),
    ],
)
def test_training_ends_near_that_in_single_precision(
    kind: str, task: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and padded; attention is in single precision."""
    monkeypatch.setattr(bench_file, "release", lambda device: None)
    whole = Place(make_base(kind, task), make_data(task), tmp_path / "whole")
    base, _ = halve(make_base(kind, task), make_data(task).validation)
    halved = Place(base, make_data(task), tmp_path / "halved")
    assert halved.bench.fault == ""
    settings = made_settings(precision="bf16", steps=25)

    def loss(trained: Trained) -> float:
        return trained.metrics["loss"]

    expected = loss(whole.alone(config_of(method, whole.base), made_settings(steps=25)))
    seen: set[torch.dtype] = set()
    attention = F.scaled_dot_product_attention

    def spy(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.add(query.dtype)
        return attention(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    stint = halved.stint(config_of(method, base), settings)
    packed = loss(halved.benched(stint)[0])
    assert {tensor.dtype for tensor in weights_in(stint.checkpoint).values()} == {torch.float32}
    halved.bench.packed = None
    padded = loss(halved.alone(config_of(method, base), settings))
    plain = loss(halved.plainly(config_of(method, base), settings))
    assert seen == {torch.float32}
    assert [packed, padded, plain] == pytest.approx([expected] * 3, rel=0.02)
