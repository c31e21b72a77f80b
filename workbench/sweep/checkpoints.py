"""The files that trials go on from."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from workbench.errors import CheckpointError, StorageError
from workbench.tracking.runs import Run, Tracking
from workbench.training.trainee import read_checkpoint

from .budget import PROGRESS
from .roles import OUTCOME
from .spec import NAME

FOLDER = "checkpoints"  # attribute of a study, the name of its folder; and a folder of a run's artifacts
LARGEST = 2**29  # bytes of a checkpoint that goes through the server


class Checkpoints:
    """A file for each live trial, and for each pruned one, named by number and step.

    The step that counts is the one that Optuna's trial holds, and its file stays until the next one is recorded:
    wherever a sweep is killed, there is a file for what was recorded. The folder's name is drawn when a study is begun,
    so that a study of the same name in another store does not take these files for its own.

    Args:
        server: where the runs are kept, if workers with other homes may go on with a trial: its file then is among its
            run's artifacts too, until it ends. Beyond `LARGEST` it is not, and they begin the trial anew.
    """

    def __init__(self, home: Path, study: optuna.Study, server: Tracking | None = None):
        self._server = server
        if FOLDER not in study.user_attrs:
            study.set_user_attr(FOLDER, f"{study.study_name}-{secrets.token_hex(4)}")
        if not re.fullmatch(NAME, name := study.user_attrs[FOLDER]):
            raise StorageError(f"The study's checkpoints are in {name!r}, which is no folder's name.")
        self.folder = home / "checkpoints" / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def at(self, number: int, step: int) -> Path:
        """The file of a trial at a step."""
        return self.folder / f"{number:d}-{step:d}.safetensors"

    def copy(self, number: int, other: int, step: int) -> None:
        """Let another trial begin where this one is."""
        self.at(other, step).unlink(missing_ok=True)
        shutil.copyfile(self.at(number, step), self.at(other, step))

    def results(self, number: int) -> Path:
        """A folder for what a trial comes to, until it is recorded."""
        return self.folder / f"{number}-results"

    def keep_only(self, number: int, step: int | None = None) -> None:
        """Delete what there is of a trial, but for its file at this step."""
        for path in self.folder.glob(f"{number}-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif step is None or path != self.at(number, step):
                path.unlink()

    def share(self, number: int, step: int, run: Run) -> None:
        """Let workers elsewhere have a trial's file. To be called before the step is recorded."""
        file = self.at(number, step)
        if self._server and file.stat().st_size <= LARGEST:
            run.artifact(file, FOLDER)

    def discard(self, number: int, run: Run, step: int | None = None) -> None:
        """Delete the files that workers elsewhere might have had, but for the one at this step. To be called when that
        is recorded."""
        if self._server:
            run.discard(FOLDER, keep=None if step is None else self.at(number, step).name)

    def fetch(self, number: int, step: int, run_id: str) -> bool:
        """Have a trial's file here, if it is anywhere and can be read."""
        file = self.at(number, step)
        if not file.exists() and self._server:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                try:
                    self._server.run(run_id).download(f"{FOLDER}/{file.name}", Path(folder))
                except StorageError:
                    return False
                os.replace(next(Path(folder).rglob(file.name)), file)
        try:
            read_checkpoint(file)
        except CheckpointError:
            return False
        return True

    def tidy(self, trials: Sequence[FrozenTrial]) -> None:
        """Delete what is left of trials that ended, perhaps elsewhere; but for the files of pruned ones."""
        for trial in trials:
            if trial.state.is_finished():
                pruned = trial.user_attrs.get(OUTCOME) == "pruned"
                self.keep_only(trial.number, trial.user_attrs.get(PROGRESS, {}).get("step") if pruned else None)
