"""`workbench register`: a trial's adapter as a version in MLflow's model registry, once it is shown to predict the same
when it is loaded again."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.pyfunc import load_model

from workbench.errors import ParityError, StorageError
from workbench.serving.predictor import Predictor
from workbench.serving.recipe import BaseRecipe, Recipe
from workbench.tracking import frames, registry, stats
from workbench.tracking.card import card
from workbench.tracking.comparison import compare
from workbench.tracking.recorded import RecordedStudy, configuration, recorded_study
from workbench.tracking.registry import Version
from workbench.tracking.runs import Run, open_client, public_url, storage_errors
from workbench.training.adapted import ADAPTER, PREDICTIONS
from workbench.training.config import DataSection
from workbench.training.data import RawData, read_data
from workbench.training.metrics import METRICS

from . import version as versions
from .match import restored
from .reproduce import check_same
from .spec import Study, load_study
from .stores import Stores

PARITY_ROWS = 1000  # of validation that are predicted again
# How far a probability, or a text's loss, may be off and count as the same: rows that are computed beside others differ
# in their last digits, of which half precision has few.
CLOSE = {"fp32": 1e-3, "bf16": 5e-2}
EXAMPLES = 2  # rows of input that a version shows
SPLITS = ("test", "validation")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A trial that may become a version.

    Attributes:
        row: of the table of trials.
        measured: its scores of each example by split and metric, `(examples,)`.
    """

    about: RecordedStudy
    study: Study
    row: pd.Series
    measured: dict[str, dict[str, np.ndarray]]

    @property
    def metric(self) -> str:
        """The study's metric."""
        return self.study.objective.metric

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the initialisation and of the order of the data."""
        return int(self.row["init_seed"]), int(self.row["order_seed"])


def register(
    name: str, stores: Stores, model: str, alias: str, say: Say, trial: int | None = None, best: str | None = None
) -> Version:
    """Make a trial a version of a registered model, and let the alias point at it.

    Args:
        model: name of the registered model.
        alias: "" for none.
        say: hears what is being done.
        trial: its number; None takes the best one.
        best: the validation metric by which it is the best; None takes the configuration that `compare` has first.

    Raises:
        StorageError: the study or the trial is not there, or not complete, or the registry refuses.
        ParityError: what was saved does not predict what the trial predicted; nothing is registered.
        ModelError, DataError: the base model or the data cannot be loaded any more.
    """
    registry.check_name(model)
    about = recorded_study(stores.tracking, name)
    table = frames.trials(stores.tracking, name)
    study = load_study(about.file, about.text)
    row = chosen(table, study, stores.tracking, trial, best)
    made = publish(candidate(about, study, row, stores.tracking), stores, model, alias, say)
    if alias:
        registry.set_alias(stores.tracking, model, alias, made.number)
    return made


def chosen(table: pd.DataFrame, study: Study, tracking_uri: str, trial: int | None, best: str | None) -> pd.Series:
    """The trial to register.

    Raises:
        StorageError: there is no such trial, it is not complete, or the metric is none.
    """
    if trial is not None:
        found = table[table["number"] == trial]
        if found.empty:
            raise StorageError(f"The study {study.name!r} has no trial {trial}; it has {len(table)}.")
        if found.iloc[0]["outcome"] != "complete":
            raise StorageError(
                f"Trial {trial} of {study.name!r} is {found.iloc[0]['outcome']}, so it has no adapter to register."
            )
        return found.iloc[0]
    goals = METRICS[study.model.task]
    if best is not None and best not in goals:
        raise StorageError(f"--best {best}: the metrics of {study.model.task} are {', '.join(goals)}.")
    complete = table[table["outcome"] == "complete"]
    if best is None and len(complete):
        rows = compare(tracking_uri, study.name, "validation").rows
        runs = complete[(complete["finalist_of"] == rows[0].trial).fillna(False)] if rows else complete[:0]
        complete = runs if len(runs) else complete[complete["number"].isin([row.trial for row in rows[:1]])]
    metric = best or study.objective.metric
    column = f"validation.{metric}"
    known = complete[complete[column].notna()] if column in complete else complete[:0]
    if known.empty:
        raise StorageError(f"No trial of the study {study.name!r} is complete and has {metric}, so there is no best.")
    goal = study.objective.goal if metric == study.objective.metric else goals[metric]
    return known.loc[known[column].idxmax() if goal == "maximize" else known[column].idxmin()]


def candidate(about: RecordedStudy, study: Study, row: pd.Series, tracking_uri: str) -> Candidate:
    """A trial with what it scored."""
    client = open_client(tracking_uri)
    measured = {split: scores(client, row["run_id"], split) for split in SPLITS}
    return Candidate(about, study, row, {split: found for split, found in measured.items() if found})


def scores(client: MlflowClient, run_id: str, split: str) -> dict[str, np.ndarray]:
    """What a run scored on each example of a split, by metric; nothing if it was not measured there."""
    table = predictions(client, run_id, split)
    if table is None:
        return {}
    return {name[6:]: table[name].to_numpy() for name in table if name.startswith("score.")}


def predictions(client: MlflowClient, run_id: str, split: str) -> pd.DataFrame | None:
    """The predictions of a run, None if it has none of this split."""
    file = f"{PREDICTIONS}/{split}.parquet"
    with storage_errors(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
        if file not in [found.path for found in client.list_artifacts(run_id, PREDICTIONS)]:
            return None
        return pq.read_table(client.download_artifacts(run_id, file, folder)).to_pandas()


# -------------------------------------------------------------------- making a version


def publish(found: Candidate, stores: Stores, model: str, alias: str, say: Say, contest: str = "") -> Version:
    """Write a version, load it again, compare, and register it. Arguments and errors as `register`.

    Args:
        contest: how it compares with the version before, in words.
    """
    study, client = found.study, open_client(stores.tracking)
    say("reading the data ...")
    raw = read_data(study.data, study.model.task)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Run(client, found.row["run_id"]).download(ADAPTER, folder)
        say("loading the base model ...")
        recipe, predictor = opened(found, raw, client, folder)
        rows = inputs(recipe, raw)
        facts = describe(found, recipe) | ({"contest": contest} if contest else {})
        made = versions.write(
            folder,
            recipe,
            folder / ADAPTER,
            predictor.base.tokenizer,
            card(model, alias, facts, list(recipe.columns.values())),
            rows.head(EXAMPLES),
        )
        say("loading it again, to compare what it predicts with what the trial predicted ...")
        recorded = predictions(client, found.row["run_id"], "validation")
        facts["parity"] = parity(load_model(str(made)), rows, recorded, CLOSE[recipe.base.precision])
        say(f"{facts['parity']}; registering it ...")
        return registry.publish(
            client, found.row["run_id"], model, made, facts, (made / versions.README).read_text(encoding="utf-8")
        )


def opened(found: Candidate, raw: RawData, client: MlflowClient, folder: Path) -> tuple[Recipe, Predictor]:
    """The recipe of a trial, and its adapter at work by it."""
    study, config = found.study, restored(configuration(client, found.row["run_id"]), found.study)
    names = {"text", "text_pair", "label", "tokens", "tags", "target", "max_length", "max_target_length"}
    base = BaseRecipe(
        model=study.model,
        labels=tuple(raw.labels),
        seed=study.training.seed,
        precision=study.training.precision,
        new_tokens=config.new_tokens,
        whole=found.about.fingerprints["model"],
    )
    data = DataSection(**study.data.model_dump(include=names))
    recipe = Recipe(base=base, data=data, batch_size=study.training.eval_batch_size)
    predictor = Predictor(recipe, folder / ADAPTER)
    check_same(found.about, predictor.base.fingerprint, raw.fingerprint)
    commit = getattr(predictor.base.model.config, "_commit_hash", None)
    pinned = study.model.model_copy(update={"revision": commit or study.model.revision})
    base = base.model_copy(update={"model": pinned, "fingerprint": predictor.fingerprint})
    return recipe.model_copy(update={"base": base}), predictor


def inputs(recipe: Recipe, raw: RawData) -> pd.DataFrame:
    """Rows of validation as one would ask for their prediction."""
    columns = raw.splits["validation"]
    return pd.DataFrame({name: columns[field][:PARITY_ROWS] for field, name in recipe.columns.items()})


def describe(found: Candidate, recipe: Recipe) -> dict[str, str]:
    """What is noted of a version."""
    row, study = found.row, found.study
    fields = {key[3:]: plain(value) for key, value in row.items() if key.startswith("hp.") and not pd.isna(value)}
    hidden = public_url(study.data.path or study.data.train or "")
    return {
        "study": study.name,
        "study_run_id": found.about.run_id,
        "trial": str(row["number"]),
        "run_id": row["run_id"],
        "label": row["label"],
        "method": row["method"],
        "task": study.model.task,
        "base": study.model.path,
        "base_revision": recipe.base.model.revision or "",
        "base_fingerprint": recipe.base.fingerprint,
        "data": hidden,
        "data_fingerprint": found.about.fingerprints["data"],
        "labels": json.dumps(recipe.base.labels),
        "hyperparameters": json.dumps(fields),
        "seeds": json.dumps(found.seeds),
        "metric": found.metric,
        "goal": study.objective.goal,
        "metrics": json.dumps(intervals(found)),
        "examples": json.dumps({split: len(next(iter(known.values()))) for split, known in found.measured.items()}),
        "trainable_params": str(int(row["trainable_params"])),
        "adapter_bytes": str(int(row["adapter_bytes"])),
    }


def plain(value: Any) -> Any:
    """A cell of a table as JSON has it."""
    return value.item() if isinstance(value, np.generic) else value


def intervals(found: Candidate) -> dict[str, dict[str, list[float]]]:
    """Each metric by split: value, and the ends of its interval over examples."""
    made: dict[str, dict[str, list[float]]] = {}
    for split, known in found.measured.items():
        for metric, values in known.items():
            if len(values) > 1 and np.isfinite(values).all():
                estimate = stats.estimate(stats.Scores(values[None].astype(np.float64), [found.seeds]))
                made.setdefault(split, {})[metric] = [estimate.value, estimate.low, estimate.high]
    return made


# -------------------------------------------------------------------- parity


def parity(loaded: Any, rows: pd.DataFrame, recorded: pd.DataFrame | None, close: float) -> str:
    """Compare what a loaded version predicts with what its trial predicted.

    Args:
        loaded: MLflow's model.
        rows: of input, the first of validation.
        recorded: what the trial predicted.
        close: see `CLOSE`.

    Returns:
        how many are the same, in words.

    Raises:
        ParityError: they differ.
    """
    if recorded is None:
        raise ParityError("The trial's predictions were not kept, so a version cannot be compared with it.")
    now = loaded.predict(rows, params={"probabilities": True} if "score" in outputs(loaded) else None)
    now = now[now["prediction"].notna()].reset_index(drop=True)  # rows that hold nothing were left out in training
    count = min(len(now), len(recorded))
    off = [i for i in range(count) if not same(now.iloc[i], recorded.iloc[i], close)]
    if off or not count:
        before, after = (recorded.iloc[off[0]]["predicted"], now.iloc[off[0]]["prediction"]) if off else ("", "")
        raise ParityError(
            f"Loaded again, the version predicts {len(off)} of {count} rows otherwise than the trial did (row "
            f"{off[0] if off else 0}: {after!r}, not {before!r}). Nothing was registered."
        )
    return f"{count} of {count} rows of validation are predicted as the trial did"


def outputs(loaded: Any) -> Sequence[str]:
    """Names of the columns that come out."""
    return loaded.metadata.get_output_schema().input_names()


def same(now: pd.Series, before: pd.Series, close: float) -> bool:
    """Whether a row's prediction is what it was; two classes of all but the same probability are a tie."""
    if "loss" in now:
        return bool(abs(now["loss"] - before["loss"]) <= close * max(1.0, abs(before["loss"])))
    if "probabilities" not in now:
        answer = now["prediction"]
        if not isinstance(answer, str):  # tags, of words that were cut off None
            answer = json.dumps([tag for tag in answer if tag is not None], ensure_ascii=False)
        return bool(answer == before["predicted"])
    shares = json.loads(now["probabilities"])
    tied = abs(shares[before["predicted"]] - now["score"]) <= close
    return bool(tied and math.isclose(math.exp(-before["loss"]), shares[before["actual"]], abs_tol=close))
