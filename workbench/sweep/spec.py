"""`study.yaml`: its form, and `load_study`, which reads one and lists everything that is wrong with it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field, model_validator
from pydantic_core import ErrorDetails

from workbench.errors import ConfigError, StudyError
from workbench.training.config import DataSection, ModelSection, Positive, Section, Task, TrainingSection
from workbench.training.metrics import METRICS, Goal

from .baselines import CHOICES
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
ONE_SPACE = ("gp", "cmaes", "qmc")  # samplers that model one set of hyperparameters
NO_OPTIONS = ("random", "grid", "successive_halving", "hyperband", "none")
_PATHS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("data", "path"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
)
_DATA_FILES = (".csv", ".json", ".jsonl", ".parquet")
NAME, LONGEST_NAME = "[A-Za-z0-9_-][A-Za-z0-9._-]*", 100  # of a study: it becomes that of files and folders
_MAX_COMBINATIONS = 256
_MAX_STEPS, _MAX_ROWS, _MAX_EVALUATIONS, _MAX_LABEL = 10**9, 10**6, 10**5, 100


Cost = Literal["trainable_params", "memory", "adapter_bytes", "seconds"]


class ObjectiveSection(Section):
    """What the search is for."""

    metric: str | None = Field(None, description="A validation metric; default by task: accuracy, f1, loss or chrf.")
    goal: Goal | None = Field(None, description="Default: minimize for loss and perplexity, else maximize.")
    also: list[Cost] = Field(
        default_factory=list, description="Costs to keep low at the same time: the search is for a Pareto front."
    )


class MethodBudget(Section):
    """What each method may use, all the same: it ends at whichever comes first. At least one is needed."""

    trials: Positive | None = Field(None, description="Trials, pruned and failed ones included.")
    steps: Positive | None = Field(None, description="Optimiser steps of its trials together.")
    tokens: Positive | None = Field(None, description="Tokens that its trials train on, padding not counted.")
    seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds of training and evaluation of its trials together."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> MethodBudget:
        if not self.given:
            raise ValueError("has no end: give at least one of trials, steps, tokens and seconds")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The limits that there are, by unit."""
        return self.model_dump(exclude_none=True)


class BudgetSection(Section):
    """When the search ends: at whichever comes first. At least one is needed."""

    trials: Positive | None = Field(None, description="Trials, pruned and failed ones included.")
    steps: Positive | None = Field(None, description="Optimiser steps of all trials together.")
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="Wall-clock time.")
    per_method: MethodBudget | None = Field(
        None,
        description="The same for every method: they take turns, each is searched by itself, its defaults first.",
    )

    @model_validator(mode="after")
    def _not_empty(self) -> BudgetSection:
        if self.trials is None and self.steps is None and self.minutes is None and self.per_method is None:
            raise ValueError("has no end: give at least one of trials, steps, minutes and per_method")
        return self


class ConstraintsSection(Section):
    """What a trial must keep to. One that would not, as predicted, is answered as infeasible and not trained."""

    vram_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GiB on the device for a pass: base, adapters, optimiser, activations; on a CPU, of one worker.",
    )
    trainable_params: Positive | None = Field(None, description="Numbers that train, the task's head included.")
    adapter_bytes: Positive | None = Field(None, description="Size of the adapter's files.")
    seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds of a trial's training and evaluation; a slower one ends."
    )


class MatchSection(Section):
    """Let all methods have about as many parameters: the rank (or what else sets a method's size) is solved for."""

    trainable_params: Positive = Field(description="Numbers that train, the task's head included.")
    within: float = Field(0.1, gt=0, le=1, description="A trial that cannot come as close as this share is infeasible.")


class FinalistsSection(Section):
    """The best configurations of each method train again: every initialisation with every order of the data."""

    per_method: Positive = Field(1, description="How many configurations of each method.")
    initialisations: Positive = Field(3, description="Further seeds of the adapter's first values and of dropout.")
    orders: Positive = Field(3, description="Further seeds of the order of the data.")


class RegisterSection(Section):
    """At the end of the sweep the best trial becomes a version in MLflow's registry, if it beats the one that the alias
    points at on the test split, beyond noise. This reads the test split."""

    name: str | None = Field(None, description="The registered model; the study's name by default.")
    alias: str = Field("champion", min_length=1, description="What the winner is called by: models:/NAME@ALIAS.")


