"""Methods of about one number of parameters: what sets a method's size is solved for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workbench.errors import ConfigError
from workbench.tracking.recorded import Configuration

from .baselines import CHOICES
from .domains import TOKEN_KEYS, Tokens
from .space import TrialConfig, from_params
from .spec import MatchSection, Study

LARGEST = 2**15


def knob(config: TrialConfig) -> str | None:
    """The field that sets a configuration's size; None: it has none, such as (IA)3 or full fine-tuning."""
    if (size := CHOICES[config.method].size) is not None:
        return size
    counted = [key for key, value in config.adapter.items() if isinstance(value, Tokens) and counts(value)]
    return counted[0] if len(counted) == 1 else None


def counts(tokens: Tokens) -> str | None:
    """The key by which tokens are as many as a number says."""
    return next((key for key in TOKEN_KEYS if isinstance(getattr(tokens, key), int)), None)


def sized(config: TrialConfig, size: int) -> TrialConfig:
    """The same configuration in another size."""
    field = knob(config)
    assert field is not None
    before = config.adapter.get(field)
    value: Any = Tokens(**{str(counts(before)): size}) if isinstance(before, Tokens) else size  # type: ignore[arg-type]
    varied = config.varied if field in config.varied else (field, *config.varied)
    return replace(config, adapter=config.adapter | {field: value}, varied=varied, size=size)


def restored(known: Configuration, study: Study) -> TrialConfig:
    """The settings of a trial that was recorded.

    Raises:
        StorageError: they do not fit the study.
    """
    config = from_params(known.params, study)
    return config if known.size is None else sized(config, known.size)


def matched(config: TrialConfig, match: MatchSection, count: Callable[[TrialConfig], int]) -> TrialConfig:
    """The configuration in the size whose number of parameters is closest; as it is, if it comes in one size.

    Args:
        count: says how many numbers of a configuration train; it grows with the size.

    Raises:
        ConfigError: no size comes close enough.
    """
    field, wanted = knob(config), match.trainable_params
    if field is None:
        return config
    known: dict[int, int] = {}

    def of(size: int) -> int:
        if size not in known:
            known[size] = count(sized(config, size))
        return known[size]

    low, high = 0, 1
    while of(high) < wanted and high < LARGEST:
        high *= 2
    most = min(wanted, of(high))  # LoKr, for one, stops growing
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) < most else (low, middle)
    best = min((max(1, low), high), key=lambda size: abs(of(size) - wanted))
    if abs(of(best) - wanted) > match.within * wanted:
        raise ConfigError(
            f"{field}: the closest to {wanted:,} trainable parameters is {best} with {of(best):,}, more than "
            f"{match.within:.0%} off; ask for another number or raise match.within.",
            field,
        )
    return sized(config, best)
