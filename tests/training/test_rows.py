"""Splits as tensors."""

from __future__ import annotations

import pytest
import torch

from workbench.training.rows import Rows, ranges

from .places import make_data


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"])
def test_rows_are_those_of_the_split(task: str) -> None:
    split = make_data(task, pairs=True).train
    rows = Rows.of("train", split)
    columns = split.features[:]
    assert len(rows) == len(split)
    assert rows.lengths.tolist() == [len(row) for row in columns["input_ids"]]
    for indices in ([5, 2, 2], [0], []):
        where = rows.tokens(torch.tensor(indices, dtype=torch.long))
        assert rows.ids[where].tolist() == [i for row in indices for i in columns["input_ids"][row]]
        assert rows.types is not None
        assert rows.types[where].tolist() == [i for row in indices for i in columns["token_type_ids"][row]]
        if task == "SEQ_CLS":
            assert rows.labels[indices].tolist() == [columns["labels"][row] for row in indices]
        else:
            assert rows.labels[where].tolist() == [i for row in indices for i in columns["labels"][row]]
    assert Rows.of("train", make_data(task).train).types is None


def test_rows_that_hold_tokens() -> None:
    split = make_data("SEQ_CLS").train
    rows = Rows.of("train", split)
    for tokens in ([7, 20], [0], []):
        expected = [bool({*row} & {*tokens}) for row in split.features["input_ids"]]
        assert rows.holding(tokens).tolist() == expected
    assert any(row for row in rows.holding([7, 20]).tolist())


def test_ranges() -> None:
    assert ranges(torch.tensor([4, 9, 0]), torch.tensor([2, 0, 3])).tolist() == [4, 5, 0, 1, 2]
    assert ranges(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)).tolist() == []
