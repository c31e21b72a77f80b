"""Which tokens train: counts checked by hand, ties by id, refusals that say what to write instead."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import mutual_info_score

from workbench.errors import DataError
from workbench.training.data import Split
from workbench.training.tokens import most_frequent, most_informative, mutual_information, resolve

from .conftest import make_tokenizer


@dataclass
class Choice:
    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    most_frequent: int | None = None
    most_informative: int | None = None


def split(task: str, ids: list[list[int]], labels: list) -> Split:  # type: ignore[type-arg]
    return Split(Dataset.from_dict({"input_ids": ids, "labels": labels}), task, 0)  # type: ignore[arg-type]


ROWS = [[2, 7, 7, 9], [2, 8, 7], [2, 8, 9], [2, 9]]
LABELS = [0, 0, 1, 1]


def test_most_frequent_counts_and_breaks_ties_by_id() -> None:
    rows = split("SEQ_CLS", ROWS, LABELS)
    assert most_frequent(rows, 4) == [2, 7, 9, 8]
    assert most_frequent(rows, 2, exclude=[2, 0, 50]) == [7, 9]
    with pytest.raises(DataError, match="5 tokens are asked for, but the training split has only 4"):
        most_frequent(rows, 5)


def test_most_informative_of_a_row() -> None:
    # 7 decides the class, 9 leans to class 1, 8 and 2 say nothing: of them the lower id comes first
    assert most_informative(split("SEQ_CLS", ROWS, LABELS), 4) == [7, 9, 2, 8]
    assert most_informative(split("SEQ_CLS", ROWS, LABELS), 1, exclude=[7]) == [9]


def test_equal_information_is_equal_in_whatever_order_it_is_summed() -> None:
    counts = list(permutations((7, 3, 1)))  # rows of each class that hold the token: as informative, whatever the class
    rows = [
        [t for t, count in enumerate([*counts, (10, 10, 10)]) if i < count[label]]
        for label in range(3)
        for i in range(10)
    ]
    labels = [label for label in range(3) for _ in range(10)]
    together = np.array(counts, float)
    assert len(set(mutual_information(together, np.array([10, 10, 10])))) > 1, "equal but for rounding"
    assert most_informative(split("SEQ_CLS", rows, labels), 6) == [0, 1, 2, 3, 4, 5]


def test_most_informative_of_a_position() -> None:
    rows = [[2, 7, 8, 9, 3], [2, 9, 7, 3]]
    tags = [[-100, 0, 1, -100, -100], [-100, 1, 0, -100]]
    rows = split("TOKEN_CLS", rows, tags)
    assert most_informative(rows, 1) == [7]
    assert sorted(most_informative(rows, 3)) == [7, 8, 9]
    with pytest.raises(DataError, match="only 3 different"):  # 2 and 3 are never labelled
        most_informative(rows, 4)


def test_most_informative_needs_labels() -> None:
    with pytest.raises(DataError, match="use most_frequent"):
        most_informative(split("CAUSAL_LM", ROWS, ROWS), 1)


def test_mutual_information_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    present, labels = generator.integers(0, 2, (5, 200)), generator.integers(0, 3, 200)
    together = np.array([np.bincount(labels[row == 1], minlength=3) for row in present], float)
    expected = [mutual_info_score(row, labels) for row in present]
    np.testing.assert_allclose(mutual_information(together, np.bincount(labels)), expected, atol=1e-12)


def test_resolve_in_the_order_of_the_choice() -> None:
    tokenizer = make_tokenizer(pad_token="[PAD]")
    tokenizer.add_tokens(["goodbad"])
    good, ann, new = tokenizer.convert_tokens_to_ids(["good", "Ann", "goodbad"])
    rows = split("SEQ_CLS", [[0, 0, ann], [1, 1, ann]], [0, 1])
    assert resolve(Choice(ids=(9,), strings=("good",), new_tokens=("goodbad",), most_frequent=1), tokenizer, rows) == [
        9,
        good,
        new,
        ann,
    ]
    assert resolve(Choice(strings=("##b",)), tokenizer, rows) == [tokenizer.convert_tokens_to_ids("##b")]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(strings=("goodb",)), r"'goodb' is not one token but good ##b. .* write \{new_tokens: \['goodb'\]\}"),
        (Choice(strings=("é",)), r"not one token but \[UNK\]"),
        (Choice(ids=(91,)), r"\[91\] are outside the vocabulary, which has 91 tokens"),
        (Choice(ids=(-1,)), "outside the vocabulary"),
        (Choice(ids=(5, 5)), "chosen twice: 'good'"),
        (Choice(ids=(5,), strings=("good",)), "chosen twice: 'good'"),
    ],
)
def test_resolve_refuses(choice: Choice, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        resolve(choice, make_tokenizer(pad_token="[PAD]"), split("SEQ_CLS", ROWS, LABELS))
