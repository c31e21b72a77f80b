"""The optimiser of several trials against torch's for each alone, and trials that are interrupted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from workbench.adapters import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from workbench.errors import CheckpointError
from workbench.training.config import TrainingSection
from workbench.training.loop import SCHEDULES
from workbench.training.optimizer import TrialOptimizer, step

STEPS = 50


def settings(**changes: Any) -> TrainingSection:
    return TrainingSection(steps=STEPS, **changes)


TRIALS = [
    settings(learning_rate=1e-2, schedule="linear", weight_decay=0.1, max_grad_norm=0.2),
    settings(learning_rate=3e-2, schedule="cosine", warmup=0.0, max_grad_norm=5.0),
    settings(learning_rate=2e-3, schedule="constant", warmup=0.3, weight_decay=0.01, max_grad_norm=100.0),
]


class Net(nn.Module):
    """A layer that every input goes through, and one that `skip` leaves out."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        hidden = self.first(x).tanh()
        return hidden.double() if skip else self.second(hidden.double())


def batch(number: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(number))


def reference(net: nn.Module, own: TrainingSection, skip_at: int | None = None) -> list[float]:
    """The steps of `loop.train`, and the gradients' norms."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=own.learning_rate, weight_decay=own.weight_decay)
    rising = round(own.warmup * own.steps)
    scheduler = get_scheduler(SCHEDULES[own.schedule], optimizer, rising, own.steps)
    norms = []
    for number in range(STEPS):
        net(batch(number), skip=skip_at == number).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, own.max_grad_norm).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms


def stepped(nets: list[Any], optimizers: list[TrialOptimizer], number: int, skip: bool = False) -> list[float]:
    for net in nets:
        net(batch(number), skip=skip).square().mean().backward()
    norms = step(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norms


def same(actual: nn.Module, expected: nn.Module) -> None:
    for a, e in zip(actual.parameters(), expected.parameters(), strict=True):
        assert ((a - e).norm() / e.norm()).item() <= 1e-6


def test_several_trials_train_as_each_alone() -> None:
    """Each with its own schedule, rate, decay and clipping, which takes hold in some."""
    nets, alone = [Net(i) for i in range(3)], [Net(i) for i in range(3)]
    optimizers = [TrialOptimizer(net.parameters(), own) for net, own in zip(nets, TRIALS, strict=True)]
    norms = [stepped(nets, optimizers, number) for number in range(STEPS)]
    for k, own in enumerate(TRIALS):
        expected = reference(alone[k], own)
        assert [row[k] for row in norms] == pytest.approx(expected, rel=1e-6)
        assert (max(expected) > own.max_grad_norm) == (k == 0)
        same(nets[k], alone[k])


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    net, alone = Net(0), Net(0)
    optimizer = TrialOptimizer(net.parameters(), TRIALS[0])
    before = copy.deepcopy(net.second.state_dict())
    stepped([net], [optimizer], 0, skip=True)
    torch.testing.assert_close(net.second.state_dict(), before, atol=0, rtol=0)
    reference(alone, TRIALS[0], skip_at=STEPS - 1)
    net = Net(0)
    optimizer = TrialOptimizer(net.parameters(), TRIALS[0])
    for number in range(STEPS):
        stepped([net], [optimizer], number, skip=number == STEPS - 1)
    same(net, alone)


def test_a_trial_without_finite_gradients_stays_as_it_was() -> None:
    nets = [Net(0), Net(1)]
    optimizers = [TrialOptimizer(net.parameters(), TRIALS[0]) for net in nets]
    stepped(nets, optimizers, 0)
    before = [copy.deepcopy((net.state_dict(), o.state())) for net, o in zip(nets, optimizers, strict=True)]
    for net, bad in zip(nets, (math.inf, 1.0), strict=True):
        (net(batch(1)).mean() * bad).backward()
    norms = step(optimizers)
    assert not math.isfinite(norms[0])
    assert math.isfinite(norms[1])
    after = [(net.state_dict(), o.state()) for net, o in zip(nets, optimizers, strict=True)]
    torch.testing.assert_close(after[0], before[0], atol=0, rtol=0)
    assert not torch.equal(after[1][0]["first.weight"], before[1][0]["first.weight"])


def test_a_parameter_that_trials_train_in_turn() -> None:
    """As with a bias of the base: whatever is in it counts, wherever it lies."""
    net, alone = Net(0), Net(0)
    optimizer = TrialOptimizer(net.parameters(), TRIALS[0])
    for number in range(STEPS):
        if number == 20:
            TrialOptimizer(net.parameters(), TRIALS[1])
        if number == 30:
            net.first.bias.data = net.first.bias.data.clone()
        stepped([net], [optimizer], number)
    reference(alone, TRIALS[0])
    same(net, alone)


def test_a_state_of_other_parameters_is_refused() -> None:
    optimizer = TrialOptimizer(Net(0).parameters(), TRIALS[0])
    with pytest.raises(CheckpointError, match="other parameters"):
        optimizer.load(TrialOptimizer(nn.Linear(2, 2).parameters(), TRIALS[0]).state())


# --- interrupted trials ---


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def adalora() -> PeftModel:
    base = mlp()
    config = AdaLoraConfig(
        target_modules=["0", "2", "4"],
        init_r=6,
        target_r=2,
        tinit=5,
        tfinal=10,
        deltaT=3,
        total_step=STEPS,
    )
    return get_peft_model(base, config)


def trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: PeftModel, optimizer: TrialOptimizer, last: int) -> None:
    for number in range(optimizer.steps + 1, last + 1):
        loss = (model(batch(number)) - 1).square().mean() + model.base_model.penalty()
        torch.as_tensor(loss).backward()
        step([optimizer])
        model.base_model.after_step(number)
        optimizer.zero_grad()


@pytest.mark.parametrize("interrupted", [[3], [8, 20], [39, 40], [45], [50]])
def test_interrupted_and_resumed_is_uninterrupted(interrupted: list[int]) -> None:
    """AdaLoRA remembers what its weights were worth, what was dropped, and says so in its configuration."""
    through = adalora()
    train(through, TrialOptimizer(trained(through).values(), TRIALS[0]), STEPS)
    parameters: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    memory: dict[str, Tensor] = {}
    for until in [*interrupted, STEPS]:
        model = adalora()
        optimizer = TrialOptimizer(trained(model).values(), TRIALS[0])
        if parameters:
            with torch.no_grad():
                for name, parameter in trained(model).items():
                    parameter.copy_(parameters[name])
            optimizer.load(moments)
            model.base_model.remember("default", memory)
        train(model, optimizer, until)
        parameters = {name: p.detach().clone() for name, p in trained(model).items()}
        moments = {name: t.clone() for name, t in optimizer.state().items()}
        memory = {name: t.clone() for name, t in model.base_model.memory_of("default").items()}
    expected = {name: p.detach() for name, p in trained(through).items()}
    torch.testing.assert_close(parameters, expected, atol=0, rtol=0)
    patterns: Any = [m.peft_config["default"].rank_pattern for m in (model, through)]  # type: ignore[attr-defined]
    assert patterns[0] == patterns[1]
    assert not all(map(all, patterns[0].values()))


def test_an_adapter_in_flat_tensors_is_saved_and_loaded(tmp_path: Any) -> None:
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False))
    TrialOptimizer(trained(model).values(), TRIALS[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    values = [{name: p.detach() for name, p in trained(m).items()} for m in (model, loaded)]
    torch.testing.assert_close(values[0], values[1], atol=0, rtol=0)
