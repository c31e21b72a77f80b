"""Batches in parts of about one length."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from workbench.training import parts
from workbench.training.parts import by_length

CPU, GPU = "cpu", "cuda"
LENGTHS = [
    torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 2, 5, 9, 12)
] + [[7] * 6, [1, 500, 1, 500]]


def cost(lengths: list[int], made: list[list[int]]) -> int:
    return sum(len(part) * max(lengths[i] for i in part) + parts.OVERHEAD for part in made)


@pytest.mark.parametrize("kind", [CPU, GPU])
@pytest.mark.parametrize("most", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_every_row_is_in_one_part(lengths: list[int], most: int | None, kind: str) -> None:
    made = by_length(lengths, most, kind)
    assert sorted(i for part in made for i in part) == list(range(len(lengths)))
    assert all(0 < len(part) <= (most or len(lengths)) for part in made)


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("lengths", LENGTHS[:4], ids=len)
def test_no_other_parts_cost_less(lengths: list[int], most: int | None) -> None:
    """Of all ways to cut the rows, sorted by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    n = len(order)
    every = [
        [order[a:b] for a, b in zip((0, *cuts), (*cuts, n), strict=True)]
        for k in range(n)
        for cuts in combinations(range(1, n), k)
    ]
    least = min(cost(lengths, made) for made in every if max(map(len, made)) <= (most or n))
    assert cost(lengths, by_length(lengths, most, CPU)) == least


def test_lengths_far_apart_go_apart_on_a_cpu_only() -> None:
    assert by_length([500, 10, 500, 10], None, CPU) == [[1, 3], [0, 2]]
    assert by_length([500, 10, 500, 10], None, GPU) == [[1, 3, 0, 2]]
    assert by_length([10] * 4, None, CPU) == [[0, 1, 2, 3]]
