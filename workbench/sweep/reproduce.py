"""`workbench reproduce`: a trial trained again from what MLflow holds of it, to see whether it comes to the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import StorageError, TrialFailed
from workbench.tracking.recorded import Recorded, RecordedStudy, recorded
from workbench.training.halved import HALVED
from workbench.training.stint import OnStep, Report

from .match import restored
from .pool import one_thread
from .space import TrialConfig
from .spec import load_study
from .stores import Stores
from .workshop import Job, Seeds, Workshop


@dataclass(frozen=True)
class Again:
    """What came of training a trial again.

    Attributes:
        config: its hyperparameters.
        step: at which it was measured.
        before, now: metrics of the validation split.
    """

    config: TrialConfig
    step: int
    before: dict[str, float]
    now: dict[str, float]

    def differs(self, tolerance: float) -> list[str]:
        """The metrics that are further apart than that, relative to the larger one where it is above 1."""
        far = {name: abs(self.now[name] - old) / max(1.0, abs(old)) for name, old in self.before.items()}
        return [name for name, distance in far.items() if not distance <= tolerance]


def reproduce(name: str, number: int, stores: Stores, on_step: OnStep) -> Again:
    """Train a trial of a study again, stretch by stretch, to the step at which it was measured last.

    Raises:
        StorageError: MLflow holds no such trial, it was never measured, or the model or the data are others by now.
        StudyError, ModelError, DataError: the study cannot be run here any more.
        TrialFailed: the trial cannot be trained.
    """
    known = recorded(stores.tracking, name, number)
    study = load_study(known.study.file, known.study.text)
    shop = Workshop.open(study, stores.home)
    check_same(known.study, shop.base.fingerprint, shop.raw.fingerprint)
    config = restored(known.configuration, study)
    with tempfile.TemporaryDirectory() as folder, one_thread(shop.base.device):
        report = train(shop, config, known, Path(folder), on_step)
    return Again(config, known.step, known.metrics, report.metrics)


def check_same(known: RecordedStudy, model: str, data: str) -> None:
    """Refuse to compare what was trained on something else.

    Args:
        model, data: fingerprints of what is here; that of a model may be from before its weights were halved.

    Raises:
        StorageError: one is another than it was.
    """
    now = {"model": model, "data": data}
    for kind, before in known.fingerprints.items():
        if now[kind].removesuffix(HALVED) != before.removesuffix(HALVED):
            raise StorageError(f"The {kind} changed since the study ran ({before} then, {now[kind]} now).")


def train(shop: Workshop, config: TrialConfig, known: Recorded, folder: Path, on_step: OnStep) -> Report:
    """Train by the same stretches as a sweep does; the report of the last one."""
    begin = None
    for until in (step for step in shop.study.training.eval_steps if step <= known.step):
        job = Job(0, Seeds(*known.seeds), config, begin, folder / f"{until}.safetensors", until, None)
        (report,) = shop.train([job], on_step)
        if report.error:
            raise TrialFailed(f"Trained again, the trial ends at step {report.step}: {report.error}")
        begin = job.end
    return report
