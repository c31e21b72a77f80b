"""A base model of 0.1 million parameters, a few film reviews, and sweeps over them that take a second or two."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
import torch
from command import Done, workbench
from mlflow.entities import Run
from mlflow.store.entities import PagedList
from sqlalchemy import Engine, event
from transformers import BertConfig, BertModel

from workbench.tracking.runs import default_store, open_tracking

ASSETS = Path(__file__).parents[2] / "studies" / "assets"

METHODS = """
lora:
  r: {values: [2, 4]}
  target_modules: [query, value]
  learning_rate: {min: 1e-3, max: 1e-1, distribution: log_uniform_values}
"""


@pytest.fixture(scope="session", autouse=True)
def small_and_quick() -> Iterator[None]:
    """One thread: more get into each other's way, and sums come out alike in every process. And the clean-up after each
    trial need not look through all the libraries."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def stores_do_not_wait_for_the_disk() -> Iterator[None]:
    """At each of the hundreds of commits of a sweep, which takes as long again as all else. Only a machine that loses
    its power could tell; a process that is killed cannot."""

    def connected(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a pooler or head, so that both are drawn from the study's seed; the tokenizer is real."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "minilm-l3-8k" / name, folder)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,  # wide enough that an untrained model tells inputs apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first reviews of each split, in CSV files."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, rows in (("train", 160), ("validation", 50)):
        lines = (ASSETS / "movie_sentiment" / f"{split}.csv").read_text().splitlines(keepends=True)
        (folder / f"{split}.csv").write_text("".join(lines[: rows + 1]))
    return folder


@pytest.fixture(scope="session")
def empty_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose stores hold nothing: copying it is quicker than making one."""
    home = tmp_path_factory.mktemp("empty") / "home"
    open_tracking(*default_store(home))
    optuna.storages.RDBStorage(f"sqlite:///{home / 'optuna.db'}")
    return home


@dataclass
class Lab:
    """A folder with one study file and the stores that its sweeps fill."""

    folder: Path
    model: Path
    data: Path
    name: str = "tiny"
    tracking: str | None = None  # a server in place of the home's own store

    @property
    def file(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def write(self, methods: str = METHODS, budget: str = "{trials: 3}", training: str = "", more: str = "") -> Lab:
        """Write the study file: 10 steps a trial, measured after 5 and 10; random search unless `more` says so."""
        sections = {
            "study": self.name,
            "model": f"{{path: {self.model}, task: SEQ_CLS}}",
            "data": f"{{path: {self.data}, text: text, label: label, max_length: 32}}",
            "training": f"{{steps: 10, batch_size: 8, eval_every: 5, device: cpu{training and ', ' + training}}}",
            "methods": "\n" + textwrap.indent(textwrap.dedent(methods).strip(), "  "),
            "budget": budget,
        }
        if "search:" not in more:
            sections["search"] = "{sampler: random, pruner: none}"
        if "model:" in more:
            del sections["model"]
        self.file.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()) + more)
        return self

    def sweep(self, *words: object) -> Done:
        return workbench("sweep", self.file, "--home", self.home, *words)

    @property
    def study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.name, storage=f"sqlite:///{self.home / 'optuna.db'}")

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.tracking or default_store(self.home)[0])

    @property
    def runs(self) -> PagedList[Run]:
        experiment = self.client.get_experiment_by_name(self.name)
        return self.client.search_runs([experiment.experiment_id])

    @property
    def parent(self) -> Run:
        (run,) = [run for run in self.runs if run.data.tags.get("workbench.kind") == "study"]
        return run

    @property
    def trials(self) -> list[Run]:
        """The child runs, by trial number."""
        parent = self.parent.info.run_id
        children = [run for run in self.runs if run.data.tags.get("mlflow.parentRunId") == parent]
        return sorted(children, key=lambda run: int(run.data.tags["workbench.trial"]))

    def adapter(self, run: Run) -> Path:
        """The folder of a trial's adapter."""
        return Path(self.client.download_artifacts(run.info.run_id, "adapter"))

    def curve(self, run: Run, metric: str) -> dict[int, float]:
        """A metric by step, each of which must be there once."""
        points = self.client.get_metric_history(run.info.run_id, metric)
        assert len({point.step for point in points}) == len(points)
        return {point.step: point.value for point in points}

    def results(self) -> list[tuple]:
        """All that must not depend on anything but the study: each trial's settings and curves."""
        return [
            (
                run.data.tags["workbench.trial"],
                run.data.params,
                *(self.curve(run, metric) for metric in ("train.loss", "validation.loss", "validation.accuracy")),
            )
            for run in self.trials
        ]

    @staticmethod
    def check_alike(results: list[tuple], others: list[tuple]) -> None:
        """The same results, but for the last digits, which depend on the process and on what shared a pass."""
        for (number, params, *curves), (other_number, other_params, *other_curves) in zip(results, others, strict=True):
            assert (number, params) == (other_number, other_params)
            assert curves == [pytest.approx(curve, abs=1e-6) for curve in other_curves]


@pytest.fixture(scope="session")
def new_lab(tiny_bert: Path, reviews: Path, empty_stores: Path) -> Callable[[Path], Lab]:
    """Makes a lab in a folder, with empty stores."""

    def make(folder: Path) -> Lab:
        lab = Lab(folder, tiny_bert, reviews)
        shutil.copytree(empty_stores, lab.home)
        return lab

    return make


@pytest.fixture
def lab(new_lab: Callable[[Path], Lab], tmp_path: Path) -> Lab:
    return new_lab(tmp_path)
