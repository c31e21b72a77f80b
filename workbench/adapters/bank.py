"""The bank: several models with adapters on one base model, all at work in one pass, each on its own part of the
batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Self

from torch import Tensor, nn

from workbench.errors import AdapterError, LayerKindError

from .adapter import Adapter
from .groups import Groups
from .model import PeftModel
from .prompts import PromptTuner

ABSENT = Adapter()  # on a layer that a model does not adapt


def obstacle(model: PeftModel) -> str | None:
    """Why a model's adapter cannot share a pass with others'; None if it can."""
    tuner = model.base_model
    if len(tuner.state.active) != 1 or not tuner.state.enabled:
        return "not exactly one adapter acts"
    (name,) = tuner.state.active
    if tuner.state.biases[name]:
        return "it trains biases of the base model"
    changed = [path for path, layer in tuner.layers_of(name) if layer.holds_part or layer.merged]
    if changed:
        return f"it has changed the base model's weight at {changed[0]}"
    return None if by_token(model) else "it looks beyond single tokens"


def by_token(model: PeftModel) -> bool:
    """Whether the active adapters treat each token by itself, so that it does not matter how a batch is laid out. A
    prompt counts where it stands before the input."""
    tuner = model.base_model
    layers = [layer.adapter(name) for name in tuner.state.active for _, layer in tuner.layers_of(name)]
    in_cache = isinstance(tuner, PromptTuner) and any(tuner.encoder(name).in_cache for name in tuner.state.active)
    around = [type(a).around is not Adapter.around and not a.replaces for a in layers]
    return not in_cache and not any(around) and all(a.by_row and a.by_token for a in layers)


class Bank:
    """Within this context several models' adapters are on the base model that they share.

    Neighbours whose adapters are of one class run as one where their method knows how, so like goes next to like.

    Args:
        models: by name; each detached from the base model.

    Attributes:
        sizes: how many entries of what flows through the base model belong to each model, in the order of the names; 0
            for a model that is not there. Whoever lays the batch out keeps this up to date.
        dim: the entries' dimension: 0 in a padded batch (rows, length, ...), 1 in a packed one (1, tokens, ...).

    Raises:
        AdapterError: a model is not detached, is on another base model, or cannot share a pass (`obstacle`).
    """

    def __init__(self, models: Mapping[str, PeftModel]):
        self.models = dict(models)
        self.sizes: Sequence[int] = [0] * len(self.models)
        self.dim = 0
        self._banked: list[tuple[nn.Module, str, BankedLayer]] = []
        base = {id(model.get_base_model()) for model in self.models.values()}
        for name, model in self.models.items():
            reason = obstacle(model)
            if reason:
                raise AdapterError(f"{name} cannot be in a bank, since {reason}; train it alone.")
            if len(base) > 1 or not model.base_model.detached:
                raise AdapterError(f"{name} must be on the same base model as the others and detached from it.")

    def __enter__(self) -> Self:
        layers: dict[int, BankedLayer] = {}
        for index, model in enumerate(self.models.values()):
            (name,) = model.active_adapters
            for site, wrapper in model.base_model.wrapped_sites():
                layer = layers.setdefault(id(site.module), BankedLayer(site.module, self))
                layer.adapters[index] = wrapper.named_adapters().get(name, ABSENT)
                self._banked.append((site.parent, site.name, layer))
        for parent, attribute, layer in self._banked:
            setattr(parent, attribute, layer)
        return self

    def __exit__(self, *_: Any) -> None:
        for parent, attribute, layer in self._banked:
            setattr(parent, attribute, layer.base_layer)
        self._banked.clear()


class BankedLayer(nn.Module):
    """A layer of the base model with an adapter of each model of a bank, each on its own group of entries."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, bank: Bank):
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.bank = bank
        self.adapters: list[Adapter] = [ABSENT] * len(bank.models)  # parts of the models, not of the base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """The base layer's output over all entries, each group with what its adapter does.

        Raises:
            LayerKindError: the groups do not make up the input, or the layer gives something else than a tensor.
        """
        sizes, dim = self.bank.sizes, self.bank.dim if len(x) == 1 else 0  # some models flatten (rows, length, ...)
        times, over = divmod(x.shape[dim], max(1, sum(sizes)))
        if over or not any(sizes):
            raise LayerKindError(
                f"The groups of a bank, {list(self.bank.sizes)} along dimension {self.bank.dim}, do not make up the "
                f"input {tuple(x.shape)} of a {type(self.base_layer).__name__}; set `sizes` and `dim` as the batch is "
                "laid out there."
            )
        runs = self._runs([size * times for size in sizes], dim)
        whole = Groups(tuple(sum(run.groups.sizes) for run in runs), dim)
        if all(run.kind.replaces for run in runs):
            y = x  # nobody looks at it
        else:
            y = self.base_layer(whole.mapped([run.pre for run in runs], x), *rest, **kwargs)
        if not isinstance(y, Tensor):
            raise LayerKindError(f"A bank needs one tensor of each layer; {type(self.base_layer).__name__} gives more.")
        return whole.mapped([partial(run.post, rest, kwargs) for run in runs], x, y)

    def _runs(self, sizes: list[int], dim: int) -> list[Run]:
        """The groups that are there; neighbours whose adapters are of one class together."""
        present = [pair for pair in zip(self.adapters, sizes, strict=True) if pair[1]]
        runs = [list(pairs) for _, pairs in groupby(present, key=lambda pair: type(pair[0]))]
        return [Run([a for a, _ in run], Groups(tuple(size for _, size in run), dim)) for run in runs]


@dataclass(frozen=True)
class Run:
    """Adapters of one class, and their groups."""

    adapters: list[Adapter]
    groups: Groups

    @property
    def kind(self) -> type[Adapter]:
        return type(self.adapters[0])

    def pre(self, x: Tensor) -> Tensor:
        return self.kind.pre_each(self.adapters, self.groups, x)

    def post(self, rest: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
        if self.kind.replaces:
            return self.kind.replace_each(self.adapters, self.groups, x, *rest, **kwargs)
        return self.kind.post_each(self.adapters, self.groups, x, y)
