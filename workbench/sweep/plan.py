"""`workbench plan`: what a study will need, method by method, before it runs. No weights are read, unless steps are to
be measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial

from workbench.errors import ModelError, StorageError, TrialFailed
from workbench.training.base import available, pick_device
from workbench.training.data import read_data
from workbench.training.rehearsal import blank_base, fault_of

from .budget import PROGRESS
from .planning import Planner, Verdict, corners, survey
from .pool import one_thread
from .preflight import preflight
from .roles import label_of
from .run import stored_study
from .spec import Study
from .stores import Stores
from .workshop import Job, Workshop

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """What a method's trials take: seconds of a step and of an evaluation, over so many steps that were measured."""

    step: float
    evaluation: float
    steps: int

    def trial(self, study: Study) -> float:
        """Seconds of a whole trial."""
        return self.step * study.training.steps + self.evaluation * len(study.training.eval_steps)


@dataclass(frozen=True)
class Plan:
    """What is known of a study before it runs.

    Attributes:
        device: on which it is to run.
        limit: bytes that a pass may take; None: no limit is known.
        fault: why passes are padded; "" if they are packed.
        numbers: of the base model.
        methods: verdicts on the corners of each search space, by label.
        pace: by label, of those that were measured.
    """

    study: Study
    device: torch.device
    limit: int | None
    fault: str
    numbers: int
    methods: dict[str, list[Verdict]]
    pace: dict[str, Pace]

    @property
    def verdicts(self) -> list[Verdict]:
        """Those on all methods."""
        return [verdict for own in self.methods.values() for verdict in own]


def plan(
    study: Study, stores: Stores, say: Say, device: str | None = None, gib: float | None = None, steps: int = 0
) -> Plan:
    """Find out what a study will need.

    Args:
        say: hears what is being done.
        device: in place of the study's.
        gib: in place of the study's `constraints.vram_gib`.
        steps: train so many steps of each method, with the real weights, to see how long they take.

    Raises:
        StudyError, ModelError, DataError: as a sweep would.
    """
    training = study.training.model_copy(update={"device": device} if device else {})
    constraints = study.constraints.model_copy(update={"vram_gib": gib} if gib else {})
    study = study.model_copy(update={"training": training, "constraints": constraints})
    place = pick_device(training.device, absent=True)
    if steps and not available(place):
        raise ModelError(f"--measure: {place} cannot be used here, so that nothing can be measured on it.")
    say("reading the data ...")
    raw = read_data(study.data, study.model.task)
    base = blank_base(study.model, raw.labels or None, place, training.precision)
    shop = Workshop(study, base, raw, stores.home / "cache")
    preflight(study, base, shop.data(()).train)
    fault = fault_of(study.model, base, shop.data(()))
    planner = Planner(shop, fault, study.memory_limit or whole_device(place))
    every, done = sum(len(corners(spec)) for spec in study.methods.values()), 0

    def on_verdict() -> None:
        nonlocal done
        done += 1
        say(f"rehearsed {done} of {every} configurations")

    methods = {label: survey(planner, spec, on_verdict) for label, spec in study.methods.items()}
    pace = measured(study, stores, methods, steps, say) if steps else recorded(study, stores)
    return Plan(study, place, planner.limit, fault, base.model.num_parameters(), methods, pace)


def whole_device(device: torch.device) -> int | None:
    """Bytes of a GPU that is here."""
    if device.type != "cuda" or not available(device):
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


# ---------------------------------------------------------------- time


def recorded(study: Study, stores: Stores) -> dict[str, Pace]:
    """The pace of each method's trials so far, where the study has run."""
    try:
        known = stored_study(study, stores)
    except StorageError:  # another study of this name, say
        return {}
    trials: dict[str, list[FrozenTrial]] = {}
    for trial in known.get_trials(deepcopy=False) if known else ():
        trials.setdefault(label_of(trial, study), []).append(trial)
    found = {
        label: average(study, [trial.user_attrs.get(PROGRESS, {}) for trial in own]) for label, own in trials.items()
    }
    return {label: pace for label, pace in found.items() if pace}


def average(study: Study, progress: Sequence[Mapping[str, Any]]) -> Pace | None:
    """The pace of trials that came so far; None if none made a step."""
    steps = evaluations = 0
    seconds = {"seconds/train": 0.0, "seconds/eval": 0.0}
    for own in progress:
        made, costs = own.get("step", 0), own.get("costs", {})
        steps += made
        evaluations += sum(step <= made for step in study.training.eval_steps)
        for name in seconds:
            seconds[name] += costs.get(name, 0.0)
    return (
        Pace(seconds["seconds/train"] / steps, seconds["seconds/eval"] / max(1, evaluations), steps) if steps else None
    )


def measured(
    study: Study, stores: Stores, methods: Mapping[str, Sequence[Verdict]], steps: int, say: Say
) -> dict[str, Pace]:
    """The pace of each method's first configuration that can run, by training it for some steps with real weights."""
    say("loading the base model ...")
    shop = Workshop.open(study, stores.home)
    pace = {}
    steps = min(steps, study.training.steps)
    with tempfile.TemporaryDirectory() as folder, one_thread(shop.base.device):
        for label, verdicts in methods.items():
            config = next((verdict.config for verdict in verdicts if not verdict.refusal), None)
            if config is None:
                continue
            say(f"measuring {steps} steps of {label} ...")
            job = Job(0, shop.seeds(0), config, None, Path(folder, f"{label}.safetensors"), steps, None)
            (report,) = shop.train([job], lambda trial, step, loss: None)
            if report.error:
                raise TrialFailed(f"{label}: {report.error}")
            pace[label] = Pace(report.costs["seconds/train"] / steps, report.costs["seconds/eval"], steps)
    return pace
