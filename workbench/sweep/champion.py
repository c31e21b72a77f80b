"""`register:` of a study file: the best trial becomes the champion, if the test split says that it is better."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from workbench.errors import StorageError
from workbench.serving.predictor import Predictor
from workbench.tracking import frames, registry, stats
from workbench.tracking.recorded import RecordedStudy, recorded_study
from workbench.tracking.registry import Version
from workbench.tracking.runs import Run, open_client
from workbench.training.data import open_vault, read_data
from workbench.training.examples import table

from .promote import Reading, note, promote, readings
from .register import Candidate, candidate, chosen, publish, scores
from .spec import Study
from .stores import Stores

Say = Callable[[str], None]


def compete(study: Study, stores: Stores, say: Say) -> str:
    """Register a study's best trial if it beats the version that the alias points at.

    It does if its metric on the test split is better and a paired test on the examples, two-sided at 5 %, tells the two
    apart. Both are taken as they are: what other seeds would have given does not matter here. Where there is no such
    version yet, nothing has to be beaten.

    Args:
        study: one that has ended and has a section `register`.

    Returns:
        what came of it, in words.

    Raises:
        StorageError, DataError, ModelError, ParityError: as `register`.
    """
    assert study.registration
    model, alias = study.registration.name or study.name, study.registration.alias
    about = recorded_study(stores.tracking, study.name)
    row = chosen(frames.trials(stores.tracking, study.name), study, stores.tracking, None, None)
    known = registry.versions_of(stores.tracking, model)
    if own := next((found for found in known if found.facts.get("run_id") == row["run_id"]), None):
        return f"trial {row['number']} is version {own.number} of {model} already"
    vault = about.tags.get("workbench.test_rows", "0") != "0"
    if vault and not readings(about):
        promote(study.name, stores, say)
    found = candidate(recorded_study(stores.tracking, study.name), study, row, stores.tracking)
    champion = next((version for version in known if alias in version.aliases), None)
    if champion is None:
        words = f"there was no {model}@{alias} yet"
    elif "test" not in found.measured:
        why = "has no test values" if vault else "names no test split"
        return f"trial {row['number']} was not registered: the study {why}, by which it could beat {champion.uri}"
    else:
        better, words = contest(found, champion, stores, say)
        if not better:
            return f"trial {row['number']} was not registered, it does not beat {champion.uri}: {words}"
    made = publish(found, stores, model, alias, say, contest=words)
    registry.set_alias(stores.tracking, model, alias, made.number)
    return f"trial {row['number']} is models:/{model}@{alias} now, version {made.number}: {words}"


def contest(found: Candidate, champion: Version, stores: Stores, say: Say) -> tuple[bool, str]:
    """Whether a trial is better on the test split than a version, and that in words."""
    metric, goal = found.metric, found.study.objective.goal
    theirs = test_scores(found, champion, stores, say)
    mine = found.measured["test"][metric]
    own, its = (stats.Scores(values[None].astype(np.float64), [found.seeds]) for values in (mine, theirs))
    difference = stats.difference(own, its)
    better = (difference.value > 0) == (goal == "maximize") and difference.p < stats.ALPHA
    return better, (
        f"test {metric} {difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] against version "
        f"{champion.number}, p = {difference.p:.2g}"
    )


def test_scores(found: Candidate, champion: Version, stores: Stores, say: Say) -> np.ndarray:
    """What a version scored on each example of the study's test split; it is measured now if it never was.

    Raises:
        StorageError: the version has other labels, or nothing is known of it.
    """
    facts, count = champion.facts, len(found.measured["test"][found.metric])
    if facts.get("data_fingerprint") == found.about.fingerprints["data"]:
        known = scores(open_client(stores.tracking), facts["run_id"], "test").get(found.metric)
        if known is not None and len(known) == count:
            return known
    say(f"measuring {champion.uri} on the test split ...")
    raw = read_data(found.study.data, found.study.model.task)
    with tempfile.TemporaryDirectory() as folder:
        predictor = Predictor.open(registry.fetch(stores.tracking, champion, Path(folder)))
        if predictor.base.task != raw.task or predictor.labels != raw.labels:
            raise StorageError(
                f"{champion.uri} has another task or other labels than the study {found.study.name!r}; give its winner "
                "another name in `register`."
            )
        note_reading(found.about, stores, f"{champion.uri} was measured, to be compared with")
        test = open_vault(raw, predictor.base.tokenizer, stores.home / "cache")
        measured = table(predictor.base, test, predictor.measure(test))
    return measured[f"score.{found.metric}"].to_numpy()


def note_reading(about: RecordedStudy, stores: Stores, reason: str) -> None:
    """Write down that the test split was read once more."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    parent = Run(open_client(stores.tracking), about.run_id)
    note(parent, [*readings(about), Reading(now, [], reason, ended=True)])
