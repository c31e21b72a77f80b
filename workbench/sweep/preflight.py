"""What only the model and the data can tell about a study: asked of every configuration before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from workbench.adapters.inject import ALL_LINEAR, NO_TARGETS, plan
from workbench.adapters.matching import Site, named, sites
from workbench.errors import ConfigError, DataError, StudyError
from workbench.training.base import Base
from workbench.training.data import Split
from workbench.training.tokens import resolve

from .baselines import CHOICES
from .configure import peft_config
from .domains import Choice, Constant, Domain, Range, TokenRange, Tokens
from .source import Source, read
from .spec import MethodSpec, Study


def preflight(study: Study, base: Base, train: Split) -> None:
    """Check that every value of the search space fits the model's modules and the tokenizer.

    Each value is tried with the first value of the other fields. The model is not changed.

    Raises:
        StudyError: with every problem, at its place in the file.
    """
    source = read(study.path)
    source.file = str(study.path)
    for spec in study.methods.values():
        size = CHOICES[spec.method].size if study.match else None
        check(source, spec, base, train, study.training.steps, {size: 1} if size else {})
    if source.problems:
        raise StudyError(source.problems)


def check(
    source: Source, spec: MethodSpec, base: Base, train: Split, steps: int, solved: Mapping[str, int] | None = None
) -> None:
    """Report what of one method's space does not fit.

    Args:
        solved: any value of a field that is not in the file but solved for.
    """
    tries = {key: list(ends(domain)) for key, domain in spec.adapter.items()}
    first = {**(solved or {}), **{key: values[0] for key, values in tries.items()}}
    seen = set()
    others = [(key, first | {key: value}) for key, values in tries.items() for value in values[1:]]
    for key, fields in [(None, first), *others]:
        for fault in faults(spec.method, fields, base, train, steps):
            culprit = fault.field if fault.field in tries else key
            if (culprit, str(fault)) not in seen:
                seen.add((culprit, str(fault)))
                source.report(("methods", spec.label, *([culprit] if culprit else [])), str(fault))


def ends(domain: Domain) -> list[Any]:
    """The values that stand for a domain: all of a choice, both ends of a range."""
    match domain:
        case Constant(value):
            return [value]
        case Range(low, high):
            return [low, high]
        case TokenRange(kind, count):
            return [Tokens(**{kind: end}) for end in ends(count)]
        case Choice(values):
            return [end for value in values for end in (ends(value) if isinstance(value, TokenRange) else [value])]


def faults(method: str, fields: dict[str, Any], base: Base, train: Split, steps: int) -> list[ConfigError]:
    """Why a configuration cannot be put on the base; none if it can."""
    found = []
    for key, value in fields.items():
        if isinstance(value, Tokens):
            ids = [0]  # stands for ids that are not known, or lie beyond the base's own table
            try:
                with base.vocabulary(value.new_tokens) as lent:
                    resolved = resolve(value, lent.tokenizer, train)
                    ids = ids if value.new_tokens else resolved
            except DataError as error:
                found.append(ConfigError(str(error), key))
            fields = fields | {key: ids}
    try:
        modules = plan(base.model, peft_config(method, base.task, fields, steps, base.model))
    except ConfigError as error:
        return [*found, error]
    return [*found, *unmatched(fields, base.model, modules)]


def unmatched(fields: dict[str, Any], model: nn.Module, modules: list[tuple[Site, str]]) -> Iterator[ConfigError]:
    """The names that fit no module. The adapter library is content if one of several fits; here, the others are
    taken for misspelt."""
    everything = list(sites(model))
    targets = [site for site, role in modules if role == "target"]
    scopes = {"target_modules": everything, "modules_to_save": everything, "feedforward_modules": targets}
    for key, scope in scopes.items():
        names = fields.get(key) or ()
        for pattern in [names] if isinstance(names, str) else [[name] for name in names]:
            rule = str(pattern).lower() in (ALL_LINEAR, NO_TARGETS)
            if not rule and not any(named(site.path, pattern) for site in scope):
                known = sorted({site.name for site in scope if not site.name.isdigit()})
                name = pattern if isinstance(pattern, str) else pattern[0]
                where = "the model has" if scope is everything else "the modules to adapt are"
                yield ConfigError(f"{key}: nothing is called {name!r}; {where} {', '.join(known[:20])}.", key)
