"""What a hyperparameter of a method may be: one value, one of several, or a number from a range."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from workbench.training.config import Positive

from .fields import Field
from .source import Loc, Source

Number = int | float
Scalar = None | bool | int | float | str

DOMAIN_KEYS = ("value", "values", "min", "max", "distribution", "q")
RANGES = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values")
DISTRIBUTIONS = (*RANGES, "categorical", "constant")
_FORM_KEYS = {"value", "values", "min", "max"}
TOKEN_KEYS = ("new_tokens", "most_frequent", "most_informative")
_LARGEST = 1e15
_MAX_STEPS = 1e9
COUNT = Field("the number of tokens", Positive)


@dataclass(frozen=True)
class Tokens:
    """Which tokens to train, as the study file says it; training turns it into ids. Only ids and strings may mix.

    Attributes:
        ids: ids in the tokenizer's vocabulary.
        strings: tokens of the vocabulary as text.
        new_tokens: texts to add to the vocabulary.
        most_frequent: how many of the training split's most frequent tokens.
        most_informative: how many of the tokens that tell most about the label.
    """

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()
    most_frequent: int | None = None
    most_informative: int | None = None

    def plain(self) -> list[int | str] | dict[str, Any]:
        """As a study file writes it."""
        for key in TOKEN_KEYS:
            if value := getattr(self, key):
                return {key: list(value) if key == "new_tokens" else value}
        return [*self.ids, *self.strings]

    def describe(self) -> str:
        """In a few words, e.g. "most_informative=64", "5, 7" or "new_tokens=<a>"."""
        plain = self.plain()
        if isinstance(plain, dict):
            return ", ".join(f"{key}={_brief(value) if key == 'new_tokens' else value}" for key, value in plain.items())
        return _brief(plain)


@dataclass(frozen=True)
class Constant:
    """One value in every trial."""

    value: Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if both are `int`.

    Attributes:
        log: drawn evenly over the logarithm.
        q: only low, low + q, low + 2q ... up to high.
    """

    low: Number
    high: Number
    log: bool = False
    q: Number | None = None


@dataclass(frozen=True)
class TokenRange:
    """The `most_frequent` or `most_informative` tokens, as many as `count` draws."""

    kind: str
    count: Range

    def at(self, count: Any) -> Tokens:
        """That many tokens."""
        return Tokens(**{self.kind: count})


@dataclass(frozen=True)
class Choice:
    """One of several values; a `TokenRange` among them draws its number afterwards."""

    values: tuple[Any, ...]


Domain = Constant | Choice | Range | TokenRange


@dataclass(frozen=True)
class Candidate:
    """A value that a trial may have, and where the file says so."""

    value: Any
    loc: Loc


def size(domain: Domain) -> int | None:
    """How many different values a domain has; None: a continuous range."""
    match domain:
        case Constant():
            return 1
        case Choice(values):
            return total(size(v) if isinstance(v, TokenRange) else 1 for v in values)
        case TokenRange(_, count):
            return size(count)
        case Range(low, high, _, q):
            step = q or (1 if isinstance(low, int) else None)
            return None if step is None and low < high else round((high - low) / (step or 1)) + 1


def total(sizes: Iterable[int | None]) -> int | None:
    """The sum of the sizes; None if one is None."""
    known = list(sizes)
    return None if None in known else sum(known)  # type: ignore[arg-type]


def encode(value: Any) -> Scalar:
    """A value as Optuna stores a categorical choice: scalars as they are, anything else as a string (JSON)."""
    if isinstance(value, TokenRange):
        return value.kind
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value.plain() if isinstance(value, Tokens) else value, sort_keys=True)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The hint "did you mean x?", or nothing if no known word is alike."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def parse(source: Source, loc: Loc, value: Any, field: Field) -> tuple[Domain | None, list[Candidate]]:
    """Read one hyperparameter.

    Returns:
        its domain, or None if something is wrong with it (reported to the source), and the values to try: every one of
        a choice, both ends of a range, without those that were refused.
    """
    if not _is_domain(value, field):
        return _collect(_items(source, loc, value, field))
    before = len(source.problems)
    for key in value:
        if key not in DOMAIN_KEYS:
            known = (*DOMAIN_KEYS, *TOKEN_KEYS) if field.tokens else DOMAIN_KEYS
            hint = did_you_mean(key, known) or f"a set of values has the keys {', '.join(known)}"
            source.report((*loc, key), f"unknown key {key!r}", hint, at_key=True)
    if len(source.problems) > before and not _FORM_KEYS & value.keys():
        return None, []  # a misspelt key is the one problem, not that there are no values
    shape = _shape(source, loc, value)
    if shape == "constant":
        domain, candidates = _collect(_items(source, (*loc, "value"), value["value"], field))
    elif shape == "categorical":
        domain, candidates = _choice(source, (*loc, "values"), value["values"], field)
    elif shape is not None:
        domain, candidates = _range(source, loc, value, shape, field)
    else:
        domain, candidates = None, []
    return (domain if len(source.problems) == before else None), candidates


