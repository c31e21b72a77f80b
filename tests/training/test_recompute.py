"""Layers that are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench.training.data import collate
from workbench.training.recompute import recomputed

from .places import LAYERS, State, make_base, make_data

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("kind", "task", "depth"), [("bert", "SEQ_CLS", LAYERS), ("llama", "CAUSAL_LM", LAYERS), ("t5", "SEQ_2_SEQ_LM", 4)]
)
def test_gradients_are_the_same_and_the_model_stays(kind: str, task: str, depth: int) -> None:
    model: Any = make_base(kind, task).model
    batch = collate(make_data(task).train, range(4))
    table = model.get_input_embeddings().weight.requires_grad_(True)
    state = State.of(model)
    runs: list[int] = []
    layers = [m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    inner = [next(child for child in m.modules() if isinstance(child, torch.nn.Linear)) for m in layers]
    assert len({id(m) for m in inner}) == depth
    found = []
    for on in (False, True):
        hooks = [m.register_forward_hook(lambda *_: runs.append(1)) for m in inner]
        with recomputed(model, on):
            model(**batch).loss.backward()
        for hook in hooks:
            hook.remove()
        found.append(table.grad.clone())
        table.grad = None
        assert len(runs) == depth * (2 if on else 1)
        runs.clear()
        state.check(model)
    assert torch.equal(*found)


def test_nothing_is_recomputed_without_gradients() -> None:
    model: Any = make_base("bert", "SEQ_CLS").model
    state = State.of(model)
    batch = collate(make_data("SEQ_CLS").train, range(4))
    with torch.no_grad(), recomputed(model):
        again = model(**batch).logits
        assert torch.equal(again, model(**batch).logits)
    with pytest.raises(ZeroDivisionError), recomputed(model):
        raise ZeroDivisionError
    state.check(model)
