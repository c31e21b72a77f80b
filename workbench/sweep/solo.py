"""Each trial alone, one after the other, with the plain training loop: for undisturbed timings."""

from __future__ import annotations

import tempfile
import time
import traceback
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError

from workbench.errors import StorageError, TimedOut, TrialFailed
from workbench.tracking.runs import Outcome
from workbench.training.adapted import ADAPTER, adapted, count, save_results
from workbench.training.loop import train
from workbench.training.memory import Meter, release

from . import draw
from .budget import Clock
from .display import Display
from .entry import Settled, enter, settle
from .failures import Failures
from .fleet import Fleet
from .interrupt import Interrupt, let_go
from .planning import Planner
from .record import INTERRUPTED, Books, Progress, outcome
from .roles import About
from .workshop import Workshop, as_failure


def run(
    books: Books,
    shop: Workshop,
    clock: Clock,
    display: Display,
    interrupt: Interrupt,
    fleet: Fleet,
    planner: Planner | None,
    failures: Failures | None,
) -> None:
    """Train until the budget is spent."""

    def settled() -> Settled | None:
        trial = following(books, clock, fleet)
        if trial is None:
            return None
        fleet.claim(trial)
        return settle(trial, books, shop, planner)

    while trial := fleet.in_turn(settled):
        interrupt.check()
        run_trial(trial, books, shop, display, interrupt, planner)
        fleet.forget(trial.trial)
        clock.save()
        if planner and (hopeless := planner.hopeless):
            raise hopeless
        if failures:
            failures.check()


def following(books: Books, clock: Clock, fleet: Fleet) -> optuna.Trial | None:
    """The next trial until the budget is spent: first those that were left, then new ones, then finalists."""
    study, optuna_study = books.study, books.optuna_study
    return (
        draw.left(study, optuna_study, fleet)
        or draw.searched(study, optuna_study, clock.seconds)
        or draw.finalist(study, optuna_study)
    )


def run_trial(
    settled: Settled,
    books: Books,
    shop: Workshop,
    display: Display,
    interrupt: Interrupt,
    planner: Planner | None,
) -> None:
    """One trial, from its parameters to a typed outcome. Only Ctrl-C and broken stores come out as exceptions."""
    trial, entry = settled.trial, enter(settled, books, planner, Progress())
    record, config, seeds = entry.record, entry.record.config, entry.seeds
    settings, limit = shop.settings(config), shop.study.constraints.seconds
    display.trial(trial.number, config, note=entry.note)
    meter = Meter(shop.base.device)
    prunes = About.of_trial(trial).role == "search" and not shop.study.objective.several

    started = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        interrupt.check()
        record.progress.step = step
        record.run.log(step, {"train.loss": loss})
        display.step(trial.number, step, loss)
        if limit is not None and time.monotonic() - started > limit and step < settings.steps:
            raise TimedOut(f"step {step}: the {limit:.3g} seconds that it had are over")

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        record.progress.costs = dict(meter.metrics)
        record.evaluated(step, metrics)
        display.evaluated(trial.number, step, metrics)
        if record.too_slow:
            raise TimedOut(record.too_slow)
        if prunes and step < settings.steps and trial.should_prune():
            raise optuna.TrialPruned(f"worse than others at step {step}")

    if entry.refusal:
        record.end(*entry.refusal)
        display.finished(trial.number, *entry.refusal, None, 0.0)
        return
    ending: tuple[Outcome, str, str] = ("complete", "", "")
    try:
        with (
            shop.lend(config.new_tokens) as (base, data),
            adapted(base, shop.peft_config(config, base, data), seeds.init, seeds.init != settings.seed) as model,
        ):
            record.parameters(*count(model))
            result = train(
                model,
                base,
                data,
                settings,
                seed=seeds.init,
                order_seed=seeds.order,
                on_step=on_step,
                on_eval=on_eval,
                meter=meter,
            )
            record.progress.tokens = result.tokens
            assert result.measured is not None
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                size = save_results(model, base, data.validation, result.measured, folder)
                if config.new_tokens:
                    base.tokenizer.save_pretrained(folder / ADAPTER)
                record.keep(folder, size)
    except optuna.TrialPruned as pruned:
        ending = ("pruned", str(pruned), "")
    except KeyboardInterrupt as error:
        let_go(error)
        record.run.end("interrupted", INTERRUPTED)
        raise
    except (StorageError, StorageInternalError):
        raise
    except Exception as error:  # a bug in a method or in this program ends one trial, not a night's sweep
        failure = as_failure(error)
        if isinstance(failure, StorageError):
            raise failure from error
        ending = (outcome(failure), str(failure), traceback.format_exc() if isinstance(failure, TrialFailed) else "")
    release(shop.base.device)
    record.progress.costs = dict(meter.metrics)
    record.end(*ending)
    display.finished(trial.number, *ending[:2], record.objective, record.progress.seconds)
