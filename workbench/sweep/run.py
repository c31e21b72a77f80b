"""A sweep, from a study file that was found right to a ranked list of trials."""

from __future__ import annotations

import hashlib
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from workbench.adapters import PeftConfig, PeftModel, get_peft_model
from workbench.adapters.checkpoint import base_path, base_slots, load_peft_weights, write_weights
from workbench.adapters.matching import sites
from workbench.errors import AdapterError, DataError, Diverged, OutOfMemory, StorageError
from workbench.tracking.runs import Outcome, StudyRun, Tracking, TrialRun, environment, open_tracking, public_url
from workbench.training.base import Base, load_base, pick_device, quiet
from workbench.training.data import RawData, TaskData, read_data, tokenize
from workbench.training.loop import Result, train
from workbench.training.memory import Meter, release
from workbench.training.tokens import resolve

from .configure import peft_config
from .display import Display
from .domains import Tokens
from .interrupt import Interrupt
from .preflight import preflight
from .space import TrialConfig, brief, combinations, pruner, sampler, suggest
from .spec import Study
from .stores import Stores


def sweep(study: Study, stores: Stores, display: Display) -> list[FrozenTrial]:
    """Run a study until its budget is spent, or go on with it where it was stopped.

    Returns:
        The study's trials, all of them finished.

    Raises:
        StudyError: the file asks for what the model or the data do not have; nothing was created.
        StorageError: the stores hold another study of this name, or another process is running it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with only_one(stores.home, study.name), Interrupt() as interrupt:
        earlier = stored_trials(study, stores)
        if spent(study, earlier):
            display.finished_before(earlier)
            return earlier

        meter = Meter(pick_device(study.training.device))
        with display.waiting("reading the data and loading the base model"), meter.phase("load"):
            raw = read_data(study.data, study.model.task)
            base = load_base(study.model, raw.labels or None, study.training.seed, study.training.device)
            shop = Workshop(study, base, raw, stores.home / "cache", interrupt)
            shop.data(())  # tokenised once, here, with the loading and not with the first trial
        preflight(study, base, shop.data(()).train)

        with display.waiting("opening the stores"):
            tracking = open_tracking(stores.tracking, stores.artifacts)
            optuna_study = open_optuna(study, stores, f"{base.fingerprint}:{shop.data(()).fingerprint}")
            parent = open_parent(study, stores, tracking, shop, meter)
        display.begin(earlier, shop.notes)

        status = "FAILED"
        try:
            for trial in trials(study, optuna_study):
                interrupt.check()
                run_trial(trial, optuna_study, shop, tracking, parent, display)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except StorageInternalError as error:
            raise unusable(stores.optuna, error) from error
        finally:
            parent.end(status)  # type: ignore[arg-type]
        return optuna_study.get_trials(deepcopy=False)


@contextmanager
def only_one(home: Path, name: str) -> Iterator[None]:
    """Hold the study's lock. It goes with the process, so a trial found running under it belongs to a dead one."""
    lock = filelock.FileLock(home / "locks" / f"{name}.lock", timeout=0)
    try:
        (home / "locks").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise StorageError(
                f"Another `workbench sweep` is running the study {name!r} in {home}; wait for it or stop it."
            ) from error
        try:
            yield
        finally:
            lock.release()
    except OSError as error:  # no permission, no space left: here or later
        raise StorageError(f"{error.filename or home} cannot be used: {error.strerror or error}") from error


# -------------------------------------------------------------------- the stores


def identity(study: Study) -> str:
    """Hash of all that makes two runs of a study comparable; its budget, name and place are not among it."""
    model = study.model.model_dump(exclude={"path", "tokenizer"})
    data = study.data.model_dump(exclude={"path", "train", "validation", "test"})
    parts = (model, data, study.training, study.methods, study.objective, study.search)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stored_trials(study: Study, stores: Stores) -> list[FrozenTrial]:
    """The trials that an earlier run of this study left, [] if there was none."""
    file = stores.optuna.removeprefix("sqlite:///")
    if file != stores.optuna and not Path(file).exists():
        return []
    try:
        storage = optuna.storages.RDBStorage(stores.optuna)
        if study.name not in optuna.get_all_study_names(storage):
            return []
        known = optuna.load_study(study_name=study.name, storage=storage)
    except Exception as error:  # SQLAlchemy's, its drivers' and Optuna's own have no common base
        raise unusable(stores.optuna, error) from error
    check_identity(known, study, "identity", identity(study))
    return known.get_trials(deepcopy=False)


