"""How a trial begins: its configuration, its seeds, what it will need, and whether it is trained at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import optuna

from workbench.tracking.runs import Outcome

from .planning import Planner, Verdict
from .record import Books, Progress, Record
from .roles import ABOUT, DUPLICATE, RESUMES, About, drawn
from .space import TrialConfig, suggest
from .workshop import Seeds, Workshop


@dataclass(frozen=True)
class Settled:
    """A trial of which everything is drawn.

    Attributes:
        twin: the first trial of the search that has the same configuration.
        verdict: what it will need, where somebody asks.
    """

    trial: optuna.Trial
    config: TrialConfig
    seeds: Seeds
    twin: int | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Entry:
    """A trial that begins, or goes on.

    Attributes:
        refusal: the outcome of a trial that is not trained, and why; None if it is.
        note: what is special about it, for people.
    """

    record: Record
    seeds: Seeds
    refusal: tuple[Outcome, str] | None
    note: str


def settle(trial: optuna.Trial, books: Books, shop: Workshop, planner: Planner | None) -> Settled:
    """Draw what is missing of a trial's configuration, in turn: whoever is next compares his own with it."""
    config = suggest(trial, shop.study)
    verdict = planner.judge(config) if planner else None
    config = verdict.config if verdict else config
    seeds, twin = seeds_of(trial, config, books, shop)
    return Settled(trial, config, seeds, twin, verdict)


def enter(settled: Settled, books: Books, planner: Planner | None, progress: Progress) -> Entry:
    """Open a trial's record.

    Args:
        progress: how far it came before.
    """
    trial, config, twin, verdict = settled.trial, settled.config, settled.twin, settled.verdict
    refusal: tuple[Outcome, str] | None = None
    fresh = not progress.step
    record = (
        books.begin(trial, config, progress)
        if fresh or "run_id" not in trial.user_attrs
        else books.go_on(trial, config, progress)
    )
    if fresh and twin is not None and books.study.search.duplicates == "skip":
        refusal = DUPLICATE, f"its configuration is that of trial {twin}"
    elif fresh and planner and verdict:
        record.predicted(verdict, planner)
        planner.heed(verdict)
        if verdict.refusal:
            refusal = "infeasible", verdict.refusal
    return Entry(record, settled.seeds, refusal, note(trial, twin))


def seeds_of(trial: optuna.Trial, config: TrialConfig, books: Books, shop: Workshop) -> tuple[Seeds, int | None]:
    """A trial's seeds, noted with it, and the first trial of the search that has the same configuration."""
    about = About.of_trial(trial)
    known = drawn(books.optuna_study.get_trials(deepcopy=False)[: trial.number])
    twins = [other.number for other in known if About.of_trial(other).config == config.key]
    seeds = shop.seeds(trial.user_attrs.get(RESUMES, trial.number), len(twins))
    if about.init is not None and about.order is not None:
        seeds = Seeds(about.init, about.order)
    noted = replace(about, init=seeds.init, order=seeds.order, config=config.key)
    if noted != about:
        trial.set_user_attr(ABOUT, noted.plain[ABOUT])
    searching = about.role != "finalist" and RESUMES not in trial.user_attrs
    return seeds, twins[0] if twins and searching else None


def note(trial: optuna.Trial, twin: int | None) -> str:
    """What is special about a trial."""
    about = About.of_trial(trial)
    if RESUMES in trial.user_attrs:
        return f"takes up trial {trial.user_attrs[RESUMES]} again"
    if about.role == "finalist":
        return f"trial {about.of} on seeds {about.init} and {about.order}"
    if about.role == "default":
        return "the method's defaults"
    return "" if twin is None else f"as trial {twin}, on another seed"