def _is_domain(value: Any, field: Field) -> bool:
    if not isinstance(value, dict):
        return False
    if field.mapping:  # e.g. rank_pattern, whose value is itself a mapping
        return set(value) <= set(DOMAIN_KEYS) and bool(_FORM_KEYS & value.keys())
    return not (field.tokens and set(value) & set(TOKEN_KEYS))


def _shape(source: Source, loc: Loc, spec: dict[str, Any]) -> str | None:
    """The distribution's name, given or implied by the keys; None if there is none (reported)."""
    fits = [name for key, name in (("value", "constant"), ("values", "categorical")) if key in spec]
    if {"min", "max"} & spec.keys():
        fits.append("range")
    if len(fits) != 1:
        found = f"both {' and '.join(fits)} values" if fits else "no values"
        source.report(loc, f"{loc[-1]} has {found}", "write one of value, values, or min and max", at_key=True)
        return None
    (shape,) = fits
    if "q" in spec and shape != "range":
        source.report((*loc, "q"), "q goes with min and max only", at_key=True)
    if "distribution" not in spec:
        return "default" if shape == "range" else shape
    named, where = spec["distribution"], (*loc, "distribution")
    if named in ("log_uniform", "q_log_uniform"):
        hint = f"use {named}_values, with the bounds themselves"
        source.report(where, f"{named} is refused: its bounds would be exponents", hint)
    elif named not in DISTRIBUTIONS:
        hint = did_you_mean(named, DISTRIBUTIONS) or f"known: {', '.join(DISTRIBUTIONS)}"
        source.report(where, f"unknown distribution {named!r}", hint)
    elif (named in RANGES) != (shape == "range") or (shape != "range" and named != shape):
        needs = {"constant": "value", "categorical": "values"}.get(named, "min and max")
        source.report(where, f"the distribution {named} needs {needs}")
    else:
        return named
    return None


def _collect(items: list[Candidate]) -> tuple[Domain | None, list[Candidate]]:
    """The domain of one written value, which is several where a number of tokens is searched."""
    if not items:
        return None, []
    if len(items) > 1:
        return Choice(tuple(item.value for item in items)), _tries(items)
    value = items[0].value
    return (value if isinstance(value, TokenRange) else Constant(value)), _tries(items)


def _choice(source: Source, loc: Loc, values: Any, field: Field) -> tuple[Domain | None, list[Candidate]]:
    if not isinstance(values, list) or not values:
        source.report(loc, f"values must be a list of at least one value, not {reprlib.repr(values)}")
        return None, []
    items: list[Candidate] = []
    seen: set[Scalar] = set()
    for i, value in enumerate(values):
        for item in _items(source, (*loc, i), value, field):
            if encode(item.value) in seen:
                source.report(item.loc, f"{reprlib.repr(encode(item.value))} is listed twice")
            else:
                seen.add(encode(item.value))
                items.append(item)
    return Choice(tuple(item.value for item in items)), _tries(items)


def _tries(items: list[Candidate]) -> list[Candidate]:
    """The candidates, a range of tokens replaced by its two ends."""
    tries = []
    for item in items:
        if isinstance(item.value, TokenRange):
            ends = (item.value.at(item.value.count.low), item.value.at(item.value.count.high))
            tries += [Candidate(tokens, item.loc) for tokens in ends]
        else:
            tries.append(item)
    return tries


def _items(source: Source, loc: Loc, value: Any, field: Field) -> list[Candidate]:
    """One written value, checked; [] if it is refused (reported)."""
    if field.tokens and value is not None:
        return _tokens(source, loc, value)
    if not _check(source, loc, value, field):
        return []
    return [Candidate(value, loc)]


def _check(source: Source, loc: Loc, value: Any, field: Field) -> bool:
    if (refusal := field.refusal(value)) is not None:
        source.report(loc, *refusal)
    return refusal is None


def _range(
    source: Source, loc: Loc, spec: dict[str, Any], distribution: str, field: Field
) -> tuple[Domain | None, list[Candidate]]:
    bounds: dict[str, Any] = {}
    for key in ("min", "max", "q"):
        if key not in spec:
            if key != "q":
                source.report(loc, f"missing key {key!r}", "a range has min and max", at_key=True)
        elif isinstance(spec[key], bool) or not isinstance(spec[key], Number) or not abs(spec[key]) <= _LARGEST:
            found = reprlib.repr(spec[key])
            source.report((*loc, key), f"{key} must be a number of at most {_LARGEST:g} in size, not {found}")
        else:
            bounds[key] = spec[key]
    if not {"min", "max"} <= bounds.keys() or len(bounds) < len({"min", "max", "q"} & spec.keys()):
        return None, []
    before = len(source.problems)
    whole = _is_whole(source, loc, bounds, distribution, field)
    log = "log" in distribution
    if "q" in bounds and not (distribution == "default" or distribution.startswith("q_")):
        hint = {"uniform": "use q_uniform", "log_uniform_values": "use q_log_uniform_values"}.get(distribution, "")
        source.report((*loc, "q"), f"q does not go with {distribution}", hint or "use q_uniform", at_key=True)
    q = bounds.get("q", 1 if distribution.startswith("q_") else None)
    if q is not None and (q <= 0 or (bounds["max"] - bounds["min"]) / q > _MAX_STEPS):
        source.report((*loc, "q"), f"q must be above 0 and cut the range into at most {_MAX_STEPS:g} steps, not {q}")
    if log and bounds["min"] <= 0:
        source.report((*loc, "min"), f"min must be above 0 for {distribution}, not {bounds['min']}")
    if bounds["min"] > bounds["max"]:
        source.report((*loc, "min"), f"min {bounds['min']} is above max {bounds['max']}", "exchange them")
    if len(source.problems) > before:
        return None, []
    low, high = bounds["min"], _last_on_grid(bounds["min"], bounds["max"], q)
    if not whole:
        low, high = float(low), float(high)
    candidates = [Candidate(low, (*loc, "min")), Candidate(high, (*loc, "max"))]
    return Range(low, high, log, q), [c for c in candidates if _check(source, c.loc, c.value, field)]


