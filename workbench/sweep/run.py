"""A sweep, from a study file that was found right to a ranked list of trials."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import filelock
import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from workbench.errors import StorageError
from workbench.tracking.runs import Status, StudyRun, Tracking, environment, open_tracking, public_url
from workbench.training.base import pick_device, quiet
from workbench.training.memory import Meter

from . import draw, solo
from .budget import SECONDS, Clock
from .checkpoints import Checkpoints
from .display import Display
from .failures import Failures
from .fleet import Fleet
from .interrupt import Interrupt
from .planning import Planner
from .pool import crew
from .preflight import preflight
from .record import Books
from .samplers import pruner
from .scheduler import Scheduler, check_pruned
from .space import in_flight
from .spec import Study
from .storage import Storage, open_storage, patiently, unusable
from .stores import Stores
from .workshop import Workshop


def sweep(
    study: Study,
    stores: Stores,
    display: Display,
    *,
    workers: int | None = None,
    alone: bool = False,
    pruned: Sequence[int] = (),
    max_failures: int | None = None,
) -> list[FrozenTrial]:
    """Run a study until its budget is spent, or go on with it where it was stopped.

    Args:
        workers: processes that train; None: one a core on the CPU, elsewhere this process by itself.
        alone: train one trial after the other with the plain loop, in this process.
        pruned: numbers of pruned trials to take up again and train to their last step.
        max_failures: failed trials in a row after which the study is stopped; None: any number.

    Returns:
        The study's trials, all of them finished.

    Raises:
        StudyError: the file asks for what the model or the data do not have; nothing was created.
        StorageError: the stores hold another study of this name, or another sweep of it is running.
        StudyFails: its trials only fail.
    """
    with only_one(stores.home, study.name):
        if pruned:
            known = stored_study(study, stores)
            for number in pruned:
                check_pruned(study, stores.home, known, number)
        return take_part(study, stores, display, False, workers, alone, pruned, max_failures)


def work(
    study: Study, stores: Stores, display: Display, workers: int | None = None, max_failures: int | None = None
) -> list[FrozenTrial]:
    """Be one of the workers of a study, which may be on many machines, until there is nothing left to do for any.

    Args, returns and raises as `sweep`.
    """
    with file_errors(stores.home):
        return take_part(study, stores, display, True, workers, False, (), max_failures)


def take_part(
    study: Study,
    stores: Stores,
    display: Display,
    shared: bool,
    workers: int | None,
    alone: bool,
    pruned: Sequence[int],
    max_failures: int | None,
) -> list[FrozenTrial]:
    """See `sweep`.

    Args:
        shared: others are expected to join. What is drawn then depends on who is faster.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with Interrupt() as interrupt:
        # a worker may be there before the servers; for a sweep one that does not answer is more likely a mistake
        opened = patiently if shared else (lambda do: do())
        known = opened(lambda: stored_study(study, stores))
        earlier = known.get_trials(deepcopy=False) if known else []
        if known and not pruned and draw.is_over(study, earlier, known.user_attrs.get(SECONDS, 0.0)):
            Checkpoints(stores.home, known).tidy(earlier)  # of a worker that died here, while others went on elsewhere
            display.finished_before(earlier)
            return earlier

        loaded: list[torch.Tensor] = []
        meter = Meter(pick_device(study.training.device), (lambda: loaded) if study.training.track_memory else None)
        with display.waiting("reading the data and loading the base model"), meter.phase("load"):
            shop = Workshop.open(study, stores.home)
            loaded += [*shop.base.model.parameters(), *shop.base.model.buffers()]
        team = crew(shop, interrupt, workers, in_flight(study))
        preflight(study, shop.base, shop.data(()).train)

        planner = None
        peaks = study.asks_for_memory or shop.base.device.type == "cuda"
        if peaks or study.asks_for_size:
            planner = Planner.beside(shop, "--solo pads" if alone else None, peaks)

        with display.waiting("opening the stores"):
            tracking = opened(lambda: open_tracking(stores.tracking, stores.artifacts))
            storage = opened(lambda: open_storage(stores, study.name))
            fingerprint = f"{shop.base.fingerprint}:{shop.data(()).fingerprint}"
            optuna_study = patiently(lambda: open_optuna(study, storage, fingerprint))
            fleet = Fleet(optuna_study, storage, stores.home, shared)
            checkpoints = fleet.in_turn(
                lambda: Checkpoints(stores.home, optuna_study, None if stores.artifacts else tracking)
            )
            checkpoints.tidy(earlier)
            clock = Clock(optuna_study)
            failures = None if max_failures is None else Failures(optuna_study, max_failures)
            status: Status | None = "FAILED"
            with interrupt.held():  # whoever sets the study's run running also closes it
                parent = fleet.in_turn(lambda: open_parent(study, stores, tracking, shop, meter))
                books = Books(study, optuna_study, tracking, parent, shop.raw.fingerprint)
        try:
            display.begin(earlier, shop.notes)
            interrupt.check()
            with fleet.joined():
                if alone:
                    solo.run(books, shop, clock, display, interrupt, fleet, planner, failures)
                else:
                    Scheduler(books, shop, team, checkpoints, clock, display, interrupt, fleet, planner, failures).run(
                        pruned
                    )
            names = {key: f"seconds/shared_{key.removeprefix('seconds/')}" for key in shop.shared_costs}
            parent.summary({names[key]: seconds for key, seconds in shop.shared_costs.items()})
            display.ended(clock.session)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except (StorageError, StorageInternalError) as error:
            status = None
            if not shared:
                parent.end("FAILED")
            if isinstance(error, StorageInternalError):
                raise unusable(stores.optuna, error) from error
            raise
        finally:
            if status:
                close(status, books, fleet)
        trials = optuna_study.get_trials(deepcopy=False)
        checkpoints.tidy(trials)
        return trials


