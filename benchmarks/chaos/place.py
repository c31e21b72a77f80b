"""A tiny model, a few reviews and a study over them, and an MLflow server: what is tormented."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.postgres import free_port

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "studies" / "assets"
EVERY = 20  # steps between evaluations

STUDY = """\
study: {name}
model: {{path: {folder}/model, task: SEQ_CLS}}
data: {{path: {folder}/data, text: text, label: label, max_length: 32}}
training: {{steps: {steps}, batch_size: 8, eval_every: {every}, device: cpu}}
methods:
  lora:
    r: {{values: [2, 4, 8]}}
    target_modules: [query, value]
    learning_rate: {{min: 1e-3, max: 1e-2, distribution: log_uniform_values}}
  adalora:
    target_modules: [query, value]
    learning_rate: {{min: 1e-3, max: 1e-2, distribution: log_uniform_values}}
  ia3:
    learning_rate: {{min: 1e-3, max: 1e-2, distribution: log_uniform_values}}
budget: {{trials: {trials}}}
search: {{sampler: tpe, pruner: none}}
"""


def write_study(folder: Path, name: str, trials: int, steps: int) -> Path:
    """The study's file, with its model and its data beside it."""
    model, data = folder / "model", folder / "data"
    data.mkdir(parents=True)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    BertModel(config, add_pooling_layer=False).save_pretrained(model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).write_bytes((ASSETS / "minilm-l3-8k" / file).read_bytes())
    for split, rows in (("train", 400), ("validation", 100)):
        lines = (ASSETS / "movie_sentiment" / f"{split}.csv").read_text().splitlines(keepends=True)
        (data / f"{split}.csv").write_text("".join(lines[: rows + 1]))
    file = folder / "study.yaml"
    file.write_text(STUDY.format(name=name, folder=folder, trials=trials, steps=steps, every=EVERY))
    return file


@dataclass
class MlflowServer:
    """An MLflow server on 127.0.0.1 that can be stopped and started again."""

    folder: Path
    database: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = ["mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1"]
        command += [f"--backend-store-uri={self.database}", f"--artifacts-destination={self.folder / 'artifacts'}"]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError((self.folder / "mlflow.log").read_text()) from None
                time.sleep(0.2)

    def stop(self) -> None:
        """End it and its workers at once."""
        assert self.process
        os.killpg(self.process.pid, 9)
        self.process.wait()
