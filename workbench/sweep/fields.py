"""The hyperparameters of each method, read off its configuration class and the training section."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import ErrorDetails

from workbench.adapters.config import PeftConfig
from workbench.training.config import PER_METHOD, TrainingSection

from .baselines import BASELINES, CHOICES

TOKEN_FIELDS = ("token_indices", "trainable_token_indices")
_BOOKKEEPING = {field.name for field in dataclasses.fields(PeftConfig)}
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}


@dataclass(frozen=True)
class Field:
    """One hyperparameter.

    Attributes:
        name: its key in the study file.
        type: its type, as annotated; constraints included.
        description: one sentence for people.
        training: set on the training loop, not in the adapter's configuration.
        required: a study has to give it.
    """

    name: str
    type: Any
    description: str = ""
    training: bool = False
    required: bool = False

    @property
    def tokens(self) -> bool:
        """Whether its values are tokens (`domains.Tokens`)."""
        return self.name in TOKEN_FIELDS

    @property
    def mapping(self) -> bool:
        """Whether a value can itself be a mapping, e.g. `rank_pattern`."""
        return not self.tokens and any(typing.get_origin(t) is dict for t in _alternatives(self.type))

    @property
    def number(self) -> type[int] | type[float] | None:
        """int or float if its numbers are of that kind; None if both or no numbers will do."""
        kinds = {t for t in _alternatives(self.type) if t in (int, float)}
        return kinds.pop() if len(kinds) == 1 else None

    @cached_property
    def adapter(self) -> pydantic.TypeAdapter[Any]:
        """pydantic's check of the type."""
        return pydantic.TypeAdapter(self.type)

    def refusal(self, value: Any) -> tuple[str, str] | None:
        """Why a value is not of the field's type, as message and hint; None if it is."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.name} must be finite, not {value}", ""
        try:
            self.adapter.validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            message, hint = explain(error.errors()[0], self.name)
            alternatives = [_words(t) for t in _alternatives(self.type)]
            if len(alternatives) > 1:
                message = f"{self.name} should be {' or '.join(alternatives)}, not {reprlib.repr(value)}"
            return message, hint
        return None


@cache
def fields(method: str) -> dict[str, Field]:
    """The hyperparameters of a method or baseline, by name: its own, then those of the training loop."""
    config = CHOICES[method].config
    hints, docs = typing.get_type_hints(config), _documented(config)
    own = {
        # without tokens, trainable tokens would train nothing; in LoRA (default None) they are an extra
        f.name: Field(
            f.name, hints[f.name], docs.get(f.name, ""), required=f.name in TOKEN_FIELDS and f.default is not None
        )
        for f in dataclasses.fields(config)
        if f.name not in _BOOKKEEPING
    }
    settings = BASELINES[method].settings if method in BASELINES else PER_METHOD
    infos = {name: TrainingSection.model_fields[name] for name in settings}
    return own | {
        name: Field(name, Annotated[info.annotation, info], info.description or "", training=True)
        for name, info in infos.items()
    }


def explain(error: ErrorDetails, name: Any) -> tuple[str, str]:
    """A fault found by pydantic as message and hint. `name`: what the value is called."""
    value, message = error["input"], error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name} {message}", ""
    if error["type"] == "too_short":
        return f"{name} is empty", ""
    if error["type"] in ("model_type", "dict_type"):
        message = "should be a mapping"
    hint = ""
    if error["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        hint = f"write {int(value)}"
    elif error["type"] == "string_type" and isinstance(value, bool | int | float):
        hint = "put it in quotes"
    return f"{name} {message[:1].lower()}{message[1:]}, not {reprlib.repr(value)}", hint


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; without annotations."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _alternatives(member)
    else:
        yield annotation


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return "a list of " + _WORDS.get(args[0], "values").removeprefix("a ") + "s"
    if origin is dict:
        return "a mapping"
    if origin is Literal:
        return " or ".join(map(str, args))
    return _WORDS.get(kind, str(kind))


def _documented(config: type) -> dict[str, str]:
    """The fields' descriptions in the `Args:` of a class's docstring, and of those it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        _, _, args = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("Args:\n")
        # one entry may describe several fields: "a, b: text"
        entries = re.findall(r"^    (\w+(?:,\s+\w+)*): (.+(?:\n {5,}.+)*)", args, re.MULTILINE)
        found |= {name: re.sub(r"\s+", " ", text) for names, text in entries for name in re.split(r",\s+", names)}
    return found
