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

from workbench.errors import StorageError
from workbench.tracking.runs import StudyRun, Tracking, environment, open_tracking, public_url
from workbench.training.base import pick_device, quiet
from workbench.training.memory import Meter

from . import draw, solo
from .budget import SECONDS, Clock
from .checkpoints import Checkpoints
from .display import Display
from .interrupt import Interrupt
from .planning import Planner
from .pool import crew
from .preflight import preflight
from .record import Books
from .samplers import pruner
from .scheduler import Scheduler, check_pruned
from .space import in_flight
from .spec import Study
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
) -> list[FrozenTrial]:
    """Run a study until its budget is spent, or go on with it where it was stopped.

    Args:
        workers: processes that train; None: one a core on the CPU, elsewhere this process by itself.
        alone: train one trial after the other with the plain loop, in this process.
        pruned: numbers of pruned trials to take up again and train to their last step.

    Returns:
        The study's trials, all of them finished.

    Raises:
        StudyError: the file asks for what the model or the data do not have; nothing was created.
        StorageError: the stores hold another study of this name, or another process is running it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with only_one(stores.home, study.name), Interrupt() as interrupt:
        known = stored_study(study, stores)
        earlier = known.get_trials(deepcopy=False) if known else []
        if known and not pruned and draw.is_over(study, earlier, known.user_attrs.get(SECONDS, 0.0)):
            display.finished_before(earlier)
            return earlier
        for number in pruned:
            check_pruned(study, stores.home, known, number)

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
            tracking = open_tracking(stores.tracking, stores.artifacts)
            optuna_study = open_optuna(study, stores, f"{shop.base.fingerprint}:{shop.data(()).fingerprint}")
            parent = open_parent(study, stores, tracking, shop, meter)
        display.begin(earlier, shop.notes)

        books, clock = Books(study, optuna_study, tracking, parent, shop.raw.fingerprint), Clock(optuna_study)
        status = "FAILED"
        try:
            if alone:
                solo.run(books, shop, clock, display, interrupt, planner)
            else:
                checkpoints = Checkpoints(stores.home, optuna_study)
                Scheduler(books, shop, team, checkpoints, clock, display, interrupt, planner).run(pruned)
            names = {key: f"seconds/shared_{key.removeprefix('seconds/')}" for key in shop.shared_costs}
            parent.summary({names[key]: seconds for key, seconds in shop.shared_costs.items()})
            display.ended(clock.session)
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
    training = study.training.model_dump(exclude={"track_memory"})
    fair = study.budget.per_method is not None
    parts = (model, data, training, study.methods, study.objective, study.search, study.match, fair)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stored_study(study: Study, stores: Stores) -> optuna.Study | None:
    """What an earlier run of this study left, None if there was none."""
    file = stores.optuna.removeprefix("sqlite:///")
    if file != stores.optuna and not Path(file).exists():
        return None
    try:
        storage = optuna.storages.RDBStorage(stores.optuna)
        if study.name not in optuna.get_all_study_names(storage):
            return None
        known = optuna.load_study(study_name=study.name, storage=storage)
    except Exception as error:  # SQLAlchemy's, its drivers' and Optuna's own have no common base
        raise unusable(stores.optuna, error) from error
    check_identity(known, study, "identity", identity(study))
    return known


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
            directions=study.objective.directions,
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
        "data.rows": ", ".join(f"{split} {rows}" for split, rows in raw.rows.items()),
        "base_dropout": "on" if training.base_dropout else "off: the frozen base runs in evaluation mode",
    }
    tags = {
        "workbench.metric": study.objective.metric,
        "workbench.goal": study.objective.goal,
        "workbench.also": " ".join(study.objective.also),
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
