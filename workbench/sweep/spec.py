"""`study.yaml`: its form, and `load_study`, which reads one and lists everything that is wrong with it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field, model_validator
from pydantic_core import ErrorDetails

from workbench.adapters.registry import METHODS
from workbench.errors import ConfigError, StudyError
from workbench.training.config import DataSection, ModelSection, Positive, Section, Task, TrainingSection
from workbench.training.metrics import METRICS, Goal

from .configure import peft_config
from .domains import Candidate, Domain, Tokens, did_you_mean, parse, size
from .fields import explain, fields
from .source import Loc, Source, read

OBJECTIVES: dict[str, str] = {"SEQ_CLS": "accuracy", "TOKEN_CLS": "f1", "CAUSAL_LM": "loss", "SEQ_2_SEQ_LM": "chrf"}
COLUMNS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("text", "label"),
    "TOKEN_CLS": ("tokens", "tags"),
    "CAUSAL_LM": ("text",),
    "SEQ_2_SEQ_LM": ("text", "target"),
}
LABELLED = ("SEQ_CLS", "TOKEN_CLS")
OBJECTIVE = "objective"
_PATHS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("data", "path"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
)
_DATA_FILES = (".csv", ".json", ".jsonl", ".parquet")
_MAX_COMBINATIONS = 256


class ObjectiveSection(Section):
    """What the search is for."""

    metric: str | None = Field(None, description="A validation metric; default by task: accuracy, f1, loss or chrf.")
    goal: Goal | None = Field(None, description="Default: minimize for loss and perplexity, else maximize.")


class BudgetSection(Section):
    """When the search ends: at whichever comes first. At least one is needed."""

    trials: Positive | None = Field(None, description="Trials, pruned and failed ones included.")
    steps: Positive | None = Field(None, description="Optimiser steps of all trials together.")
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="Wall-clock time.")

    @model_validator(mode="after")
    def _not_empty(self) -> BudgetSection:
        if self.trials is None and self.steps is None and self.minutes is None:
            raise ValueError("has no end: give at least one of trials, steps and minutes")
        return self


class ConstraintsSection(Section):
    """What a trial must keep to. One that would not, as predicted, is answered as infeasible and not trained."""

    vram_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GiB on the device for a pass: base, adapters, optimiser, activations; on a CPU, of one worker.",
    )


class SearchSection(Section):
    """How values are chosen and when a trial is given up."""

    sampler: Literal["tpe", "random", "grid", "qmc"] = Field(
        "tpe",
        description="tpe: learns from earlier trials; grid: all combinations once; qmc: evenly spread, for one method.",
    )
    pruner: Literal["median", "hyperband", "successive_halving", "none"] = Field(
        "median", description="Which trials are stopped early, by comparison with others at the same step."
    )
    prune_by: str = Field("loss", description="The validation metric that the pruner compares, or `objective`.")
    in_flight: Positive | None = Field(
        None, description="Trials that are live at once, whatever the number of workers; default by sampler and pruner."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds the sampler.")


class StudyFile(Section):
    """The keys of a study file, as written; `methods` is checked by `load_study`."""

    study: str = Field(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        max_length=100,
        description="The study's name: letters, digits and . _ - only, not starting with a dot.",
    )
    model: ModelSection
    data: DataSection
    training: TrainingSection
    methods: dict[str, Any] = Field(min_length=1, description="The methods to search, each under a label of its own.")
    objective: ObjectiveSection = ObjectiveSection()
    budget: BudgetSection
    constraints: ConstraintsSection = ConstraintsSection()
    search: SearchSection = SearchSection()


class Objective(Section):
    """The metric that is searched for, on the validation split."""

    metric: str
    goal: Goal


@dataclass(frozen=True)
class MethodSpec:
    """One entry of `methods`.

    Attributes:
        label: its key in the file.
        method: the registered method.
        adapter: domains of the configuration's fields that the file gives.
        training: domains of the training settings (`PER_METHOD`) that the file gives.
    """

    label: str
    method: str
    adapter: dict[str, Domain]
    training: dict[str, Domain]

    @property
    def domains(self) -> dict[str, Domain]:
        """Both together, in the order of sampling."""
        return self.adapter | self.training

    @property
    def size(self) -> int | None:
        """How many different configurations there are; None: a range is continuous."""
        product = 1
        for domain in self.domains.values():
            if (values := size(domain)) is None:
                return None
            product *= values
        return product


class Study(Section):
    """A study file that was found right: folders resolved, defaults filled in."""

    name: str
    model: ModelSection
    data: DataSection
    training: TrainingSection
    methods: dict[str, MethodSpec]
    objective: Objective
    budget: BudgetSection
    constraints: ConstraintsSection
    search: SearchSection
    path: Path
    text: str

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a pass may take on its device; None: any number."""
        limit = self.constraints.vram_gib
        return None if limit is None else int(limit * 2**30)

    def to_compare(self, metrics: dict[str, float]) -> float:
        """What a pruner compares at an evaluation, in the direction of the objective as Optuna wants it: the negative
        of a metric with the other goal."""
        named = self.search.prune_by
        metric = self.objective.metric if named == OBJECTIVE else named
        goal = self.objective.goal if metric == self.objective.metric else METRICS[self.model.task][metric]
        return metrics[metric] if goal == self.objective.goal else -metrics[metric]


