"""Where a sweep keeps what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stores:
    """The places that the commands share.

    Attributes:
        home: folder of the embedded stores, of tokenised data and of locks.
        optuna: URL of Optuna's storage.
        tracking: MLflow's tracking URI.
        artifacts: root of new experiments' artifacts; None leaves it to the tracking server.
        heartbeat: seconds between two signs of life of a trial. All workers of a study should have the same.
    """

    home: Path
    optuna: str
    tracking: str
    artifacts: str | None
    heartbeat: int
