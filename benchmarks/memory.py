"""What a trial is predicted to need against what it takes: the peak of a training step and of evaluation.

    python benchmarks/memory.py                       every combination, under 15 minutes on one core
    python benchmarks/memory.py minilm t5/LoRA        those whose names begin so
    python benchmarks/memory.py --write               put the table into docs/memory.md

Predicted is what a rehearsal on tensors without data says, tracked what the trial itself takes with `track_memory`,
allocated what PyTorch's allocator on the CPU gave out at most in the heaviest step, as its profiler notes it, or with
--cuda `torch.cuda.max_memory_allocated`. That includes what operations take for themselves inside, which neither of the
others sees. The exit code is 1 if a prediction is more than 5 % off what was tracked, or on a GPU 8 % off what was
allocated.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from plain_step import PAGE, plain_peak, plain_step, write_into
from speed.report import machine
from speed.steps import allocations
from speed.work import DATA, ROOT, fetch_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, T5Config

from workbench.sweep.configure import peft_config
from workbench.training.base import Base, load_base
from workbench.training.bench import Bench, Stint
from workbench.training.config import DataSection, ModelSection, TrainingSection
from workbench.training.data import RawData, TaskData, collate, read_data, tokenize
from workbench.training.halved import halve
from workbench.training.loop import to_device
from workbench.training.rehearsal import Rehearsal, blank_base, blank_bench, fault_of, rehearse, step_peak
from workbench.training.tracker import Tracker
from workbench.training.trainee import Trainee

MIB = 2**20
BAR, CUDA_BAR = 0.05, 0.08
STEPS = 2
TOKENIZER = ROOT / "studies" / "assets" / "tiny-llama"  # of models with random weights: it knows how a text ends
Trial = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model, data, and the rows of a step."""

    model: ModelSection
    data: DataSection
    batch_size: int


@dataclass(frozen=True)
class Combination:
    """Trials that share a pass on a subject; without any, the whole model trains by a plain step."""

    subject: str
    name: str
    trials: list[Trial] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.subject}/{self.name}"


@dataclass(frozen=True)
class Found:
    """Bytes at the peak: predicted, tracked and, of a step, allocated. No evaluation of a plain step is measured."""

    step: tuple[int, int]
    evaluation: tuple[int, int] | None
    allocated: int
    seconds: float

    def met(self, cuda: bool) -> bool:
        """Whether the predictions are near enough."""
        if cuda and abs(off(self.step[0], self.allocated)) > CUDA_BAR:
            return False
        return all(abs(off(*pair)) <= BAR for pair in (self.step, self.evaluation) if pair)


def off(predicted: int, taken: int) -> float:
    """How far a prediction is from what was taken, relative to it."""
    return predicted / taken - 1


# ---------------------------------------------------------------- what is measured


def subjects(folder: Path) -> dict[str, Subject]:
    """MiniLM-L6, and the shapes of SmolLM2-135M and t5-small with random weights."""
    rows = {"train": 256, "validation": 64}
    films = {"path": str(DATA), "text": "text", "max_rows": rows}
    words = DataSection(
        path=str(ROOT / "studies" / "assets" / "cmudict_pronunciation"), text="word", target="phonemes", max_rows=rows
    )
    llama = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    t5 = T5Config(d_model=512, d_ff=2_048, num_layers=6, num_heads=8, vocab_size=32_128, decoder_start_token_id=0)
    for name, config in (("llama", llama), ("t5", t5)):
        config.save_pretrained(folder / name)
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    drawn: dict[str, Any] = {"weights": "random"}
    return {
        "minilm": Subject(
            ModelSection(path=fetch_model(shipped=False), task="SEQ_CLS"), DataSection(label="label", **films), 32
        ),
        "llama": Subject(ModelSection(path=str(folder / "llama"), task="CAUSAL_LM", **drawn), DataSection(**films), 8),
        "t5": Subject(ModelSection(path=str(folder / "t5"), task="SEQ_2_SEQ_LM", **drawn), words, 32),
    }


def methods(lora: list[str], ia3: list[str]) -> dict[str, Trial]:
    """A trial of each method, by what it is called.

    Args:
        lora, ia3: modules that they adapt; (IA)3's last one is a feed-forward layer.
    """
    return {
        "LoRA": ("lora", {"r": 8, "target_modules": lora}),
        "(IA)³": ("ia3", {"target_modules": ia3, "feedforward_modules": ia3[-1:]}),
        "trainable tokens": ("trainable_tokens", {"token_indices": list(range(100, 108))}),
        "prompt tuning": ("prompt_tuning", {"num_virtual_tokens": 10}),
    }


def combinations() -> Iterator[Combination]:
    """Every method on every model, and what changes the memory that they take."""
    of = {
        "minilm": methods(["query", "value"], ["key", "value", "output.dense"]),
        "llama": methods(["q_proj", "v_proj"], ["k_proj", "v_proj", "down_proj"]),
        "t5": methods(["q", "v"], ["k", "v", "wo"]),
    }
    for subject, trials in of.items():
        yield from (Combination(subject, name, [trial]) for name, trial in trials.items())
        yield Combination(subject, "full fine-tuning")
        yield Combination(subject, "LoRA, checkpointing", [trials["LoRA"]], {"gradient_checkpointing": True})
        if subject != "t5":
            yield Combination(subject, "LoRA, bf16", [trials["LoRA"]], {"precision": "bf16"})
            yield Combination(subject, "LoRA and (IA)³ in one pass", [trials["LoRA"], trials["(IA)³"]])
    last = ("lora", {"r": 8, "target_modules": ["query", "value"], "layers_to_transform": [4, 5]})
    yield Combination("minilm", "LoRA, last two layers", [last])