def load_study(path: str | Path, text: str | None = None) -> Study:
    """Read a study file. Relative folders and files that exist next to it become absolute; other names are hub ids.

    Args:
        text: what the file held, where it may hold something else by now.

    Raises:
        StudyError: the file is missing or wrong; it holds every problem with line and column.
    """
    source = read(path, text)
    if source.problems and source.data is None:
        raise StudyError(source.problems)
    if not isinstance(source.data, dict):
        source.report((), "a study file is a mapping of keys", "start with `study: a-name`")
        raise StudyError(source.problems)
    task = _section(source, "model").get("task")
    if task not in get_args(Task):
        task = None
    _resolve_paths(source, Path(path).parent)
    _check_data(source, task)
    _check_metrics(source, task)
    file = _validate(source)
    methods = _methods(source, task)
    _check_search(source, methods)
    if source.problems or file is None:
        raise StudyError(source.problems)
    return Study(
        name=file.study,
        model=file.model,
        data=file.data,
        training=file.training,
        methods=methods,
        objective=_objective(file),
        budget=file.budget,
        constraints=file.constraints,
        search=file.search,
        path=Path(path),
        text=source.text,
    )


def _section(source: Source, key: str) -> dict[str, Any]:
    """A section as written, {} if there is no such mapping."""
    section = source.data.get(key)
    return section if isinstance(section, dict) else {}


def _objective(file: StudyFile) -> Objective:
    metric = file.objective.metric or OBJECTIVES[file.model.task]
    return Objective(metric=metric, goal=file.objective.goal or METRICS[file.model.task][metric])


def _resolve_paths(source: Source, folder: Path) -> None:
    """Make folders and files next to the study file absolute, in place; report what is missing and can be no hub id."""
    for loc in _PATHS:
        section, key = _section(source, loc[0]), loc[1]
        value = section.get(key)
        if not isinstance(value, str):
            continue
        is_split = key in ("train", "validation", "test")
        here = os.path.join(folder, value)
        if value and (os.path.isfile(here) if is_split else os.path.exists(here)):
            section[key] = os.path.abspath(here)
        elif not value or value.startswith(("./", "../", "/")) or value.endswith(_DATA_FILES) or value.count("/") > 1:
            source.report(loc, f"{key}: there is no file or folder {value!r}", f"paths are relative to {folder}")
        elif is_split and "path" not in section:
            source.report(loc, f"{key}: there is no file {value!r}", "a split's name needs a data set: data.path")


def _check_data(source: Source, task: str | None) -> None:
    data = source.data.get("data")
    if not isinstance(data, dict):
        return
    if "path" not in data and "train" not in data:
        hint = "give a folder or hub id as path, or name the files"
        source.report(("data",), "data has neither path nor train", hint, at_key=True)
    for column in COLUMNS.get(task or "", ()):
        if data.get(column) is None:
            source.report(("data",), f"missing key {column!r}", f"{task} needs the name of this column", at_key=True)


