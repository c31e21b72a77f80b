"""How near every way of sharing work comes to the plain loop: the weights after 50 steps, and the validation loss.

    python benchmarks/equality.py

Shipped model and data. "alone": packed, with frozen activations reused. "micro": besides, batches of 16 in parts of 5.
"checkpointed": besides, activations computed again. "bank": all trials of the table in one pass. "stints": in a bank
from checkpoint to checkpoint, with trials that enter later and trials that leave for a while. The figure is the largest
relative difference of any tensor that trains, |a - b| / |b|, in brackets that of the validation loss.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file

from workbench import adapters as A
from workbench.training.adapted import adapted
from workbench.training.base import load_base
from workbench.training.bench import Bench, Report, Stint
from workbench.training.config import DataSection, ModelSection, TrainingSection
from workbench.training.data import read_data, tokenize
from workbench.training.loop import train

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "studies" / "assets"
STEPS = 50
ATTENTION = ["query", "key", "value"]
TRIALS: dict[str, tuple[type[A.PeftConfig], dict[str, Any]]] = {
    "LoRA, all layers": (A.LoraConfig, {"r": 8, "target_modules": "all-linear"}),
    "LoRA, last layer": (A.LoraConfig, {"r": 4, "target_modules": ATTENTION, "layers_to_transform": [2]}),
    "DoRA": (A.LoraConfig, {"r": 4, "target_modules": ATTENTION, "use_dora": True}),
    "AdaLoRA": (A.AdaLoraConfig, {"target_modules": ATTENTION, "total_step": STEPS, "tinit": 5, "tfinal": 20}),
    "(IA)3": (
        A.IA3Config,
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "LoHa": (A.LoHaConfig, {"r": 4, "target_modules": ATTENTION}),
    "LoKr": (A.LoKrConfig, {"r": 4, "target_modules": ATTENTION}),
    "trainable tokens": (
        A.TrainableTokensConfig,
        {"token_indices": list(range(1500, 1600)), "modules_to_save": ["classifier"]},
    ),
    "head only": (A.LoraConfig, {"target_modules": "dummy-target-modules"}),
    "prompt tuning": (A.PromptTuningConfig, {"num_virtual_tokens": 8}),
    "P-tuning": (A.PromptEncoderConfig, {"num_virtual_tokens": 8, "encoder_hidden_size": 64}),
    "prefix tuning": (A.PrefixTuningConfig, {"num_virtual_tokens": 8}),
    "PiSSA": (A.LoraConfig, {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "pissa"}),
}
COLUMNS = ("alone", "micro", "checkpointed", "bank", "stints")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(Equality(Path(folder)).lines()))


class Equality:
    """The shipped model and data, each trial trained in each way."""

    def __init__(self, folder: Path):
        self.folder = folder
        rows = {"train": 640, "validation": 200}
        data = DataSection(path=str(ASSETS / "movie_sentiment"), text="text", label="label", max_rows=rows)  # type: ignore[arg-type]
        raw = read_data(data, "SEQ_CLS")
        self.base = load_base(ModelSection(path=str(ASSETS / "minilm-l3-8k"), task="SEQ_CLS"), raw.labels, 0, "cpu")
        self.data = tokenize(raw, self.base.tokenizer, folder)
        self.bench = Bench(self.base, self.data, folder, 4.0)

    def settings(self, number: int, **changes: Any) -> TrainingSection:
        """Each trial has its own learning rate and decay."""
        rate, decay = 1e-3 * (1 + number % 3), 0.01 * (number % 2)
        return TrainingSection(steps=STEPS, batch_size=16, learning_rate=rate, weight_decay=decay, **changes)

    def config(self, name: str) -> A.PeftConfig:
        kind, fields = TRIALS[name]
        return kind(task_type="SEQ_CLS", **fields)

    def plain(self, number: int, name: str) -> tuple[dict[str, torch.Tensor], float]:
        """The weights and the validation loss of the plain loop."""
        settings = self.settings(number, eval_every=STEPS)
        with adapted(self.base, self.config(name), seed=number) as model:
            options: dict[str, Any] = {"seed": number, "order_seed": number, "on_eval": lambda *_: None}
            result = train(model, self.base, self.data, settings, **options)
            weights = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        return weights, result.metrics["loss"]

    def stint(self, way: str, number: int, name: str, until: int = STEPS, **changes: Any) -> Stint:
        file = self.folder / way / f"{number}.safetensors"
        return Stint(number, self.config(name), self.settings(number, **changes), number, number, file, until)

    def run(self, stints: list[Stint]) -> dict[int, Report]:
        reports = {report.trial: report for report in self.bench.train(stints, lambda *_: None)}
        for report in reports.values():
            if report.error:
                raise report.error
        return reports

    def ways(self) -> dict[str, dict[int, Report]]:
        """What came of each way, by trial."""
        numbered = list(enumerate(TRIALS))
        ways: dict[str, dict[int, Report]] = {way: {} for way in COLUMNS}
        for number, name in numbered:
            ways["alone"] |= self.run([self.stint("alone", number, name)])
            ways["micro"] |= self.run([self.stint("micro", number, name, micro_batch_size=5)])
            if name != "prefix tuning":  # keeps its tokens in a cache, which cannot be filled twice
                again = {"micro_batch_size": 5, "gradient_checkpointing": True}
                ways["checkpointed"] |= self.run([self.stint("checkpointed", number, name, **again)])
        ways["bank"] = self.run([self.stint("bank", number, name) for number, name in numbered])
        for until in (20, 35, STEPS):  # every third trial enters at the second stint, every third leaves for one
            late = 0 if until == 20 else 1 if until == 35 else None
            there = [(number, name) for number, name in numbered if late is None or number % 3 != late]
            ways["stints"] |= self.run([self.stint("stints", number, name, until) for number, name in there])
        return ways

    def lines(self) -> list[str]:
        """The table, in markdown."""
        ways = self.ways()
        lines = [f"| {' | '.join(['50 steps', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for number, name in enumerate(TRIALS):
            weights, loss = self.plain(number, name)
            cells = []
            for way in COLUMNS:
                if number not in ways[way]:
                    cells.append("refused")
                    continue
                ended = load_file(self.folder / way / f"{number}.safetensors")
                off = max(difference(ended[f"parameter.{key}"], tensor) for key, tensor in weights.items())
                cells.append(f"{off:.0e} ({abs(ways[way][number].metrics['loss'] - loss):.0e})")
            lines.append(f"| {' | '.join([name, *cells])} |")
        return lines


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


if __name__ == "__main__":
    main()
