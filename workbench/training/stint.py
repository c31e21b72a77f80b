"""What a bench is asked for and what it answers: a trial's next stretch of training, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from workbench.adapters import PeftConfig

from .config import TrainingSection

OnStep = Callable[[int, int, float], None]  # trial, step, loss


@dataclass(frozen=True)
class Stint:
    """A trial's next stretch of training.

    Attributes:
        trial: its number.
        config: of its adapter.
        settings: how it trains.
        seed: of its adapter's first values and of dropout.
        order_seed: of the order of the data.
        checkpoint: the file that holds the trial between stints. If there is none the trial begins.
        until: the last step of this stint; validation is measured after it.
        results: a folder for the adapter's files and the predictions after the stint (`save_results`); None while more
            stints are to come.
        seconds: how long its steps may take; it ends as `TimedOut` at the first one beyond. None: as long as they do.
    """

    trial: int
    config: PeftConfig
    settings: TrainingSection
    seed: int
    order_seed: int
    checkpoint: Path
    until: int
    results: Path | None = None
    seconds: float | None = None


@dataclass
class Report:
    """What came of a stint.

    Attributes:
        step: how far the trial came.
        made: steps of this stint.
        metrics: of the validation split after the last step; {} if there was an error.
        error: why the trial cannot go on: `Diverged`, `OutOfMemory`, `TimedOut`, an `AdapterError`, or a fault of the
            program.
        trace: the traceback of a fault of the program.
        costs: of this stint alone: `seconds/train`, `seconds/eval` and peaks as in `Meter`. What a bank shares is
            divided among its trials.
        shared: how many trials shared the pass, 1 for a trial alone.
        tokens: real tokens of the batches of this stint.
        trainable, total: parameters that train, and all of the model's with the adapter.
        adapter_bytes: size of the adapter's files, where they were written.
    """

    trial: int
    step: int = 0
    made: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    trace: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    shared: int = 1
    tokens: int = 0
    trainable: int = 0
    total: int = 0
    adapter_bytes: int = 0