def _check_metrics(source: Source, task: str | None) -> None:
    known = next((metrics for name, metrics in METRICS.items() if name == task), None)
    if known is None:
        return
    for loc, word in ((("objective", "metric"), None), (("search", "prune_by"), OBJECTIVE)):
        metric = _section(source, loc[0]).get(loc[1])
        if not isinstance(metric, str) or metric == word:
            continue
        if metric not in known:
            names = [*known, *([word] if word else [])]
            hint = did_you_mean(metric, names) or f"known: {', '.join(names)}"
            source.report(loc, f"{task} has no metric {metric!r}", hint)
        elif task == "CAUSAL_LM" and metric in ("exact_match", "chrf") and not _section(source, "data").get("target"):
            source.report(loc, f"{metric} needs something to compare with", "name the column in data.target")


def _validate(source: Source) -> StudyFile | None:
    try:
        return StudyFile.model_validate(source.data, strict=True)
    except pydantic.ValidationError as faults:
        for fault in faults.errors():
            _report_fault(source, fault)
    return None


def _report_fault(source: Source, fault: ErrorDetails) -> None:
    loc, kind = fault["loc"], fault["type"]
    if kind == "extra_forbidden":
        section = StudyFile.model_fields[str(loc[0])].annotation if len(loc) > 1 else StudyFile
        known = section.model_fields  # type: ignore[union-attr]
        hint = did_you_mean(loc[-1], known) or f"known: {', '.join(known)}"
        source.report(loc, f"unknown key {loc[-1]!r}", hint, at_key=True)
    elif kind == "missing":
        source.report(loc[:-1], f"missing key {loc[-1]!r}", at_key=True)
    elif kind == "invalid_key" or "[key]" in loc:
        source.report(loc, f"{fault['input']!r} cannot be a key here", fault["msg"].removeprefix("Input "), at_key=True)
    elif kind == "string_pattern_mismatch":
        hint = "letters, digits and . _ - only, not starting with a dot"
        source.report(loc, f"{fault['input']!r} cannot be a study's name", hint)
    else:
        source.report(loc, *explain(fault, loc[-1]))


def _methods(source: Source, task: str | None) -> dict[str, MethodSpec]:
    specs = {}
    for label, entry in _section(source, "methods").items():
        loc: Loc = ("methods", label)
        if not isinstance(label, str):
            continue  # found by pydantic
        if not label.isascii() or not label.replace("_", "").replace("-", "").isalnum():
            source.report(loc, f"{label!r} cannot be a label", "letters, digits, _ and - only", at_key=True)
        elif entry is not None and not isinstance(entry, dict):
            source.report(loc, f"{label} should be a mapping of hyperparameters, not {entry!r}")
        elif spec := _method(source, label, entry or {}, task):
            specs[label] = spec
    return specs


def _method(source: Source, label: str, entry: dict[str, Any], task: str | None) -> MethodSpec | None:
    loc: Loc = ("methods", label)
    name = entry.get("method", label)
    if not isinstance(name, str) or name not in METHODS:
        hint = did_you_mean(name, METHODS) or f"known: {', '.join(METHODS)}"
        if "method" in entry:
            source.report((*loc, "method"), f"there is no method {name!r}", hint)
        else:
            hint = f"{hint}; a label of your own needs `method:`"
            source.report(loc, f"there is no method {name!r}", hint, at_key=True)
        return None
    known = fields(name)
    domains: dict[str, Domain | None] = {}
    candidates: dict[str, list[Candidate]] = {}
    for key, value in entry.items():
        if key in known:
            domains[key], candidates[key] = parse(source, (*loc, key), value, known[key])
        elif key != "method":
            hint = did_you_mean(key, known) or f"`workbench methods` lists those of {name}"
            source.report((*loc, key), f"unknown key {key!r}", hint, at_key=True)
    for field in known.values():
        if field.required and field.name not in entry:
            source.report(loc, f"missing key {field.name!r}", field.description, at_key=True)
    _check_tokens(source, candidates, task)
    own = {key: tries for key, tries in candidates.items() if not known[key].training}
    _check_configs(source, loc, name, task, own)
    given = {key: domain for key, domain in domains.items() if domain is not None}
    return MethodSpec(
        label,
        name,
        {key: domain for key, domain in given.items() if not known[key].training},
        {key: domain for key, domain in given.items() if known[key].training},
    )


