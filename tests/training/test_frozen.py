"""Activations that are kept: what is computed, what is not, and for how long."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.training.frozen import BEGUN, MISSING, TOKENS, Activations, by_tokens, bytes_in
from workbench.training.layout import Group
from workbench.training.packed import Packed
from workbench.training.rows import Rows

from .places import LAYERS, Place, counted

Places = Callable[[str], Place]
LIMIT = 2**30


@pytest.fixture(params=["classifying", "tagging", "continuing"])
def packed(request: pytest.FixtureRequest, places: Places) -> Packed:
    return Packed(places(request.param).base)


@pytest.fixture
def rows(packed: Packed, request: pytest.FixtureRequest, places: Places) -> Rows:
    return Rows.of("train", places(request.node.callspec.params["packed"]).data.train)


def asked(rows: Rows, *indices: int) -> Group:
    where = torch.tensor(indices)
    return Group(rows, where, torch.zeros_like(where))


def known(store: Activations, group: Group, layer: int) -> Tensor:
    return store.known(group, layer, torch.arange(len(group.indices)))


def test_what_is_kept_is_what_the_model_computes(packed: Packed, rows: Rows, tmp_path: Path) -> None:
    store, group = Activations(packed, tmp_path / "own", LIMIT), asked(rows, 7, 2, 3)
    with torch.no_grad():
        for layer in range(1, LAYERS + 1):
            assert store.prepare(rows, layer, torch.arange(len(rows)))
            expected = packed.activations(group, layer)
            torch.testing.assert_close(known(store, group, layer), expected, atol=1e-5, rtol=1e-5)
            assert len(expected) == (3 if packed.pooled and layer == LAYERS else int(group.lengths.sum()))


def test_only_what_is_missing_is_computed(
    packed: Packed, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    activations = Packed.activations

    def spy(self: Packed, group: Group, *rest: object) -> Tensor:
        computed.extend(group.indices.tolist())
        return activations(self, group, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Packed, "activations", spy)
    store = Activations(packed, tmp_path / "own", LIMIT)
    for wanted, new in (([3, 1, 3], [1, 3]), ([1, 2, 3, 4], [2, 4]), ([4, 3, 2, 1], [])):
        assert store.prepare(rows, 2, torch.tensor(wanted))
        assert sorted(computed) == new
        computed.clear()
    again = Activations(packed, tmp_path / "own", LIMIT)  # as of another process
    assert again.prepare(rows, 2, torch.tensor([1, 2, 5]))
    assert computed == [5]
    torch.testing.assert_close(known(again, asked(rows, 2, 1), 2), known(store, asked(rows, 2, 1), 2), atol=0, rtol=0)


def test_what_another_began_is_computed_again(
    packed: Packed, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died. What it has not begun comes first."""
    store = Activations(packed, tmp_path / "own", LIMIT)
    store.prepare(rows, 1, torch.tensor([0, 1]))
    expected = known(store, asked(rows, 0, 1), 1).clone()
    shelf = store._shelf(rows, 1)
    assert shelf is not None
    shelf.values.zero_()
    shelf.state[0], shelf.state[1] = BEGUN, MISSING
    computed = counted(monkeypatch)
    store.prepare(rows, 1, torch.tensor([0, 1]))
    assert computed == [1, 1]
    torch.testing.assert_close(known(store, asked(rows, 0, 1), 1), expected, atol=1e-6, rtol=1e-6)


def test_processes_fill_a_store_together(packed: Packed, rows: Rows, tmp_path: Path) -> None:
    def fill() -> None:
        torch.set_num_threads(1)  # the thread pool of the one that forked does not live here
        for layer in (2, 1, 3):
            assert Activations(packed, tmp_path / "own", LIMIT).prepare(rows, layer, torch.arange(len(rows)))

    children = [multiprocessing.get_context("fork").Process(target=fill) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    store, group = Activations(packed, tmp_path / "own", LIMIT), asked(rows, *range(len(rows)))
    for layer in (1, 2, 3):
        shelf = store._shelf(rows, layer)
        assert shelf is not None
        assert shelf.holds(torch.arange(len(rows)))
        with torch.no_grad():
            expected = packed.activations(group, layer)
        torch.testing.assert_close(known(store, group, layer), expected, atol=1e-5, rtol=1e-5)


def test_higher_layers_begin_with_lower_ones(packed: Packed, rows: Rows, tmp_path: Path) -> None:
    """And keep of these what was missing."""
    ran: list[int] = []
    hooks = [
        next(module for module in layer.modules() if isinstance(module, torch.nn.Linear)).register_forward_hook(
            lambda *_, i=i: ran.append(i)  # type: ignore[misc]
        )
        for i, layer in enumerate(packed.layers)
    ]
    store = Activations(packed, tmp_path / "own", LIMIT)
    for layer, wanted, expected in (
        (1, [0, 1], {0}),
        (2, [0, 1], {1}),
        (3, [1], {2}),
        (3, [1, 2], {0, 1, 2}),
        (1, [2], set()),
    ):
        store.prepare(rows, layer, torch.tensor(wanted))
        assert set(ran) == expected
        ran.clear()
    for hook in hooks:
        hook.remove()


def test_without_room_nothing_is_kept(packed: Packed, rows: Rows, tmp_path: Path) -> None:
    store = Activations(packed, tmp_path / "own", 1000)
    assert not store.prepare(rows, 1, torch.tensor([0]))
    assert bytes_in(tmp_path) == 0


def test_others_make_way_the_oldest_first(packed: Packed, rows: Rows, tmp_path: Path) -> None:
    size = int(rows.starts[-1]) * 16 * 4
    for age, name in ((300, "old"), (200, "newer"), (100, "newest")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train-1").write_bytes(bytes(size))
        os.utime(folder, (0, 1000 - age))
    store = Activations(packed, tmp_path / "own", 3 * size + 1000)
    assert store.prepare(rows, 1, torch.tensor([0]))
    assert {folder.name for folder in tmp_path.iterdir()} == {"newer", "newest", "own"}
    assert store.prepare(rows, 2, torch.tensor([0]))
    assert {folder.name for folder in tmp_path.iterdir()} == {"newest", "own"}


def test_passes_that_fill_the_store_are_of_bounded_size() -> None:
    lengths = torch.tensor([1000] * 9 + [5000, 10])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rows = Rows("train", None, torch.zeros(0), None, torch.zeros(0), starts)  # type: ignore[arg-type]
    parts = by_tokens(torch.arange(11), rows, TOKENS)
    assert torch.cat(parts).tolist() == list(range(11))
    assert all(len(part) == 1 or int(lengths[part].sum()) <= 2 * TOKENS for part in parts)
    assert len(parts) > 2
    assert by_tokens(torch.arange(0), rows, TOKENS) == []