def unusable(url: str, error: Exception) -> StorageError:
    """What to say of a storage of Optuna's that fails."""
    reason = str(error.__cause__ or error).splitlines()[0]  # the driver's own words
    return StorageError(f"Optuna's storage {public_url(url)} cannot be used: {reason}")


def check_identity(known: optuna.Study, study: Study, key: str, value: str) -> None:
    """Refuse to mix results that cannot be compared."""
    before = known.user_attrs.setdefault(key, value)
    if before != value:
        what = "the file" if key == "identity" else "the model or the data"
        raise StorageError(
            f"The study {study.name!r} was begun with other settings: {what} changed since, so old and new trials "
            f"could not be compared. Give the changed study a new name in {study.path}, or restore it. (The budget "
            f"may change freely.)"
        )


def open_optuna(study: Study, stores: Stores, fingerprint: str) -> optuna.Study:
    """Optuna's study, made or found again."""
    url = stores.optuna
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = optuna.create_study(
            study_name=study.name,
            storage=optuna.storages.RDBStorage(url),
            pruner=pruner(study),
            direction=study.objective.goal,
            load_if_exists=True,
        )
    except Exception as error:
        raise unusable(url, error) from error
    for key, value in (("identity", identity(study)), ("fingerprint", fingerprint)):
        check_identity(opened, study, key, value)
        opened.set_user_attr(key, value)
    return opened


def open_parent(study: Study, stores: Stores, tracking: Tracking, shop: Workshop, meter: Meter) -> StudyRun:
    """The study's MLflow run, with everything that its trials share."""
    base, raw, training = shop.base, shop.raw, study.training
    params = {
        **{f"model.{key}": value for key, value in study.model.model_dump().items() if value not in (None, {})},
        **{f"training.{key}": value for key, value in training.model_dump().items()},
        **{f"search.{key}": value for key, value in study.search.model_dump().items()},
        "model.fingerprint": base.fingerprint,
        "data.fingerprint": raw.fingerprint,
        "data.rows": ", ".join(f"{split} {rows}" for split, rows in shop.data(()).rows.items()),
        "base_dropout": "on" if training.base_dropout else "off: the frozen base runs in evaluation mode",
    }
    tags = {
        "workbench.metric": study.objective.metric,
        "workbench.goal": study.objective.goal,
        "workbench.optuna": public_url(stores.optuna),
        "workbench.file": str(study.path),
        **{f"workbench.env.{key}": value for key, value in environment().items()},
    }
    parent = tracking.open_study(study.name, params, tags, {"study.yaml": study.text})
    tracking.log_dataset(parent, study.name, study.data.path or study.data.train or "", raw.fingerprint)
    parent.summary(meter.metrics)
    if study.model.weights == "random":  # nobody could load an adapter without the weights that it was trained on
        with tempfile.TemporaryDirectory() as folder, quiet():
            base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
            parent.artifacts(folder, "base")
    return parent


# -------------------------------------------------------------------- the trials


def spent(study: Study, found: list[FrozenTrial]) -> bool:
    """Whether the budget is used up: no further trial starts."""
    if any(not trial.state.is_finished() for trial in found):
        return False  # a trial that was cut off is finished first
    budget, done = study.budget, len(found)
    every = combinations(study) if study.search.sampler == "grid" else None
    return (
        (budget.trials is not None and done >= budget.trials)
        or (every is not None and done >= every)
        or (budget.steps is not None and sum(t.user_attrs.get("steps", 0) for t in found) >= budget.steps)
        or (budget.minutes is not None and sum(t.user_attrs.get("seconds", 0.0) for t in found) >= 60 * budget.minutes)
    )


