"""A trial that runs out of memory leaves nothing: those in its pass and those after it do not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocator import Limited

from workbench.adapters import LoraConfig
from workbench.errors import OutOfMemory
from workbench.training import bench as bench_file
from workbench.training.memory import release, says_no_memory
from workbench.training.stint import Report, Stint
from workbench.training.trainee import Trainee

from .places import Place, State, Trained, came_of, config_of, made_settings, make_base, make_data, same

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 6
LARGE = 4000  # rank of a trial that is too large
Losses = list[tuple[int, int, float]]


@pytest.fixture
def place(places: Callable[[str], Place], monkeypatch: pytest.MonkeyPatch) -> Place:
    """One that releases memory, as no other test's does; afterwards its base must be as it was."""
    found = places("classifying")
    monkeypatch.setattr(bench_file, "release", release)
    return found


def lora(r: int) -> LoraConfig:
    """With dropout, which would tell of random numbers that another trial has used up."""
    return LoraConfig(task_type="SEQ_CLS", r=r, target_modules=["query", "value"], lora_dropout=0.2)


def normal(place: Place) -> list[Stint]:
    """Trials that fit, on orders of the data of their own."""
    settings = made_settings(steps=STEPS)
    configs = [lora(4), lora(2), config_of("ia3", place.base)]
    return [place.stint(config, settings, seed=i, order_seed=i) for i, config in enumerate(configs)]


def large(place: Place, kind: str) -> Stint:
    if kind == "rank":
        return place.stint(lora(LARGE), made_settings(steps=STEPS))
    return place.stint(lora(4), made_settings(steps=STEPS, batch_size=96))


def train(place: Place, stints: Sequence[Stint]) -> tuple[list[Report], Losses]:
    """Train the stints in one pass."""
    losses: Losses = []
    return place.bench.train(stints, lambda *step: losses.append(step)), losses


def told(stints: Sequence[Stint], reports: Sequence[Report], losses: Losses) -> list[tuple[Trained, list[float]]]:
    """What trials came to, and their losses."""
    trained = [came_of(stint, report) for stint, report in zip(stints, reports, strict=True)]
    return [(own, [loss for t, _, loss in losses if t == s.trial]) for own, s in zip(trained, stints, strict=True)]


def check_equal(found: list[tuple[Trained, list[float]]], expected: list[tuple[Trained, list[float]]]) -> None:
    """To the last bit."""
    for (trained, losses), (other, other_losses) in zip(found, expected, strict=True):
        assert losses == other_losses
        assert trained.metrics == other.metrics
        assert [n for n, tensor in trained.weights.items() if not torch.equal(tensor, other.weights[n])] == []


def limited(place: Place, limit: float = float("inf")) -> Limited:
    """An allocator that knows of the base."""
    return Limited(limit, [*place.base.model.parameters(), *place.base.model.buffers()])


def one_by_one(place: Place) -> list[tuple[Trained, list[float]]]:
    return [told([stint], *train(place, [stint]))[0] for stint in normal(place)]


@pytest.mark.parametrize("kind", ["rank", "batch_size"])
def test_trials_after_it_are_as_if_it_had_not_been(kind: str, place: Place) -> None:
    with limited(place) as plenty:
        expected = one_by_one(place)
    limit = 1.1 * plenty.peak
    with limited(place, limit) as memory:
        first = one_by_one(place)
        before = memory.left()
    state = State.of(place.base.model)
    with memory:
        ((report,), losses) = train(place, [large(place, kind)])
    assert isinstance(report.error, OutOfMemory)
    assert "does not fit into memory; try micro_batch_size, gradient_checkpointing" in str(report.error)
    assert losses == []
    assert report.metrics == {}
    assert memory.left() == before
    state.check(place.base.model)
    with memory:
        after = one_by_one(place)
    check_equal(first, expected)
    check_equal(after, expected)


@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize("kind", ["rank", "batch_size"])
def test_those_in_its_pass_go_on(kind: str, where: int, place: Place) -> None:
    stints = normal(place)
    with limited(place) as plenty:
        together = told(stints, *train(place, stints))
    with limited(place, 1.1 * plenty.peak) as memory:
        train(place, normal(place))
        before, most = memory.left(), place.bench.packing.most
        shared = normal(place)
        shared.insert(where, large(place, kind))
        reports, _ = train(place, shared)
        assert isinstance(reports.pop(where).error, OutOfMemory)
        shared.pop(where)
        for stint, report, (expected, _) in zip(shared, reports, together, strict=True):
            same(came_of(stint, report), expected, 1e-5)
        assert memory.left() == before
        assert place.bench.packing.most == most, "how many trials fit into a pass was never the question"
        again = normal(place)
        check_equal(told(again, *train(place, again)), together)


