"""`workbench promote`: the one reading of a study's test split, when its search is over."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyarrow.parquet import write_table

from workbench.adapters import PeftModel
from workbench.errors import StorageError
from workbench.tracking import frames
from workbench.tracking.recorded import RecordedStudy, configuration, recorded_study
from workbench.tracking.runs import Run, Tracking, open_tracking
from workbench.training.adapted import ADAPTER, PREDICTIONS
from workbench.training.base import Base
from workbench.training.data import Split, open_vault
from workbench.training.examples import table
from workbench.training.loop import Measured, evaluate

from .match import restored
from .reproduce import check_same
from .run import only_one
from .spec import NAME, load_study
from .stores import Stores
from .workshop import Workshop

if TYPE_CHECKING:
    import pandas as pd

READINGS = "workbench.test_readings"  # tag of a study: every reading of its test split, JSON
Say = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """A reading of the test split.

    Attributes:
        time: when it began.
        trials: numbers of those that were measured.
        reason: why it was read again; "" of the first reading.
        ended: whether all of them were measured.
    """

    time: str
    trials: list[int]
    reason: str = ""
    ended: bool = False


def promote(name: str, stores: Stores, say: Say, again: str = "") -> Reading:
    """Measure the finalists on the test split; without finalists, the best trial of each method.

    The reading is recorded before the first row is looked at. One that was cut off is finished by the next call.

    Args:
        say: hears what is being done.
        again: why the split is read although it was read before.

    Raises:
        StorageError: the study is not there or not over, it has no test split, or the split was read before.
        ModelError, DataError: the model or the data cannot be loaded any more.
    """
    if not re.fullmatch(NAME, name):  # a file of this name is made
        raise StorageError(f"There is no study {name!r}: names have letters, digits and . _ - only.")
    with only_one(stores.home, name):
        about = recorded_study(stores.tracking, name)
        trials = frames.trials(stores.tracking, name)
        chosen = candidates(trials, about)
        known = readings(about)
        reading = next_reading(name, known, chosen["number"].tolist(), again)
        study = load_study(about.file, about.text)
        say("reading the data and loading the base model ...")
        shop = Workshop.open(study, stores.home)
        check_same(about, shop.base.fingerprint, shop.raw.fingerprint)
        tracking = open_tracking(stores.tracking, stores.artifacts)
        parent = Run(tracking.client, about.run_id)
        earlier = [one for one in known if one.time != reading.time]
        note(parent, [*earlier, reading])
        tracking.log_dataset(parent, name, study.data.path or study.data.test or "", shop.raw.fingerprint, "test")
        for done, (number, run_id) in enumerate(zip(chosen["number"], chosen["run_id"], strict=True), 1):
            say(f"trial {number} on the test split, {done} of {len(chosen)} ...")
            measure(tracking, shop, run_id)
        reading = Reading(reading.time, reading.trials, reading.reason, ended=True)
        note(parent, [*earlier, reading])
        return reading


def candidates(trials: pd.DataFrame, about: RecordedStudy) -> pd.DataFrame:
    """The trials to measure.

    Raises:
        StorageError: there are none, or not yet all, or there is nothing to measure them on.
    """
    name = about.tags["workbench.study"]
    if about.tags.get("workbench.test_rows", "0") == "0":
        raise StorageError(f"The study {name!r} has no test split; name one in data.test and run it under a new name.")
    if (trials["outcome"] == "running").any() or (trials["outcome"] == "interrupted").any():
        raise StorageError(f"The study {name!r} is not over; finish it first: workbench sweep {about.file}")
    complete = trials[trials["outcome"] == "complete"]
    if complete.empty:
        raise StorageError(f"No trial of the study {name!r} is complete, so there is nothing to promote.")
    finalists = complete[complete["role"] == "finalist"]
    if len(finalists):
        return finalists
    best = complete.groupby("label")["objective"]
    return complete.loc[best.idxmax() if about.tags["workbench.goal"] == "maximize" else best.idxmin()]


def next_reading(name: str, known: Sequence[Reading], trials: list[int], again: str) -> Reading:
    """The reading that is to come, or the last one if it was cut off.

    Raises:
        StorageError: the split was read.
    """
    if known and not known[-1].ended and set(known[-1].trials) == set(trials):
        return known[-1]
    if known and not again:
        raise StorageError(
            f"The test split of {name!r} was read on {known[-1].time}. What is chosen after a look at it is no "
            'longer tested by it; if it must be, `--again "why"` reads it once more and is recorded.'
        )
    return Reading(datetime.now(UTC).isoformat(timespec="seconds"), trials, again)


def readings(about: RecordedStudy) -> list[Reading]:
    """The readings of a study's test split so far."""
    return [Reading(**known) for known in json.loads(about.tags.get(READINGS, "[]"))]


def note(parent: Run, all_of_them: Sequence[Reading]) -> None:
    """Write the readings down."""
    parent.tag(READINGS, json.dumps([vars(reading) for reading in all_of_them]))


def measure(tracking: Tracking, shop: Workshop, run_id: str) -> None:
    """Put a trial's adapter on the base as anybody would and record what it does on the test split."""
    config = restored(configuration(tracking.client, run_id), shop.study)
    run = Run(tracking.client, run_id)
    with tempfile.TemporaryDirectory() as place, shop.lend(config.new_tokens) as (base, _):
        folder = Path(place)
        run.download(ADAPTER, folder)
        test = open_vault(shop.raw, base.tokenizer, shop.cache)
        measured = predicted(base, test, folder / ADAPTER, shop.settings(config))
        (folder / PREDICTIONS).mkdir()
        write_table(table(base, test, measured), folder / PREDICTIONS / "test.parquet")
        run.artifacts(folder / PREDICTIONS, PREDICTIONS)
        run.summary({f"test.{metric}": value for metric, value in measured.metrics.items()})


def predicted(base: Base, test: Split, adapter: Path, settings: Any) -> Measured:
    """What an adapter does on a split."""
    with torch.random.fork_rng(devices=[]):
        model = PeftModel.from_pretrained(base.model, adapter)
    try:
        return evaluate(model, base, test, settings)
    finally:
        model.delete_adapter(list(model.peft_config))
        base.model.requires_grad_(False)