def trials(study: Study, optuna_study: optuna.Study) -> Iterator[optuna.Trial]:
    """Trials until the budget is spent: first those that a dead process left running, then new ones.

    The sampler starts anew for each, so that what is drawn depends on the trial's number and on the trials before it,
    not on whether the sweep was stopped in between.
    """
    for cut_off in optuna_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        optuna_study.sampler = sampler(study, cut_off.number)
        yield optuna.Trial(optuna_study, cut_off._trial_id)
    while not spent(study, found := optuna_study.get_trials(deepcopy=False)):
        optuna_study.sampler = sampler(study, len(found))
        yield optuna_study.ask()


def run_trial(
    trial: optuna.Trial,
    optuna_study: optuna.Study,
    shop: Workshop,
    tracking: Tracking,
    parent: StudyRun,
    display: Display,
) -> None:
    """One trial, from its parameters to a typed outcome. Only Ctrl-C and broken stores come out as exceptions."""
    study = shop.study
    config = suggest(trial, study)
    settings = study.training.model_copy(update=config.training)
    tags = {
        "workbench.label": config.label,
        "workbench.method": config.method,
        "workbench.seed": str(settings.seed),
        "workbench.searched": " ".join(config.varied),
    }
    params = {f"{config.label}.{key}": readable(value) for key, value in (config.adapter | config.training).items()}
    run = parent.open_trial(trial.number, params, tags)
    tracking.log_dataset(run, study.name, study.data.path or study.data.train or "", shop.raw.fingerprint)
    trial.set_user_attr("run_id", run.run_id)
    display.trial(trial.number, config, settings.steps)

    reported = optuna_study.get_trials(deepcopy=False)[trial.number].intermediate_values  # before a crash
    last: dict[str, float] = {}
    progress = Progress(Meter(shop.base.device))

    def on_step(step: int, loss: float) -> None:
        shop.interrupt.check()
        progress.steps = step
        run.log(step, {"train.loss": loss})
        display.step(trial.number, step, loss)

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        last.update(metrics)
        run.log(step, {f"validation.{name}": value for name, value in metrics.items()})
        display.evaluated(trial.number, step, metrics)
        if step not in reported:
            trial.report(metrics[study.objective.metric], step)
        worse = trial.should_prune()  # at the last step too: some pruners learn from this call
        if worse and step < settings.steps:
            raise optuna.TrialPruned(f"worse than others at step {step}")

    outcome: Outcome = "complete"
    message = trace = ""
    try:
        with shop.lend(config) as (base, data, peft_config), adapted(base, peft_config, settings.seed) as model:
            count(model, trial, run)
            result = train(
                model,
                base,
                data,
                settings,
                seed=settings.seed,
                order_seed=settings.seed if settings.data_order == "shared" else settings.seed + 1 + trial.number,
                on_step=on_step,
                on_eval=on_eval,
                meter=progress.meter,
            )
            keep(result, model, shop, base, config, trial, run)
    except optuna.TrialPruned as pruned:
        outcome, message = "pruned", str(pruned)
    except Diverged as error:
        outcome, message = "diverged", str(error)
    except (OutOfMemory, torch.OutOfMemoryError, MemoryError) as error:  # the last two: when the adapter is made
        outcome, message = "out_of_memory", str(error) or "no memory left"
    except (AdapterError, DataError) as error:
        outcome, message = "infeasible", str(error)
    except KeyboardInterrupt:
        run.end("interrupted", "stopped by Ctrl-C; the next `workbench sweep` of this study finishes it")
        raise
    except (StorageError, StorageInternalError):
        raise
    except Exception as error:  # a bug in a method or in this program ends one trial, not a night's sweep
        outcome, message, trace = "failed", f"{type(error).__name__}: {error}", traceback.format_exc()
    release(shop.base.device)

    seconds = progress.seconds
    run.summary(progress.meter.metrics | {"seconds/total": seconds})
    run.end(outcome, message, trace)
    attributes = {
        "outcome": outcome,
        "message": message,
        "metrics": last,
        "seconds": seconds,
        "steps": progress.steps,
    }
    for key, value in attributes.items():
        trial.set_user_attr(key, value)
    value = last.get(study.objective.metric)
    if outcome == "complete":
        optuna_study.tell(trial, value)
    else:
        optuna_study.tell(trial, state=TrialState.PRUNED if outcome == "pruned" else TrialState.FAIL)
    display.finished(trial.number, outcome, message, value, seconds)