def test_no_trial_is_blamed_for_what_another_one_holds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = normal(place)[:2]
    begin, made = Trainee._begin, []

    def crowded(self: Trainee, *args: Any) -> None:
        made.append(self.stint.trial)
        if made == [first.trial, second.trial]:  # there would be room without the first one
            raise torch.OutOfMemoryError("CUDA out of memory")
        begin(self, *args)

    monkeypatch.setattr(Trainee, "_begin", crowded)
    reports, losses = train(place, [first, second])
    assert made == [first.trial, second.trial, second.trial]
    check_equal(told([first, second], reports, losses), one_by_one(place)[:2])


# ---------------------------------------------------------------- wherever it happens


class Failing(Limited):
    """Memory runs out at one operation, counted from 1."""

    def __init__(self, at: int, held: Sequence[torch.Tensor]):
        self.count, self.at = 0, at
        super().__init__(held=held)

    def perform(self, *call: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().perform(*call)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_wherever_memory_runs_out_nothing_stays(method: str, place: Place) -> None:
    settings, config = made_settings(steps=2), config_of(method, place.base)
    expected = place.alone(config, settings)
    held = [*place.base.model.parameters(), *place.base.model.buffers()]

    def failing_at(operation: int) -> Failing:
        stint = place.stint(config, settings)
        with Failing(operation, held) as memory, suppress(torch.OutOfMemoryError):
            place.reports([stint])
        return memory

    calm = failing_at(0)
    kept, state = calm.left(), State.of(place.base.model)
    for operation in range(1, calm.count, calm.count // 15):
        assert failing_at(operation).left() <= kept, operation
        state.check(place.base.model)
    check_equal([(place.alone(config, settings), [])], [(expected, [])])


def test_biases_that_train_are_frozen_again(place: Place) -> None:
    """Memory runs out when they are set aside, and the layers are wrapped already."""
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all")
    with limited(place) as memory:
        wrapped: list[bool] = []
        note = memory.note

        def greedy(tensor: torch.Tensor) -> None:
            note(tensor)
            if any("lora" in name for name, _ in place.base.model.named_modules()):
                wrapped.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory")

        memory.note = greedy  # type: ignore[method-assign]
        (report,) = place.reports([place.stint(config, made_settings(steps=1))])
    assert wrapped
    assert isinstance(report.error, OutOfMemory)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("the table is out of memory"), False),
    ],
)
def test_libraries_say_it_in_their_own_words(error: Exception, says: bool) -> None:
    assert says_no_memory(error) == says


# ---------------------------------------------------------------- for real


@pytest.fixture
def on_gpu(tmp_path: Path) -> Iterator[Place]:
    """A tiny model on a GPU of which 256 MiB more may be used than now."""
    device = torch.device("cuda", torch.cuda.current_device())
    base = make_base("bert", "SEQ_CLS")
    base.model.to(device)
    place = Place(replace(base, device=device, kind="cuda"), make_data("SEQ_CLS"), tmp_path)
    place.alone(lora(4), made_settings(steps=STEPS))  # cuBLAS takes its workspace
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 2**28) / total, device)
    yield place
    torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.gpu
def test_a_gpu_out_of_memory_is_as_before(on_gpu: Place) -> None:
    expected, state = one_by_one(on_gpu), State.of(on_gpu.base.model)
    shared = normal(on_gpu)
    together = told(shared, *train(on_gpu, shared))
    release(on_gpu.base.device)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    huge = replace(large(on_gpu, "rank"), config=lora(2**20))  # a third of a GiB of parameters
    (report,), _ = train(on_gpu, [huge])
    assert isinstance(report.error, OutOfMemory)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    state.check(on_gpu.base.model)
    for (trained, _), (other, _) in zip(one_by_one(on_gpu), expected, strict=True):
        same(trained, other, 1e-5)  # a GPU adds up in an order of its own
    stints = [huge, *normal(on_gpu)]
    reports, _ = train(on_gpu, stints)
    assert isinstance(reports[0].error, OutOfMemory)
    for stint, report, (other, _) in zip(stints[1:], reports[1:], together, strict=True):
        same(came_of(stint, report), other, 1e-5)
    assert torch.cuda.memory_allocated() == before[0]