def _is_whole(source: Source, loc: Loc, bounds: dict[str, Any], distribution: str, field: Field) -> bool:
    """Whether the range holds whole numbers only: the field says so, else the distribution, else the bounds."""
    fractions = [key for key, bound in bounds.items() if not isinstance(bound, int)]
    if distribution == "uniform" and field.number is int:
        source.report((*loc, "distribution"), f"{loc[-1]} takes whole numbers only", "use int_uniform")
    elif distribution == "int_uniform" or field.number is int:
        for key in fractions:
            source.report((*loc, key), f"{key} must be a whole number, not {bounds[key]}", _whole_hint(bounds[key]))
        return True
    return field.number is None and distribution == "default" and not fractions


def _whole_hint(value: float) -> str:
    return f"write {int(value)}" if value == int(value) else ""


def _last_on_grid(low: Number, high: Number, q: Number | None) -> Number:
    """The last of low, low + q, low + 2q ... that is not above high; in decimals, where 0.1 * 3 is 0.3."""
    if q is None:
        return high
    start, step = Decimal(str(low)), Decimal(str(q))
    last = start + (Decimal(str(high)) - start) // step * step
    return int(last) if last == int(last) and isinstance(low, int) and isinstance(q, int) else float(last)


def _tokens(source: Source, loc: Loc, value: Any) -> list[Candidate]:
    """Tokens as written: a list of ids or strings, or one of `TOKEN_KEYS`; several where a number is searched."""
    if isinstance(value, list):
        if not _are_tokens(source, loc, value, ids=True):
            return []
        ids = tuple(token for token in value if isinstance(token, int))
        return [Candidate(Tokens(ids, tuple(token for token in value if isinstance(token, str))), loc)]
    if not isinstance(value, dict):
        hint = f"write [{value}]" if isinstance(value, int | str) else ""
        source.report(loc, f"tokens are a list or one of {', '.join(TOKEN_KEYS)}, not {reprlib.repr(value)}", hint)
        return []
    if len(value) != 1 or not set(value) <= set(TOKEN_KEYS):
        for key in value.keys() - set(TOKEN_KEYS):
            source.report((*loc, key), f"unknown key {key!r}", did_you_mean(key, TOKEN_KEYS), at_key=True)
        if set(value) <= set(TOKEN_KEYS):
            source.report(loc, f"{loc[-1]} mixes {' and '.join(value)}", "write one of them")
        return []
    ((key, inner),) = value.items()
    where = (*loc, key)
    if key == "new_tokens":
        if not _are_tokens(source, where, inner, ids=False):
            return []
        return [Candidate(Tokens(new_tokens=tuple(inner)), where)]
    domain, counts = parse(source, where, inner, COUNT)  # a domain of its own: {most_frequent: {values: [32, 64]}}
    if isinstance(domain, Range):
        return [Candidate(TokenRange(key, domain), where)]
    return [Candidate(Tokens(**{key: count.value}), count.loc) for count in counts]


def _are_tokens(source: Source, loc: Loc, tokens: Any, *, ids: bool) -> bool:
    if not isinstance(tokens, list) or not tokens:
        source.report(loc, f"must be a list of at least one token, not {reprlib.repr(tokens)}")
        return False
    before = len(source.problems)
    for i, token in enumerate(tokens):
        is_id = ids and isinstance(token, int) and not isinstance(token, bool)
        if not is_id and not (isinstance(token, str) and token):
            hint = "put it in quotes" if isinstance(token, bool | int | float | None) else ""
            source.report((*loc, i), f"{reprlib.repr(token)} is not {'an id or ' if ids else ''}a token", hint)
        elif is_id and token < 0:
            source.report((*loc, i), f"token ids count from 0, {token} is below")
        elif token in tokens[:i]:
            source.report((*loc, i), f"{token!r} is listed twice")
    return len(source.problems) == before


def _brief(values: Iterable[Any]) -> str:
    words = [str(value) for value in values]
    return ", ".join(words if len(words) <= 4 else [*words[:3], f"... ({len(words)})"])