# ---------------------------------------------------------------- one combination


def measure(subject: Subject, combination: Combination, folder: Path, device: str = "cpu") -> Found:
    """What a combination is predicted to take and what it takes, in a folder of its own."""
    raw = read_data(subject.data, subject.model.task)
    with brief():
        base = load_base(subject.model, raw.labels, 0, device)
        data = tokenize(raw, base.tokenizer, folder)
        take = of_trials if combination.trials else of_all
        return take(base, subject, combination, raw, data, folder)


@contextmanager
def brief() -> Iterator[None]:
    """Let go of what is made meanwhile; a bench has the garbage collector leave what it finds."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.collect()


def of_trials(
    base: Base, subject: Subject, combination: Combination, raw: RawData, data: TaskData, folder: Path
) -> Found:
    """Trials on the bench."""
    settings = TrainingSection(
        steps=STEPS, batch_size=subject.batch_size, track_memory=True, cache_gib=1, **combination.settings
    )
    stints = [
        Stint(number, peft_config(method, base.task, dict(fields), STEPS), settings, 0, 0, folder / f"{number}", STEPS)
        for number, (method, fields) in enumerate(combination.trials)
    ]
    started = time.perf_counter()
    blank = blank_base(subject.model, raw.labels, base.device, settings.precision)
    need = rehearse(blank_bench(blank, data, fault_of(subject.model, blank, data)), stints)
    seconds = time.perf_counter() - started

    if settings.precision == "bf16":
        base, _ = halve(base, data.train)
    bench = Bench(base, data, folder, settings.cache_gib)
    trainees = [Trainee(base, data, stint, bench.packed, bench.rows) for stint in stints]
    bench.prepare(trainees)
    there = Tracker(bench.tensors(trainees))
    allocated = most_allocated(there.now, base.device, lambda: step_peak(there, bench, trainees))
    for trainee in trainees:
        trainee.remove()
    reports = bench.train(stints, lambda trial, step, loss: None)
    if error := next((report.error for report in reports if report.error), None):
        raise error
    assert {report.shared for report in reports} == {len(stints)}
    tracked = [round(reports[0].costs[f"tensor_peak_mib/{phase}"] * MIB) for phase in ("train", "eval")]
    return Found((need.train, tracked[0]), (need.evaluation, tracked[1]), allocated, seconds)


def of_all(base: Base, subject: Subject, combination: Combination, raw: RawData, data: TaskData, folder: Path) -> Found:
    """The whole model by a plain step."""
    batch = to_device(collate(data.train, range(subject.batch_size)), base.device)
    started = time.perf_counter()
    blank: Any = blank_base(subject.model, raw.labels, base.device).model
    predicted = plain_peak(Rehearsal(next(blank.parameters()).fake_mode), blank, batch, whole)
    seconds = time.perf_counter() - started
    tracked = plain_peak(Tracker(), base.model, batch, whole)
    base.model.zero_grad()
    there = Tracker([*base.model.parameters(), *base.model.buffers()]).now
    allocated = most_allocated(there, base.device, lambda: plain_step(base.model, batch))
    return Found((predicted, tracked), None, allocated, seconds)


def whole(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def most_allocated(before: int, device: torch.device, take: Callable[[], Any]) -> int:
    """Bytes that the allocator has given out at most.

    Args:
        before: those that are out already, which a CPU's does not know of.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        take()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take()
    return before + max(accumulate(allocations(profiler), initial=0))


# ---------------------------------------------------------------- the table


HEAD = """\
| | step: predicted, MiB | tracked | error | evaluation: predicted, MiB | tracked | error | step: allocated, MiB \
| predicted against it | seconds of the prediction |
|---|---|---|---|---|---|---|---|---|---|"""


def line(label: str, found: Found) -> str:
    """A row of the table."""

    def cells(pair: tuple[int, int] | None) -> list[str]:
        return ["", "", ""] if pair is None else [*(f"{n / MIB:,.1f}" for n in pair), f"{off(*pair):+.2%}"]

    allocated = [f"{found.allocated / MIB:,.1f}", f"{off(found.step[0], found.allocated):+.2%}"]
    return (
        f"| {' | '.join([label, *cells(found.step), *cells(found.evaluation), *allocated, f'{found.seconds:.1f}'])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="how names of combinations begin; all by default")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--cuda", action="store_true", help="on a GPU; its figures are printed only")
    arguments = parser.parse_args()
    if arguments.cuda and not torch.cuda.is_available():
        parser.error("--cuda: there is no GPU that torch can use")
    if arguments.cuda and arguments.write:
        parser.error("--write is for the CPU's table")
    if arguments.write and arguments.names:
        parser.error("--write is for the whole table")
    chosen = [c for c in combinations() if c.label.startswith(tuple(arguments.names or [""]))]
    if not chosen:
        parser.error(f"there is no combination {', '.join(arguments.names)}")

    print(HEAD)
    lines, missed = [HEAD], []
    with tempfile.TemporaryDirectory() as folder:
        known = subjects(Path(folder))
        for number, combination in enumerate(chosen):
            found = measure(
                known[combination.subject],
                combination,
                Path(folder) / f"work-{number}",
                "cuda" if arguments.cuda else "cpu",
            )
            lines.append(line(combination.label, found))
            print(lines[-1], flush=True)
            missed += [] if found.met(arguments.cuda) else [combination.label]
    how = f"{STEPS} steps of 32 rows (llama: 8) and 64 rows of evaluation. {date.today():%B %Y}: {machine()}."
    if arguments.write:
        write_into("accuracy", "\n".join([*lines, "", how]))
    sys.exit(f"too far off: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
