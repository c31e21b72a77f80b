"""What a study shows about its methods: a row a configuration, with intervals and ties, and notes for a sceptic.

Finalists, which were trained again on further seeds, are compared by their scores on the same examples. A method
without any appears by its best trial, as one run that was chosen by the very number that is shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from workbench.errors import DataError, StorageError

from . import stats
from .budgets import Spent, spent
from .frames import study_run, trials
from .leaderboard import MEMORY, there
from .notes import notes
from .runs import REFERENCE, open_client, storage_errors
from .stats import Goal, Scores

if TYPE_CHECKING:
    import pyarrow as pa
    from mlflow import MlflowClient

Split = Literal["test", "validation"]
Kind = Literal["finalist", "one run", "reference"]

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Behind:
    """How a finalist compares with the best one.

    Attributes:
        difference: its metric less that of the best, with the noise of examples and seeds.
        bootstrap: the paired bootstrap's interval of the same, for these very runs.
        p: of there being no difference, corrected for all pairs.
    """

    difference: stats.Difference
    bootstrap: stats.Interval
    p: float


@dataclass(frozen=True)
class Judged:
    """What only the scores of examples tell.

    Attributes:
        estimate: the metric with its interval and spread.
        best, tied: whether it has the best value of all, and whether it is not significantly worse.
        behind: how it compares with the best; None of the best itself.
        front: probability of lying on the Pareto front.
    """

    estimate: stats.Estimate
    best: bool
    tied: bool
    behind: Behind | None
    front: float


@dataclass(frozen=True)
class Row:
    """One configuration. Numbers that are not known are NaN.

    Attributes:
        label, method: of the study's `methods`.
        trial: number of the trial whose configuration it is.
        kind: finalist: trained again; one run: the best trial of a method that was not; reference: imported.
        runs, failed: how many runs were measured, and how many were not.
        value: the metric on the split that is compared.
        trainable_params, adapter_bytes, memory, seconds: costs, the mean of the runs (of memory the most).
        default: the metric on validation of the method's defaults, one run.
        gain: what the metric on validation is above that.
        hyperparameters: by field.
        searched: those fields that differ between trials.
        judged: of finalists, and of single runs on the test split, how sure that is.
    """

    label: str
    method: str
    trial: int
    kind: Kind
    runs: int
    failed: int
    value: float
    trainable_params: float
    adapter_bytes: float
    memory: float
    seconds: float
    default: float
    gain: float
    hyperparameters: Mapping[str, Any]
    searched: tuple[str, ...]
    judged: Judged | None = None

    @property
    def name(self) -> str:
        """The label, with the method where it says something else."""
        return self.label if self.method in ("", self.label) else f"{self.label} ({self.method})"


@dataclass(frozen=True)
class Comparison:
    """A study's configurations, best first: finalists before single runs.

    Attributes:
        split: that the values are of.
        reference: of imported results where they are from, else "".
        examples: how many the split of the finalists has; 0 without finalists.
        costs: what the Pareto front is of, beside the metric.
        memory: what kind of memory is shown, "" if none was measured.
        scores: of each finalist, by the number of its trial.
        used: in the search, by label; nothing of imported results.
        notes: a sentence each.
        trials: the table of `frames.trials`.
        tags: of the study's run.
    """

    study: str
    metric: str
    goal: Goal
    split: Split
    reference: str
    examples: int
    costs: tuple[str, ...]
    memory: str
    rows: list[Row]
    scores: Mapping[int, Scores]
    used: Mapping[str, Spent]
    notes: list[str]
    trials: pd.DataFrame
    tags: Mapping[str, str]


def compare(tracking_uri: str, study: str, split: Split | None = None, table: pd.DataFrame | None = None) -> Comparison:
    """Compare what a study found.

    Args:
        split: None takes the test split if it was read, else validation.
        table: of `frames.trials`, where that was read already.

    Raises:
        StorageError: the store cannot be read, holds no such study, or the test split is asked for and was not read.
        DataError: predictions of finalists are damaged, or not of the same examples.
    """
    client = open_client(tracking_uri)
    table = trials(tracking_uri, study) if table is None else table
    with storage_errors(tracking_uri):
        tags = study_run(client, tracking_uri, study).data.tags
    goal: Goal = "minimize" if tags["workbench.goal"] == "minimize" else "maximize"
    memory = next((key for key in MEMORY if key in table), "")
    found = Comparison(
        study=study,
        metric=tags["workbench.metric"],
        goal=goal,
        split="test",
        reference=tags.get(REFERENCE, ""),
        examples=0,
        costs=tuple(tags.get("workbench.also", "").split()) or ("trainable_params",),
        memory=MEMORY.get(memory, ""),
        rows=[],
        scores={},
        used={},
        notes=[],
        trials=table,
        tags=tags,
    )
    describe = _Describer(table, goal, memory)
    if found.reference:
        rows = [describe.one(trial, "reference") for trial in describe.complete.to_dict("records")]
        found = replace(found, rows=_sorted(rows, goal))
        return replace(found, notes=notes(found))
    groups = _finalists(table)
    kind: Kind = "finalist" if groups else "one run"
    promoted = groups or describe.promoted(f"test.{found.metric}")
    split = _split(study, found.metric, promoted, split)
    groups = promoted if split == "test" else groups
    with tempfile.TemporaryDirectory() as folder, storage_errors(tracking_uri):
        scores = dict(_scores(client, Path(folder), groups, split, found.metric))
        used = spent(table)
    sure = [describe.several(trial, groups[trial], kind) for trial in scores]
    sure = _sorted(_judged(sure, list(scores.values()), found.costs, goal), goal)
    others = describe.best_of_others({row.label for row in sure})
    alone = [describe.one(trial, "one run") for trial in others]
    if split == "test":
        alone = [replace(row, value=UNKNOWN) for row in alone]
    examples = next((score.values.shape[1] for score in scores.values()), 0)
    rows = sure + _sorted(alone, goal)
    found = replace(found, split=split, examples=examples, rows=rows, scores=scores, used=used)
    return replace(found, notes=notes(found))


# -------------------------------------------------------------------- what was measured


def _finalists(table: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The complete runs of each configuration that was trained again, by the number of the trial that they repeat."""
    again = table[(table["role"] == "finalist") & (table["outcome"] == "complete") & table["finalist_of"].notna()]
    return {int(trial): runs for trial, runs in again.groupby("finalist_of")}


