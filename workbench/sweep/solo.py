"""Each trial alone, one after the other, with the plain training loop: for undisturbed timings."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from workbench.errors import StorageError, TrialFailed
from workbench.tracking.runs import Outcome
from workbench.training.adapted import adapted, save_adapter
from workbench.training.loop import train
from workbench.training.memory import Meter, release

from .budget import Clock, counted, spent
from .display import Display
from .interrupt import Interrupt
from .planning import Planner
from .record import INTERRUPTED, Books, outcome
from .space import sampler, suggest
from .workshop import Workshop, as_failure


def run(
    books: Books, shop: Workshop, clock: Clock, display: Display, interrupt: Interrupt, planner: Planner | None
) -> None:
    """Train until the budget is spent."""
    for trial in trials(books, clock, planner):
        interrupt.check()
        run_trial(trial, books, shop, display, interrupt, planner)
        clock.save()


def trials(books: Books, clock: Clock, planner: Planner | None) -> Iterator[optuna.Trial]:
    """Trials until the budget is spent: first those that a dead process left running, then new ones."""
    study, optuna_study = books.study, books.optuna_study
    for cut_off in optuna_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        optuna_study.sampler = sampler(study, cut_off.number)
        yield optuna.Trial(optuna_study, cut_off._trial_id)
    while not spent(study, found := optuna_study.get_trials(deepcopy=False), clock.seconds):
        if planner and (hopeless := planner.hopeless):
            raise hopeless
        optuna_study.sampler = sampler(study, len(counted(found)))
        yield optuna_study.ask()


def run_trial(
    trial: optuna.Trial,
    books: Books,
    shop: Workshop,
    display: Display,
    interrupt: Interrupt,
    planner: Planner | None,
) -> None:
    """One trial, from its parameters to a typed outcome. Only Ctrl-C and broken stores come out as exceptions."""
    config = suggest(trial, shop.study)
    settings = shop.settings(config)
    record = books.begin(trial, config)
    display.trial(trial.number, config)
    meter = Meter(shop.base.device)

    def on_step(step: int, loss: float) -> None:
        interrupt.check()
        record.progress.step = step
        record.run.log(step, {"train.loss": loss})
        display.step(trial.number, step, loss)

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        record.evaluated(step, metrics)
        display.evaluated(trial.number, step, metrics)
        if step < settings.steps and trial.should_prune():
            raise optuna.TrialPruned(f"worse than others at step {step}")

    if planner:
        verdict = planner.judge(config)
        record.predicted(verdict, planner.limit)
        if verdict.refusal:
            record.end("infeasible", verdict.refusal)
            display.finished(trial.number, "infeasible", verdict.refusal, None, 0.0)
        planner.heed(verdict)
        if verdict.refusal:
            return
    ending: tuple[Outcome, str, str] = ("complete", "", "")
    try:
        with (
            shop.lend(config.new_tokens) as (base, data),
            adapted(base, shop.peft_config(config, base, data), settings.seed) as model,
        ):
            record.parameters(*model.get_nb_trainable_parameters())
            result = train(
                model,
                base,
                data,
                settings,
                seed=settings.seed,
                order_seed=shop.order_seed(trial.number),
                on_step=on_step,
                on_eval=on_eval,
                meter=meter,
            )
            record.progress.tokens = result.tokens
            with tempfile.TemporaryDirectory() as folder:
                size = save_adapter(model, base, Path(folder))
                if config.new_tokens:
                    base.tokenizer.save_pretrained(folder)
                record.keep(Path(folder), size)
    except optuna.TrialPruned as pruned:
        ending = ("pruned", str(pruned), "")
    except KeyboardInterrupt:
        record.run.end("interrupted", INTERRUPTED)
        raise
    except (StorageError, StorageInternalError):
        raise
    except Exception as error:  # a bug in a method or in this program ends one trial, not a night's sweep
        failure = as_failure(error)
        ending = (outcome(failure), str(failure), traceback.format_exc() if isinstance(failure, TrialFailed) else "")
    release(shop.base.device)
    record.progress.add(meter.metrics)
    record.end(*ending)
    display.finished(trial.number, *ending[:2], record.objective, record.progress.seconds)