@dataclass
class Progress:
    """How far a trial came, also when it did not end well."""

    meter: Meter
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class Workshop:
    """What the trials of a study share: the base model, and the data, tokenised once for each vocabulary."""

    study: Study
    base: Base
    raw: RawData
    cache: Path
    interrupt: Interrupt
    tokenised: dict[tuple[str, ...], TaskData] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        dropout = "on" if self.study.training.base_dropout else "off (evaluation mode)"
        return [*self.data(()).notes, f"the base model is frozen; its own dropout is {dropout}"]

    def data(self, new_tokens: tuple[str, ...], base: Base | None = None) -> TaskData:
        """The tokenised data, for the base's own vocabulary or one with new tokens."""
        if new_tokens not in self.tokenised:
            self.tokenised[new_tokens] = tokenize(self.raw, (base or self.base).tokenizer, self.cache)
        return self.tokenised[new_tokens]

    @contextmanager
    def lend(self, config: TrialConfig) -> Iterator[tuple[Base, TaskData, PeftConfig]]:
        """The base, the data and the adapter's configuration for one trial, with its vocabulary."""
        wanted = [value for value in config.adapter.values() if isinstance(value, Tokens)]
        new_tokens = tuple(dict.fromkeys(token for tokens in wanted for token in tokens.new_tokens))
        with self.base.vocabulary(new_tokens) as base:
            data = self.data(new_tokens, base)
            fields = {
                key: resolve(value, base.tokenizer, data.train) if isinstance(value, Tokens) else value
                for key, value in config.adapter.items()
            }
            yield base, data, peft_config(config.method, base.task, fields, self.study.training.steps)


@contextmanager
def adapted(base: Base, config: PeftConfig, seed: int) -> Iterator[PeftModel]:
    """The base model with a new adapter, drawn from the seed, and the plain base again afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.delete_adapter(list(model.peft_config))
        base.model.requires_grad_(False)


def count(model: PeftModel, trial: optuna.Trial, run: TrialRun) -> None:
    """Note the parameters before training starts, so that a trial that fails has them too."""
    trainable, total = model.get_nb_trainable_parameters()
    run.summary({"trainable_params": trainable, "all_params": total, "trainable_percent": 100 * trainable / total})
    trial.set_user_attr("trainable_params", trainable)


def keep(
    result: Result,
    model: PeftModel,
    shop: Workshop,
    base: Base,
    config: TrialConfig,
    trial: optuna.Trial,
    run: TrialRun,
) -> None:
    """Save the trained adapter as the run's artifact; `PeftModel.from_pretrained` of peft loads it."""
    with tempfile.TemporaryDirectory() as folder:
        # a random base is an artifact of its own; of a pretrained one, what its files lack goes with the adapter
        save_adapter(model, base.fresh if shop.study.model.weights == "pretrained" else (), Path(folder))
        if any(isinstance(value, Tokens) and value.new_tokens for value in config.adapter.values()):
            base.tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("adapter_*"))
        run.summary({"adapter_bytes": size, "tokens_seen": result.tokens})
        run.artifacts(folder, "adapter")
    trial.set_user_attr("adapter_bytes", size)


def save_adapter(model: PeftModel, fresh: Iterable[str], folder: Path) -> None:
    """Write the adapter, and with it the weights that were drawn from the seed since the base's own files lack them,
    such as a pooler: whoever puts the adapter on the base gets the model that was measured.

    Args:
        fresh: names of those weights in the base model.
    """
    model.save_pretrained(folder, save_embedding_layers=False)
    paths, prefix = {s.path: base_path(s) for s in sites(model.get_base_model())}, model.base_model.key_prefix
    tensors = load_peft_weights(folder)
    own = base_slots(model.get_base_model())
    for name in fresh:
        path, _, leaf = name.rpartition(".")
        key = f"{paths[path]}.{leaf}"
        if prefix + name not in tensors:  # the adapter has trained a copy of its own
            tensors[prefix + key] = getattr(*own[key]).detach().cpu()
    write_weights(tensors, folder)


def readable(value: Any) -> Any:
    """A hyperparameter as a param of MLflow: as it is, but for lists and tokens, which are spelt out."""
    return brief(value) if isinstance(value, Tokens | list) else value