def _split(study: str, metric: str, groups: Mapping[int, pd.DataFrame], asked: Split | None) -> Split:
    column = f"test.{metric}"
    read = bool(groups) and all(column in runs and runs[column].notna().all() for runs in groups.values())
    if asked == "test" and not read:
        raise StorageError(
            f"The study {study!r} has no test values; `workbench promote {study}` reads the test split, once."
        )
    return asked or ("test" if read else "validation")


def _scores(
    client: MlflowClient, folder: Path, groups: Mapping[int, pd.DataFrame], split: Split, metric: str
) -> Iterator[tuple[int, Scores]]:
    """The scores of each configuration on the same examples."""
    first: pa.Table | None = None
    for trial, runs in groups.items():
        values = []
        for number, run_id in zip(runs["number"], runs["run_id"], strict=True):
            table = _predictions(client, folder, run_id, split, f"score.{metric}", f"trial {number}")
            examples = table.select(["row", "actual"])
            first = examples if first is None else first
            if not examples.equals(first):
                raise DataError(f"Trial {number} was measured on other examples than the others.")
            values.append(table[f"score.{metric}"].to_numpy())
        seeds = runs[["init_seed", "order_seed"]].itertuples(index=False, name=None)
        try:
            yield trial, Scores(np.array(values, dtype=np.float64), list(seeds))
        except DataError as error:
            raise DataError(f"Trial {trial}, {split} split: {error}") from error


def _predictions(client: MlflowClient, folder: Path, run_id: str, split: Split, column: str, who: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / run_id).mkdir()
    file = client.download_artifacts(run_id, f"predictions/{split}.parquet", str(folder / run_id))
    try:
        return pq.read_table(file, columns=["row", "actual", column])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"The {split} predictions of {who} cannot be read: {error}") from error