class SearchSection(Section):
    """How values are chosen and when a trial is given up."""

    sampler: Literal["tpe", "gp", "cmaes", "nsgaii", "random", "grid", "qmc"] = Field(
        "tpe",
        description="Optuna's, by name. grid: all combinations once; gp, cmaes, qmc: for one method, or per_method.",
    )
    sampler_options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of Optuna's sampler, such as n_startup_trials."
    )
    pruner: Literal["median", "percentile", "patient", "hyperband", "successive_halving", "none"] | None = Field(
        None,
        description="Which trials are stopped early, compared with others at the same step; default median, with "
        "several objectives none.",
    )
    pruner_options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of Optuna's pruner, such as n_startup_trials."
    )
    duplicates: Literal["replicate", "skip"] = Field(
        "replicate", description="A configuration that comes again is trained on other seeds, or not at all."
    )
    prune_by: str = Field("loss", description="The validation metric that the pruner compares, or `objective`.")
    in_flight: Positive | None = Field(
        None, description="Trials that are live at once, whatever the number of workers; default by sampler and pruner."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seeds the sampler.")


class StudyFile(Section):
    """The keys of a study file, as written; `methods` is checked by `load_study`."""

    study: str = Field(
        pattern=f"^{NAME}$",
        max_length=LONGEST_NAME,
        description="The study's name: letters, digits and . _ - only, not starting with a dot.",
    )
    model: ModelSection
    data: DataSection
    training: TrainingSection
    methods: dict[str, Any] = Field(min_length=1, description="The methods to search, each under a label of its own.")
    objective: ObjectiveSection = ObjectiveSection()
    budget: BudgetSection
    constraints: ConstraintsSection = ConstraintsSection()
    match: MatchSection | None = None
    search: SearchSection = SearchSection()
    finalists: FinalistsSection | None = None
    registration: RegisterSection | None = Field(None, alias="register")


class Objective(Section):
    """The metric that is searched for, on the validation split."""

    metric: str
    goal: Goal
    also: list[Cost] = Field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether costs are to be low at the same time."""
        return bool(self.also)

    @property
    def directions(self) -> list[Goal]:
        """Of the metric, then of the costs."""
        lower: list[Goal] = ["minimize"] * len(self.also)
        return [self.goal, *lower]


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
    match: MatchSection | None
    search: SearchSection
    finalists: FinalistsSection | None
    registration: RegisterSection | None
    path: Path
    text: str

    @property
    def memory_limit(self) -> int | None:
        """Bytes that a pass may take on its device; None: any number."""
        limit = self.constraints.vram_gib
        return None if limit is None else int(limit * 2**30)

    @property
    def asks_for_memory(self) -> bool:
        """Whether what a trial will need at its peak must be known beforehand."""
        return self.memory_limit is not None or self.training.track_memory or "memory" in self.objective.also

    @property
    def asks_for_size(self) -> bool:
        """Whether a trial's size must be known before it trains."""
        limits = self.constraints
        return bool(self.match or limits.trainable_params or limits.adapter_bytes)

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
    _check_match(source, methods)
    _check_training(source)
    if source.problems or file is None:
        raise StudyError(source.problems)
    study = Study(
        name=file.study,
        model=file.model,
        data=file.data,
        training=file.training,
        methods=methods,
        objective=_objective(file),
        budget=file.budget,
        constraints=file.constraints,
        match=file.match,
        search=_search(file),
        finalists=file.finalists,
        registration=file.registration,
        path=Path(path),
        text=source.text,
    )
    _check_options(source, study)
    if source.problems:
        raise StudyError(source.problems)
    return study


def _section(source: Source, key: str) -> dict[str, Any]:
    """A section as written, {} if there is no such mapping."""
    section = source.data.get(key)
    return section if isinstance(section, dict) else {}


def _objective(file: StudyFile) -> Objective:
    metric = file.objective.metric or OBJECTIVES[file.model.task]
    goal = file.objective.goal or METRICS[file.model.task][metric]
    return Objective(metric=metric, goal=goal, also=file.objective.also)


def _search(file: StudyFile) -> SearchSection:
    pruner = file.search.pruner or ("none" if file.objective.also else "median")
    return file.search.model_copy(update={"pruner": pruner})


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
        known = _section_at(loc[:-1]).model_fields
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
        name = next(key for key in reversed(loc) if isinstance(key, str))  # not a place in a list
        source.report(loc, *explain(fault, name))


def _section_at(loc: Sequence[int | str]) -> type[Section]:
    """The section that a place in the file is described by."""
    section: Any = StudyFile
    for key in loc:
        annotation = section.model_fields[key].annotation
        section = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    return section


def _methods(source: Source, task: str | None) -> dict[str, MethodSpec]:
    specs = {}
    for label, entry in _section(source, "methods").items():
        loc: Loc = ("methods", label)
        if not isinstance(label, str):
            continue  # found by pydantic
        if not re.fullmatch(f"[A-Za-z0-9_-]{{1,{_MAX_LABEL}}}", label):
            hint = f"letters, digits, _ and - only, at most {_MAX_LABEL}"
            source.report(loc, f"{label[:_MAX_LABEL]!r} cannot be a label", hint, at_key=True)
        elif entry is not None and not isinstance(entry, dict):
            source.report(loc, f"{label} should be a mapping of hyperparameters, not {entry!r}")
        elif spec := _method(source, label, entry or {}, task):
            specs[label] = spec
    return specs


def _method(source: Source, label: str, entry: dict[str, Any], task: str | None) -> MethodSpec | None:
    loc: Loc = ("methods", label)
    name = entry.get("method", label)
    if not isinstance(name, str) or name not in CHOICES:
        hint = did_you_mean(name, CHOICES) or f"known: {', '.join(CHOICES)}"
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
    several = bool(_section(source, "objective").get("also"))
    if sampler == "grid":
        for label, spec in methods.items():
            endless = [key for key, domain in spec.domains.items() if size(domain) is None]
            if endless:
                hint = "give it values, or a q"
                source.report(loc, f"grid needs countable values, {label}.{endless[0]} is a continuous range", hint)
    elif sampler in ONE_SPACE and len(methods) > 1 and "per_method" not in _section(source, "budget"):
        hint = "give each method a budget of its own (budget.per_method), or use tpe, random or grid"
        source.report(loc, f"{sampler} cannot choose between methods", hint)
    if sampler == "cmaes" and several:
        source.report(loc, "cmaes knows one objective, objective.also names others", "use tpe, gp or nsgaii")
    pruner = _section(source, "search").get("pruner")
    if several and pruner not in (None, "none"):
        source.report(("search", "pruner"), "several objectives cannot be pruned by one", "leave it out")


def _check_match(source: Source, methods: dict[str, MethodSpec]) -> None:
    if not _section(source, "match"):
        return
    for label, spec in methods.items():
        knob = CHOICES[spec.method].size
        if knob is not None and knob in spec.adapter:
            source.report(
                ("methods", label, knob), f"{knob} is solved for, as match.trainable_params is given", "leave it out"
            )


def _check_training(source: Source) -> None:
    """Refuse numbers with which a sweep would only fill the memory."""
    training = _section(source, "training")
    limits = {"steps": _MAX_STEPS, "batch_size": _MAX_ROWS, "eval_batch_size": _MAX_ROWS}
    for key, limit in limits.items():
        if isinstance(value := training.get(key), int) and value > limit:
            source.report(("training", key), f"{key} must be at most {limit:,}, not {value:,}")
    steps, every = training.get("steps"), training.get("eval_every")
    if isinstance(steps, int) and isinstance(every, int) and every > 0 and steps // every > _MAX_EVALUATIONS:
        source.report(("training", "eval_every"), f"there would be more than {_MAX_EVALUATIONS:,} evaluations")


def _check_options(source: Source, study: Study) -> None:
    """Let Optuna's classes see their arguments."""
    if not study.search.sampler_options and not study.search.pruner_options:
        return
    from .samplers import pruner, sampler  # takes a while to import, and few files need it

    for kind, make in (("sampler", sampler), ("pruner", pruner)):
        options, name = getattr(study.search, f"{kind}_options"), getattr(study.search, kind)
        if not options:
            continue
        loc = ("search", f"{kind}_options")
        if name in NO_OPTIONS:
            source.report(loc, f"{name} takes no options", "leave them out", at_key=True)
        try:
            make(study)
        except (TypeError, ValueError) as error:
            source.report(loc, f"{name} refuses its options: {error}", at_key=True)
