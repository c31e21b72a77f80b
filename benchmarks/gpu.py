"""Trials in a bank against peft one after the other, for models that a GPU computes faster than Python can ask for it.

    benchmarks/gpu.sh                   on one GPU, in under 9 minutes
    benchmarks/gpu.sh --smoke           that it runs: tiny models, any device

Both sides train LoRA (rank 8, on two projections of every layer) on the same base with random weights, with rows of
equal length: peft's trials with a plain loop, one after the other; ours in one pass of `Bench.train`. MiniLM is in
float32, the Llamas have frozen weights in bfloat16. A figure is the time of one optimiser step of each of K trials.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset

from workbench.adapters import LoraConfig
from workbench.training.base import Base, load_base
from workbench.training.bench import Bench, Stint
from workbench.training.config import ModelSection, Task, TrainingSection
from workbench.training.data import Split, TaskData, batches, collate
from workbench.training.halved import halve
from workbench.training.loop import to_device

ASSETS = Path(__file__).resolve().parents[1] / "studies" / "assets"
BATCHES, TRIALS = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
MINUTES = 8.0  # then no further case begins
WARM, MEASURED = 3, 12  # steps


@dataclass(frozen=True)
class Shape:
    """A model with random weights: a shipped configuration, and what differs from it.

    Attributes:
        targets: modules that LoRA adapts.
        length: tokens of a row.
    """

    name: str
    folder: str
    task: Task
    targets: list[str]
    length: int
    precision: str
    overrides: dict[str, Any]


def encoder(name: str, **overrides: Any) -> Shape:
    return Shape(name, "minilm-l3-8k", "SEQ_CLS", ["query", "value"], 32, "fp32", overrides)


def llama(name: str, **overrides: Any) -> Shape:
    return Shape(name, "tiny-llama", "CAUSAL_LM", ["q_proj", "v_proj"], 64, "bf16", overrides)


SHAPES = [
    encoder("MiniLM-L6, 22 M", num_hidden_layers=6, vocab_size=30_522),
    llama(
        "Llama, 135 M",
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49_152,
    ),
    llama(
        "Llama, 1 B",
        hidden_size=2_048,
        intermediate_size=8_192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
    ),
]
TINY = [encoder("MiniLM, one layer", num_hidden_layers=1), llama("Llama, one layer", num_hidden_layers=1)]


def load(shape: Shape) -> tuple[Base, TaskData]:
    """The base, and data of random tokens in rows of equal length."""
    section = ModelSection(
        path=str(ASSETS / shape.folder), task=shape.task, weights="random", overrides=shape.overrides
    )
    labels = ["negative", "positive"] if shape.task == "SEQ_CLS" else None
    base = load_base(section, labels, seed=0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    splits = {}
    for name, rows in (("train", 256), ("validation", 8)):
        ids = torch.randint(1, vocabulary, (rows, shape.length), generator=generator).tolist()
        columns = {"input_ids": ids, "labels": [row[0] % 2 for row in ids] if labels else ids}
        splits[name] = Split(Dataset.from_dict(columns), shape.task, pad_token_id=0)
    if shape.precision == "bf16":
        base, _ = halve(base, splits["train"])
    return base, TaskData(splits["train"], splits["validation"], labels or [], [], "random")


def peer_step(base: Base, data: TaskData, shape: Shape, batch_size: int) -> float:
    """Seconds of one step of one trial with peft and a plain loop."""
    config = peft.LoraConfig(task_type=shape.task, r=8, lora_alpha=16, target_modules=shape.targets)
    model = peft.get_peft_model(base.model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for number, indices in enumerate(batches(len(data.train), batch_size, WARM + MEASURED, seed=0)):
        if number == WARM:
            started = now()
        model(**to_device(collate(data.train, indices), base.device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    spent = now() - started
    model.unload()
    base.model.requires_grad_(False)
    return spent / MEASURED


def bank_step(bench: Bench, shape: Shape, batch_size: int, trials: int, folder: Path) -> float:
    """Seconds of one step of all trials in one pass."""
    config = LoraConfig(task_type=shape.task, r=8, lora_alpha=16, target_modules=shape.targets)
    settings = TrainingSection(steps=WARM + MEASURED, batch_size=batch_size, learning_rate=1e-4)
    stints = [Stint(k, config, settings, k, 0, folder / f"{k}.safetensors", WARM) for k in range(trials)]
    spent = 0.0
    for until in (WARM, WARM + MEASURED):
        reports = bench.train([replace(stint, until=until) for stint in stints], lambda *step: None)
        for error in (report.error for report in reports if report.error):
            raise error
        spent = sum(report.costs["seconds/train"] for report in reports)
    return spent / MEASURED


def now() -> float:
    """Seconds, when the device has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(shape: Shape, batch_sizes: Sequence[int], trials: Sequence[int], until: float) -> list[dict[str, Any]]:
    """One case for each batch size and number of trials, until the time is up."""
    base, data = load(shape)
    bench = Bench(base, data)
    cases = []
    for batch_size in batch_sizes:
        for count in trials:
            if time.perf_counter() > until:
                return cases
            reset_peak()
            before = peer_step(base, data, shape, batch_size)
            with tempfile.TemporaryDirectory() as folder:
                together = bank_step(bench, shape, batch_size, count, Path(folder))
            alone = statistics.median([before, peer_step(base, data, shape, batch_size)])
            case = {
                "model": shape.name,
                "precision": shape.precision,
                "packed": not bench.fault,
                "batch": batch_size,
                "tokens a row": shape.length,
                "trials": count,
                "peer ms": 1000 * alone * count,
                "ours ms": 1000 * together,
                "times sooner": alone * count / together,
                "peak MiB": peak_mib(),
            }
            shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in case.items()}
            print(*(f"{key}: {value}" for key, value in shown.items()), sep=", ", flush=True)
            cases.append(case)
    return cases


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    """Highest memory on the GPU, both sides together; 0 where there is none."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models and few cases")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures go")
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * MINUTES
    shapes = TINY if arguments.smoke else SHAPES
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cases: list[dict[str, Any]] = []
    for number, shape in enumerate(shapes):
        until = time.perf_counter() + (end - time.perf_counter()) / (len(shapes) - number)  # an equal part for each
        cases += measure(shape, (1, 2) if arguments.smoke else BATCHES, (1, 2) if arguments.smoke else TRIALS, until)
        result = {"device": device, "torch": torch.__version__, "peft": peft.__version__, "cases": cases}
        arguments.out.write_text(json.dumps(result, indent=1))
    for shape in dict.fromkeys(case["model"] for case in cases):
        best = max((case for case in cases if case["model"] == shape), key=lambda case: case["times sooner"])
        print(f"{shape}: {best['times sooner']:.1f} times sooner with {best['trials']} trials at batch {best['batch']}")


if __name__ == "__main__":
    main()