class _Describer:
    """Rows from the table of trials, without what only scores can tell."""

    def __init__(self, table: pd.DataFrame, goal: Goal, memory: str):
        self.goal, self.memory = goal, memory
        searched = table[table["role"] != "finalist"]
        self.numbered = table.set_index("number", drop=False)
        self.complete = searched[(searched["outcome"] == "complete") & searched["objective"].notna()]
        defaults = self.complete[self.complete["role"] == "default"].drop_duplicates("label")
        self.defaults: dict[str, float] = dict(zip(defaults["label"], defaults["objective"], strict=True))

    def best_of_others(self, labels: set[str]) -> list[dict[str, Any]]:
        """The best complete trial of each method whose label is not among these."""
        others = self.complete[~self.complete["label"].isin(labels)]
        best = others.sort_values("objective", ascending=self.goal == "minimize").drop_duplicates("label")
        return best.to_dict("records")

    def promoted(self, column: str) -> dict[int, pd.DataFrame]:
        """Trials of the search that were measured on the test split, since nothing was trained again."""
        known = self.complete[self.complete[column].notna()] if column in self.complete else self.complete[:0]
        return {int(trial): run for trial, run in known.groupby("number")}

    def several(self, trial: int, runs: pd.DataFrame, kind: Kind) -> Row:
        """A configuration with these runs that were measured."""
        tried = ((self.numbered["role"] == "finalist") & (self.numbered["finalist_of"] == trial)).sum()
        failed = int(tried) - len(runs) if kind == "finalist" else 0
        return self._row(runs.iloc[0].to_dict(), trial, runs, kind, failed)

    def one(self, trial: dict[str, Any], kind: Kind) -> Row:
        """One trial as it is."""
        return self._row(trial, trial["number"], self.numbered.loc[[trial["number"]]], kind, 0)

    def _row(self, example: dict[str, Any], trial: int, runs: pd.DataFrame, kind: Kind, failed: int) -> Row:
        value, default = float(runs["objective"].mean()), self.defaults.get(example["label"], UNKNOWN)
        is_default = trial in self.numbered.index and self.numbered.loc[trial, "role"] == "default"
        fields = {key[3:]: cell for key, cell in example.items() if key.startswith("hp.") and there(cell)}
        return Row(
            label=example["label"],
            method=example["method"],
            trial=trial,
            kind=kind,
            runs=len(runs),
            failed=failed,
            value=value,
            trainable_params=_mean(runs, "trainable_params"),
            adapter_bytes=_mean(runs, "adapter_bytes"),
            memory=float(runs[self.memory].max()) if self.memory else UNKNOWN,
            seconds=_mean(runs, "seconds/total"),
            default=default,
            gain=0.0 if is_default else value - default,
            hyperparameters=fields,
            searched=tuple(name for name in example["searched"].split() if name in fields),
        )


def _mean(runs: pd.DataFrame, column: str) -> float:
    return float(runs[column].astype("float64").mean()) if column in runs else UNKNOWN


def _judged(rows: list[Row], scores: list[Scores], costs: tuple[str, ...], goal: Goal) -> list[Row]:
    """The rows of finalists with all that their scores tell."""
    if not rows:
        return []
    ties = stats.tied_with_best(scores, goal)
    front = stats.front_probability(scores, np.array([[getattr(row, cost) for cost in costs] for row in rows]), goal)
    judged = []
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        best, estimate = i == ties.best, stats.estimate(score)
        behind = None if best else _behind(score, scores[ties.best], float(ties.p[ties.best, i]))
        sure = Judged(estimate, best, ties.tied[i], behind, float(front[i]))
        judged.append(replace(row, value=estimate.value, judged=sure))
    return judged


def _behind(score: Scores, best: Scores, p: float) -> Behind:
    return Behind(stats.difference(score, best), stats.paired_bootstrap(score, best), p)


def _sorted(rows: list[Row], goal: Goal) -> list[Row]:
    sign = -1 if goal == "maximize" else 1
    return sorted(rows, key=lambda row: (bool(np.isnan(row.value)), sign * row.value, row.trial))
