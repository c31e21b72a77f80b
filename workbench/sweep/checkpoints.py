"""The files that trials go on from."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import optuna

FOLDER = "checkpoints"  # attribute of a study: the name of its folder


class Checkpoints:
    """A file for each live trial, and for each pruned one, named by number and step.

    The step that counts is the one that Optuna's trial holds, and its file stays until the next one is recorded:
    wherever a sweep is killed, there is a file for what was recorded. The folder's name is drawn when a study is begun,
    so that a study of the same name in another store does not take these files for its own.
    """

    def __init__(self, home: Path, study: optuna.Study):
        if FOLDER not in study.user_attrs:
            study.set_user_attr(FOLDER, f"{study.study_name}-{secrets.token_hex(4)}")
        self.folder = home / "checkpoints" / study.user_attrs[FOLDER]
        self.folder.mkdir(parents=True, exist_ok=True)

    def at(self, number: int, step: int) -> Path:
        """The file of a trial at a step."""
        return self.folder / f"{number}-{step}.safetensors"

    def results(self, number: int) -> Path:
        """A folder for what a trial comes to, until it is recorded."""
        return self.folder / f"{number}-results"

    def keep_only(self, number: int, step: int | None = None) -> None:
        """Delete what there is of a trial, but for its file at this step."""
        for path in self.folder.glob(f"{number}-*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif step is None or path != self.at(number, step):
                path.unlink()