def _check_tokens(source: Source, candidates: dict[str, list[Candidate]], task: str | None) -> None:
    for candidate in itertools.chain(*candidates.values()):
        if isinstance(candidate.value, Tokens) and candidate.value.most_informative and task and task not in LABELLED:
            source.report(candidate.loc, f"most_informative needs labels, {task} has none", "use most_frequent")


def _check_configs(
    source: Source, loc: Loc, method: str, task: str | None, candidates: dict[str, list[Candidate]]
) -> None:
    """Build the method's configuration from every candidate, and from every combination where they are few."""
    blamed: set[Loc] = set()
    steps = _section(source, "training").get("steps")
    steps = steps if isinstance(steps, int) and steps > 0 else 1_000_000  # what is wrong with it is said elsewhere

    def works(trial: dict[str, Candidate], varied: Sequence[str] = ()) -> bool:
        fault = _config_fault(method, task, {key: candidate.value for key, candidate in trial.items()}, steps)
        if fault is None:
            return True
        key = fault.field if fault.field in trial else next(iter(varied), None)
        where = trial[key].loc if key else loc
        if where not in blamed:
            blamed.add(where)
            others = ", ".join(f"{other}: {trial[other].value}" for other in varied if other != key)
            source.report(where, str(fault), f"together with {others}" if others else "", at_key=key is None)
        return False

    tries = {key: list(values) for key, values in candidates.items() if values}
    _drop_refused(tries, works, blamed)
    first = {key: values[0] for key, values in tries.items()}
    for key, values in tries.items():
        tries[key] = [values[0], *(value for value in values[1:] if works(first | {key: value}, [key]))]
    combinations = 1
    for values in tries.values():
        combinations *= len(values)
    if combinations <= _MAX_COMBINATIONS:
        varied = [key for key, values in tries.items() if len(values) > 1]
        for combination in itertools.product(*tries.values()):
            works(dict(zip(tries, combination, strict=True)), varied)


def _drop_refused(
    tries: dict[str, list[Candidate]], works: Callable[[dict[str, Candidate]], bool], blamed: set[Loc]
) -> None:
    """Take out first values until those left go together, so that one fault does not hide the next."""
    while not works({key: values[0] for key, values in tries.items()}):
        culprit = next((key for key, values in tries.items() if values[0].loc in blamed), None)
        if culprit is None:  # no one field is to blame
            tries.clear()
            return
        if len(tries[culprit]) > 1:
            tries[culprit].pop(0)
        else:
            del tries[culprit]


def _config_fault(method: str, task: str | None, values: dict[str, Any], steps: int) -> ConfigError | None:
    """What the configuration class says to these values; token texts are not ids yet, so any id stands for them."""
    plain: dict[str, Any] = {
        key: list(value.ids or (0,)) if isinstance(value, Tokens) else value for key, value in values.items()
    }
    try:
        peft_config(method, task, plain, steps)
    except ConfigError as error:
        return error
    except (TypeError, ValueError) as error:
        return ConfigError(str(error))
    return None


def _check_search(source: Source, methods: dict[str, MethodSpec]) -> None:
    sampler, loc = _section(source, "search").get("sampler"), ("search", "sampler")
    if sampler == "grid":
        for label, spec in methods.items():
            endless = [key for key, domain in spec.domains.items() if size(domain) is None]
            if endless:
                hint = "give it values, or a q"
                source.report(loc, f"grid needs countable values, {label}.{endless[0]} is a continuous range", hint)
    elif sampler == "qmc" and len(methods) > 1:
        source.report(loc, "qmc cannot choose between methods", "use tpe, random or grid")
