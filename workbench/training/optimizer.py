"""AdamW for several trials in one step, each with its own learning rate, schedule, weight decay and clipping.

What a trial trains lies in one tensor, and so do its gradients and its moments, so a step is a dozen operations however
many layers there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import get_scheduler

from workbench.errors import CheckpointError

from .config import TrainingSection
from .loop import SCHEDULES

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch's own
MOMENTS = ("exp_avg", "exp_avg_sq")


def schedule(settings: TrainingSection) -> Callable[[int], float]:
    """The share of the peak learning rate at a step, counted from 0, as transformers says."""
    rising = round(settings.warmup * settings.steps)
    unused = torch.optim.SGD([torch.zeros(1)])
    return get_scheduler(SCHEDULES[settings.schedule], unused, rising, settings.steps).lr_lambdas[0]


class Flat:
    """Parameters of one dtype on one device; all their numbers in one tensor, of which each is a view, and so are their
    gradients and moments.

    Attributes:
        gradient, exp_avg, exp_avg_sq: as `value`, which holds the parameters, (numbers,).
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.value = torch.cat([p.detach().flatten() for p in parameters])
        self.gradient, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.value) for _ in range(3))
        self._values, self._gradients = self.views(self.value), self.views(self.gradient)
        self.gather()

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of such a tensor, in their shapes."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    @property
    def tensors(self) -> list[Tensor]:
        """All four."""
        return [self.value, self.gradient, self.exp_avg, self.exp_avg_sq]

    def gather(self) -> list[Tensor]:
        """Take in the parameters' gradients, and their values where these were moved; the gradients."""
        for p, value in zip(self.parameters, self._values, strict=True):
            if not p.data.is_set_to(value):  # a bias of the base that trials train in turn, say
                p.data = value.copy_(p.data)
        every = [(own, p.grad) for p, own in zip(self.parameters, self._gradients, strict=True)]
        new = [(own, gradient) for own, gradient in every if gradient is not None]
        if new:
            torch._foreach_copy_([own for own, _ in new], [gradient for _, gradient in new])
        for p, own in zip(self.parameters, self._gradients, strict=True):
            p.grad = None if p.grad is None else own
        return [own for own, _ in new]

    def untouched(self) -> list[tuple[Tensor, Tensor]]:
        """Of parameters without a gradient, which a step leaves alone as torch does: views of their values and moments,
        and what is in them now."""
        stores = [self._values, self.views(self.exp_avg), self.views(self.exp_avg_sq)]
        absent = [index for index, p in enumerate(self.parameters) if p.grad is None]
        return [(store[index], store[index].clone()) for store in stores for index in absent]


class TrialOptimizer:
    """What AdamW knows of one trial. Its parameters' data and gradients become views of flat tensors.

    Attributes:
        steps: made so far. Unlike torch, which counts them for each parameter, all have this one, so the moments of a
            parameter that was once without a gradient are corrected for their start a little less.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: TrainingSection):
        self.settings, self.steps = settings, 0
        self._share = schedule(settings)
        alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            alike.setdefault((p.dtype, p.device), []).append(p)
        with torch.no_grad():
            self.flats = [Flat(group) for group in alike.values()]

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self.settings.learning_rate * self._share(self.steps)

    def zero_grad(self) -> None:
        """Leave no gradients."""
        for flat in self.flats:
            for p in flat.parameters:
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments and steps, for a checkpoint."""
        moments = {f"{name}.{i}": getattr(flat, name) for i, flat in enumerate(self.flats) for name in MOMENTS}
        return moments | {"steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            CheckpointError: it is of other parameters. Nothing is loaded then.
        """
        own = self.state()
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            raise CheckpointError("The optimiser's state is of other parameters; train this trial from the start.")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])


@torch.no_grad()
def step(optimizers: Sequence[TrialOptimizer]) -> list[float]:
    """Clip each trial's gradients to its norm and make one step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Gives what `clip_grad_norm_`, `AdamW` and `get_scheduler` give each trial alone.

    Returns:
        the norm of each trial's gradients before clipping. A trial whose norm is not finite stays as it was.
    """
    device = optimizers[0].flats[0].value.device
    norms = [
        get_total_norm([g for flat in o.flats for g in flat.gather()]).to(device, torch.float32) for o in optimizers
    ]
    limits = [o.settings.max_grad_norm / (norm + 1e-6) for o, norm in zip(optimizers, norms, strict=True)]
    found, factors = torch.stack([torch.stack(norms), torch.stack(limits).clamp(max=1.0)]).tolist()
    sound = [(o, factor) for o, norm, factor in zip(optimizers, found, factors, strict=True) if math.isfinite(norm)]
    if not sound:
        return found
    flats = [(flat, o, factor) for o, factor in sound for flat in o.flats]
    untouched = [pair for flat, *_ in flats for pair in flat.untouched()]
    values, gradients, means, squares = (
        [getattr(flat, name) for flat, *_ in flats] for name in ("value", "gradient", *MOMENTS)
    )
    rates = [o.learning_rate for _, o, _ in flats]
    counts = [o.steps + 1 for _, o, _ in flats]
    torch._foreach_mul_(gradients, [factor for *_, factor in flats])
    torch._foreach_mul_(values, [1 - lr * o.settings.weight_decay for lr, (_, o, _) in zip(rates, flats, strict=True)])
    torch._foreach_lerp_(means, gradients, 1 - BETA1)
    torch._foreach_mul_(squares, BETA2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETA2)
    spreads = torch._foreach_sqrt(squares)
    torch._foreach_div_(spreads, [(1 - BETA2**n) ** 0.5 for n in counts])
    torch._foreach_add_(spreads, EPSILON)
    torch._foreach_addcdiv_(values, means, spreads, [-lr / (1 - BETA1**n) for lr, n in zip(rates, counts, strict=True)])
    for view, before in untouched:
        view.copy_(before)
    for o, _ in sound:
        o.steps += 1
    return found
