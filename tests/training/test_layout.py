"""The plan of a packed pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.training.data import IGNORED
from workbench.training.layout import BUCKET, Buckets, Group, Layout, lay_out
from workbench.training.rows import Rows

from .places import LAYERS, make_data

CPU = torch.device("cpu")
ROWS = {task: Rows.of("train", make_data(task, pairs=True).train) for task in ("SEQ_CLS", "CAUSAL_LM")}


def group(*entry: int, virtual: int = 0, first: int = 0, task: str = "SEQ_CLS") -> Group:
    """Rows from `first` on, which enter at these layers."""
    prompt = torch.randn(virtual, 4) if virtual else None
    return Group(ROWS[task], torch.arange(first, first + len(entry)), torch.tensor(entry, dtype=torch.long), prompt)


def plan(*groups: Group, pooled: bool = True) -> Layout:
    return lay_out(groups, LAYERS, pooled, CPU)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 9, 2, 8, 4], [64, 1, 2, 64, 47, 48, 60]])
def test_buckets_hold_every_sequence_once(lengths: list[int]) -> None:
    own = torch.tensor(lengths)
    made = Buckets.of(own)
    assert sorted(made.order.tolist()) == list(range(len(lengths)))
    assert made.order[made.back].tolist() == list(range(len(lengths)))
    assert made.padded[made.places].tolist() == list(range(int(own.sum())))
    starts = own.cumsum(0) - own
    sequences = made.order.split([bucket.rows for bucket in made.each])
    padded = made.padded.split([bucket.rows * bucket.length for bucket in made.each])
    for bucket, chosen, tokens in zip(made.each, sequences, padded, strict=True):
        assert bucket.length == int(own[chosen].max())
        assert int(own[chosen].min()) >= BUCKET * bucket.length
        for n, sequence in enumerate(chosen):
            length, there = int(own[sequence]), tokens.view(bucket.rows, bucket.length)[n] - starts[sequence]
            assert there.tolist() == [*range(length), *[length - 1] * (bucket.length - length)]
            mask = torch.ones(bucket.length) if bucket.mask is None else bucket.mask[n, 0, 0]
            assert int(mask.sum()) == length
            assert mask[:length].all()


def owners(layout: Layout) -> Tensor:
    """Of each embedded token, its row among those of all groups that come as tokens."""
    lengths = torch.cat([g.lengths[came] for g, came in zip(layout.groups, layout.came, strict=True)])
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def test_rows_enter_at_their_layer_and_stay() -> None:
    groups = [group(0, 2, 1, 0), group(1, first=4), group(2, 2, first=5)]
    layout = plan(*groups)
    entry = torch.tensor([0, 2, 1, 0, 1, 2, 2])
    assert sorted(layout.stages) == [0, 1, 2]
    assert layout.first == 0
    assert layout.sizes == [int(g.lengths.sum()) for g in groups]
    own = owners(layout)
    before = torch.zeros(0, dtype=torch.long)
    for layer in range(LAYERS):
        stage = layout.stage(layer)
        there = (entry[own] <= layer).nonzero()[:, 0]
        present = torch.arange(len(own)) if stage.present is None else stage.present
        assert torch.equal(present, there)
        assert stage.lengths.tolist() == [int((own == row).sum()) for row in range(7) if entry[row] <= layer]
        assert sum(stage.sizes) == len(there)
        assert stage.rows == [int((e <= layer).sum()) for e in (entry[:4], entry[4:5], entry[5:])]
        entering = torch.cat([(own == row).nonzero()[:, 0] for row in range(7) if entry[row] == layer] or [before[:0]])
        came = torch.cat([before, entering])
        assert torch.equal(came if stage.order is None else came[stage.order], there)
        before = there


def test_rows_may_come_after_all_layers() -> None:
    layout = plan(group(LAYERS, 0, LAYERS), group(LAYERS, first=3), group(1, first=4))
    assert [came.tolist() for came in layout.came] == [[False, True, False], [False], [True]]
    assert layout.rows == [3, 1, 1]
    assert layout.row_order is not None
    names = torch.tensor([1, 4, 0, 2, 3])  # those that came as tokens, then the others
    assert names[layout.row_order].tolist() == [0, 1, 2, 3, 4]
    tokens = plan(group(LAYERS, 0), pooled=False)
    assert tokens.sizes == [int(group(0, 0).lengths.sum())]
    assert sorted(tokens.stages) == [0, LAYERS]


def test_a_pass_may_have_nothing_to_embed() -> None:
    layout = plan(group(LAYERS, LAYERS), group(LAYERS, first=2))
    assert layout.stages == {}
    assert layout.first == LAYERS
    assert layout.inputs["input_ids"].shape == (1, 1)
    assert layout.row_order is None


def test_inputs_are_those_of_the_rows() -> None:
    inputs = plan(group(0, 1, virtual=2), group(0, first=7)).inputs
    rows = ROWS["SEQ_CLS"]
    ids = [rows.ids[rows.starts[i] : rows.starts[i + 1]].tolist() for i in (0, 1, 7)]
    assert inputs["input_ids"].tolist() == [[0, 0, *ids[0], 0, 0, *ids[1], *ids[2]]]
    positions = [*range(2 + len(ids[0])), *range(2 + len(ids[1])), *range(len(ids[2]))]
    assert inputs["position_ids"].tolist() == [positions]
    assert rows.types is not None
    types = [rows.types[rows.starts[i] : rows.starts[i + 1]].tolist() for i in (0, 1, 7)]
    assert inputs["token_type_ids"].tolist() == [[0, 0, *types[0], 0, 0, *types[1], *types[2]]]


@pytest.mark.parametrize("virtual", [0, 2])
def test_a_language_model_predicts_the_next_token(virtual: int) -> None:
    own = group(0, 0, virtual=virtual, task="CAUSAL_LM")
    rows = own.rows
    expected = []
    for i in (0, 1):
        ids = rows.ids[rows.starts[i] : rows.starts[i + 1]].tolist()
        expected += [IGNORED] * (virtual - 1) + (ids if virtual else ids[1:]) + [IGNORED]
    assert own.targets(causal=True).tolist() == expected
    assert len(own.targets(causal=False)) == int(own.lengths.sum())
