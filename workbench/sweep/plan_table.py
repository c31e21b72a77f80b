"""A plan as tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from .finalists import expected
from .plan import Plan
from .planning import Verdict
from .space import brief

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
COLUMNS = (
    "trainable",
    "adapter\nfile",
    "adapter",
    "gradients",
    "moments",
    "activations",
    "step\npeak",
    "evaluation\npeak",
)


def rendered(plan: Plan, cores: int) -> Iterator[Table | str]:
    """The plan from top to bottom.

    Args:
        cores: trials that train side by side on a CPU.
    """
    yield from head(plan)
    for label, verdicts in plan.methods.items():
        yield table(plan, label, verdicts)
        for own in verdicts:
            if own.refusal or own.unknown:
                yield f"  {named(own)}: {own.refusal or f'what it needs could not be found: {own.unknown}'}"
    yield from verdict(plan)
    yield from times(plan, cores)


def head(plan: Plan) -> Iterator[str]:
    """The base and how it is run."""
    study, training = plan.study, plan.study.training
    need = next((own.need for own in plan.verdicts if own.need), None)
    weights = f", {size(need.weights)} of weights" if need else ""
    precision = "bf16" if training.precision == "bf16" else study.model.dtype
    yield (
        f"study {study.name} on {plan.device}, {precision}: base of {plan.numbers:,} numbers{weights}, as much as "
        f"loading it needs; steps of {training.batch_size} rows, evaluation of {training.eval_batch_size}"
    )
    if plan.fault:
        yield f"batches are padded, since this model cannot be run packed: {plan.fault}"


def table(plan: Plan, label: str, verdicts: Sequence[Verdict]) -> Table:
    """The corners of one method's search space."""
    found = Table(title=label, title_justify="left")
    found.add_column("configuration", min_width=20, overflow="fold")
    for name in COLUMNS:
        found.add_column(name, justify="right")
    if plan.limit is not None:
        found.add_column("in one\npass", justify="right")
    found.add_column("can it\nrun?")
    for own in verdicts:
        cells = [named(own)]
        if need := own.need:
            parts = (need.files, need.adapter, need.gradients, need.moments, need.activations, need.train)
            cells += [f"{need.trainable:,}", *map(size, (*parts, need.evaluation))]
        else:
            cells += [""] * len(COLUMNS)
        if plan.limit is not None:
            cells.append(str(own.need.times(plan.limit)) if own.need else "")
        answer = "unknown" if own.unknown else "yes" if not own.refusal else "too large" if own.need else "no"
        found.add_row(*cells, answer)
    return found


def named(own: Verdict) -> str:
    """A configuration by what is searched of it."""
    values = {key: brief(own.config.adapter[key]) for key in own.config.varied}
    return ", ".join(f"{key}={value}" for key, value in values.items()) or "as it stands"


def verdict(plan: Plan) -> Iterator[str]:
    """What can run at all."""
    refused = sum(bool(own.refusal) for own in plan.verdicts)
    where = "no limit was given: constraints.vram_gib in the file, or --vram-gib"
    if plan.limit is not None:
        where = f"the limit is {size(plan.limit)}"
    yield f"{len(plan.verdicts) - refused} of {len(plan.verdicts)} configurations can run; {where}"


def times(plan: Plan, cores: int) -> Iterator[str]:
    """How long it will take, as far as something was measured."""
    if not plan.pace:
        yield "time: nothing was measured yet; --measure 3 trains three steps of each method"
        return
    seconds = {label: pace.trial(plan.study) for label, pace in plan.pace.items()}
    for label, pace in plan.pace.items():
        whole = f"{duration(seconds[label])} a trial that is not pruned"
        each = f"{pace.step:.3g} s a step, {pace.evaluation:.3g} s an evaluation"
        yield f"time: {label}: {each}, {whole} ({pace.steps} steps were measured)"
    if (trials := expected(plan.study)) and seconds.keys() == plan.methods.keys():
        workers = cores if plan.device.type == "cpu" else 1
        total = sum(number * seconds[label] for label, number in trials.items()) / workers
        each = f" on {workers} workers" if workers > 1 else ""
        alike = "" if plan.study.budget.per_method else "methods are drawn alike and "
        yield f"time: {duration(total)} for {sum(trials.values()):.0f} trials{each}, if {alike}none is pruned"


def size(count: int) -> str:
    """Bytes in a unit of which there are some."""
    unit = next((unit for unit, one in UNITS.items() if count >= one), None)
    return f"{count / UNITS[unit]:.4g} {unit}" if unit else f"{count} B"


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.3g} s"
    return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"