def close(status: Status, books: Books, fleet: Fleet) -> None:
    """Close the study's run, unless other workers go on."""
    trials = books.optuna_study.get_trials(deepcopy=False)
    if status == "KILLED" and draw.is_over(books.study, trials, books.optuna_study.user_attrs.get(SECONDS, 0.0)):
        status = "FINISHED"  # Ctrl-C came when all was done
    if status == "FINISHED":
        books.parent.drop_strays({trial.user_attrs["run_id"] for trial in trials if "run_id" in trial.user_attrs})
        fleet.tidy()
    elif fleet.others(trials):
        return
    books.parent.end(status)


@contextmanager
def only_one(home: Path, name: str) -> Iterator[None]:
    """Hold the study's lock, which goes with the process."""
    lock = filelock.FileLock(home / "locks" / f"{name}.lock", timeout=0)
    with file_errors(home):
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


@contextmanager
def file_errors(home: Path) -> Iterator[None]:
    """Say which file cannot be used: no permission, no space left."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or home} cannot be used: {error.strerror or error}") from error


# -------------------------------------------------------------------- the stores


def identity(study: Study) -> str:
    """Hash of all that makes two runs of a study comparable; its budget, name and place are not among it."""
    model = study.model.model_dump(exclude={"path", "tokenizer"})
    data = study.data.model_dump(exclude={"path", "train", "validation", "test"})
    training = study.training.model_dump(exclude={"track_memory"})
    fair = study.budget.per_method is not None
    parts = (model, data, training, study.methods, study.objective, study.search, study.match, fair)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stored_study(study: Study, stores: Stores) -> optuna.Study | None:
    """What an earlier run of this study left, None if there was none."""
    file = stores.optuna.removeprefix("sqlite:///")
    if file != stores.optuna and not Path(file).exists():
        return None
    storage = open_storage(stores, study.name)
    try:
        known = optuna.load_study(study_name=study.name, storage=storage)
    except KeyError:
        return None
    except (StorageInternalError, SQLAlchemyError) as error:
        raise unusable(stores.optuna, error) from error
    check_identity(known, study, "identity", identity(study))
    return known


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


def open_optuna(study: Study, storage: Storage, fingerprint: str) -> optuna.Study:
    """Optuna's study, made or found again."""
    opened = optuna.create_study(
        study_name=study.name,
        storage=storage,
        pruner=pruner(study),
        directions=study.objective.directions,
        load_if_exists=True,
    )
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
        "data.rows": ", ".join(f"{split} {rows}" for split, rows in raw.rows.items()),
        "base_dropout": "on" if training.base_dropout else "off: the frozen base runs in evaluation mode",
    }
    tags = {
        "workbench.metric": study.objective.metric,
        "workbench.goal": study.objective.goal,
        "workbench.also": " ".join(study.objective.also),
        "workbench.budget": json.dumps(study.budget.model_dump(exclude_none=True) | {"methods": len(study.methods)}),
        "workbench.per_method": json.dumps(study.budget.per_method.given) if study.budget.per_method else "",
        "workbench.finalists": json.dumps(study.finalists.model_dump()) if study.finalists else "",
        "workbench.test_rows": str(raw.rows.get("test", 0)),
        "workbench.optuna": public_url(stores.optuna),
        "workbench.file": str(study.path.resolve()),
        **{f"workbench.env.{key}": value for key, value in environment().items()},
    }
    parent = tracking.open_study(study.name, params, tags, {"study.yaml": study.text})
    tracking.log_dataset(parent, study.name, study.data.path or study.data.train or "", raw.fingerprint)
    parent.summary(meter.metrics)
    if shop.difference:
        parent.summary({f"bf16/{name}": value for name, value in asdict(shop.difference).items()})
    if study.model.weights == "random":  # nobody could load an adapter without the weights that it was trained on
        with tempfile.TemporaryDirectory() as folder, quiet():
            base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
            parent.artifacts(folder, "base")
    return parent
