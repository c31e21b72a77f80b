"""The sections that run whole studies: mixed, lora, orchestration, linear."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.training.base import load_tokenizer
from workbench.training.config import DataSection, ModelSection
from workbench.training.data import read_data, tokenize
from workbench.training.rows import Rows

from .report import Report, Row, times
from .sides import run
from .work import DATA, Work

Trials = dict[str, dict[str, Any]]
LOW_TO_HIGH = {  # learning rates
    "ia3": {"low": 0.005, "middle": 0.01, "high": 0.03},
    "head": {"low": 0.003, "middle": 0.01, "high": 0.03},
}
OPINIONS = [  # words that decide a review and stand in few
    *("brilliant", "charming", "clever", "dull", "boring", "fresh", "predictable", "moving"),
    *("hilarious", "silly", "touching", "bland", "engaging", "lame", "witty", "painful"),
]
LINEAR = ["query", "key", "value", "dense"]  # every linear layer of the encoder


def lora(r: int, target_modules: list[str], learning_rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "method": "lora",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": target_modules,
        "learning_rate": learning_rate,
        **fields,
    }


def lora_trials() -> Trials:
    return {
        "lora_r4": lora(4, ["query", "value"], 1e-3),
        "lora_r8": lora(8, ["query", "value"], 4e-3),
        "lora_linear_r8": lora(8, LINEAR, 1e-3),
        "lora_linear_r16": lora(16, LINEAR, 3e-3),
    }


def last_layers_trials(layers: int) -> Trials:
    last = {"layers_to_transform": [layers - 2, layers - 1]}
    return {
        "last_r4": lora(4, ["query", "value"], 2e-3, **last),
        "last_r8": lora(8, ["query", "value"], 5e-3, **last),
        "last_linear_r8": lora(8, LINEAR, 2e-3, **last),
        "last_linear_r16": lora(16, LINEAR, 3e-3, **last),
    }


def mixed_trials(model: str, layers: int) -> Trials:
    """The 16 trials of the bar: methods of every kind, as a search would draw them."""
    ia3 = {"method": "ia3", "target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    tokens = load_tokenizer(ModelSection(path=model, task="SEQ_CLS")).convert_tokens_to_ids(OPINIONS)
    three = {**lora_trials(), **last_layers_trials(layers)}  # of a kind, and four of tokens
    del three["lora_r4"], three["last_linear_r16"]
    return {
        **three,
        **{f"ia3_{name}": ia3 | {"learning_rate": rate} for name, rate in LOW_TO_HIGH["ia3"].items()},
        **{
            f"tokens_{k}_{name}": {"method": "trainable_tokens", "token_indices": tokens[:k], "learning_rate": rate}
            for k in (len(OPINIONS) // 2, len(OPINIONS))
            for name, rate in (("low", 0.005), ("high", 0.02))
        },
        **{f"head_{name}": {"method": "head", "learning_rate": rate} for name, rate in LOW_TO_HIGH["head"].items()},
    }


def share_of_rows(model: str, rows: int, tokens: list[int]) -> float:
    """How many of the first training rows hold one of these tokens."""
    section = DataSection(path=str(DATA), text="text", label="label", max_rows={"train": rows})
    tokenizer = load_tokenizer(ModelSection(path=model, task="SEQ_CLS"))
    with tempfile.TemporaryDirectory() as folder:
        split = tokenize(read_data(section, "SEQ_CLS"), tokenizer, Path(folder)).train
    return Rows.of("train", split).holding(tokens).float().mean().item()


# -------------------------------------------------------------------- against the peer


def mixed(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """A mixed study, as it is, in bf16, and with pruning."""
    steps, rows, held_out = (18, 192, 96) if quick else (180, 1920, 300)
    work = Work(model, mixed_trials(model, layers), steps, steps // 9, rows, held_out)
    variants = {
        "fp32": work,
        "bf16": replace(work, precision="bf16"),
        "halving": replace(work, pruner="successive_halving"),
        "halving bf16": replace(work, pruner="successive_halving", precision="bf16"),
    }
    rounds = [compare(work, variants) for _ in range(repeats)]
    rows_ = [
        times("mixed study, 16 trials, fp32", ratios(rounds, "fp32"), 4),
        times("the same with `precision: bf16`", ratios(rounds, "bf16"), 7),
        halved("with successive halving, fp32, the peer without", rounds, "halving"),
        halved("with successive halving, bf16, the peer without", rounds, "halving bf16"),
    ]
    seconds = ", ".join(f"{side} {median_seconds(rounds, side):.0f} s" for side in rounds[0])
    share = share_of_rows(model, rows, max((t.get("token_indices", []) for t in work.trials.values()), key=len))
    how = (
        f"16 trials of {steps} steps of {work.batch_size} rows ({steps * work.batch_size // rows} epochs of {rows} "
        f"rows), measured {steps // work.eval_every} times on {held_out} rows: 3 of LoRA on all layers, 3 of LoRA on "
        f"the last two, 3 of (IA)³, 4 of trainable tokens (up to {len(OPINIONS)} words of opinion, which {share:.0%} "
        f"of the rows hold), 3 of the head alone. {repeats} round(s); {seconds}. Final "
        f"validation losses differ from the peer's by {apart(rounds, 'fp32'):.4f} in the median (fp32) and "
        f"{apart(rounds, 'bf16'):.4f} (bf16); adapters start from other random values than the peer's."
    )
    return Report(rows_, how, {"work": vars(work), "rounds": rounds})


def halved(what: str, rounds: list[dict[str, Any]], variant: str) -> Row:
    """The row of a study that stops losers: it counts if it ends with the peer's winner."""
    row = times(what, ratios(rounds, variant), 20)
    ends = [(best(found["peer"]), best(found[variant])) for found in rounds]
    if all(theirs == ours for theirs, ours in ends):
        return replace(row, measured=f"{row.measured}, same winner")
    worse = statistics.median(
        found["peer"]["trials"][ours]["losses"][-1] - found["peer"]["trials"][theirs]["losses"][-1]
        for found, (theirs, ours) in zip(rounds, ends, strict=True)
    )
    return replace(row, measured=f"{row.measured}, another winner, {worse:.4f} worse in loss at the peer's", met=False)


def lora_only(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """LoRA on all layers in both precisions, and on the last two."""
    steps, rows, held_out = (12, 128, 64) if quick else (45, 480, 300)
    everywhere = Work(model, lora_trials(), steps, steps // 3, rows, held_out)
    # twice as long, since trials that take so little would leave much of the time to the study's start
    last = replace(
        everywhere, trials=last_layers_trials(layers), steps=2 * steps, eval_every=2 * steps // 3, train_rows=2 * rows
    )
    variants = {"fp32": everywhere, "bf16": replace(everywhere, precision="bf16")}
    rounds = [compare(everywhere, variants) for _ in range(repeats)]
    last_rounds = [compare(last, {"fp32": last}) for _ in range(repeats)]
    seconds = ", ".join(f"{side} {median_seconds(rounds, side):.0f} s" for side in rounds[0])
    last_seconds = ", ".join(f"{side} {median_seconds(last_rounds, side):.0f} s" for side in last_rounds[0])
    return Report(
        [
            times("LoRA on all layers, fp32", ratios(rounds, "fp32"), 1.7),
            times("LoRA on all layers, bf16", ratios(rounds, "bf16"), 2.8),
            times("LoRA on the last 2 layers, fp32", ratios(last_rounds, "fp32"), 4),
        ],
        f"Studies of {len(last.trials)} trials of {steps} (all layers) and {last.steps} (last two) steps of "
        f"{last.batch_size} rows, {steps * last.batch_size // rows} epochs each, measured 3 times on {held_out} rows; "
        f"{repeats} round(s); all layers: {seconds}; last two: {last_seconds}.",
        {"works": [vars(everywhere), vars(last)], "rounds": rounds, "last_rounds": last_rounds},
    )


def compare(work: Work, variants: dict[str, Work]) -> dict[str, Any]:
    """One round: the peer's side once, and ours in each variant."""
    return {"peer": run("peer", work), **{name: run("ours", variant) for name, variant in variants.items()}}


def ratios(rounds: list[dict[str, Any]], variant: str) -> list[float]:
    """How many times sooner than the peer, by round."""
    return [found["peer"]["seconds"] / found[variant]["seconds"] for found in rounds]


def median_seconds(rounds: list[dict[str, Any]], side: str) -> float:
    return statistics.median(found[side]["seconds"] for found in rounds)


def best(side: dict[str, Any]) -> str:
    """The trial with the lowest loss at the end, of those that came there."""
    complete = {
        label: trial for label, trial in side["trials"].items() if trial.get("outcome", "complete") == "complete"
    }
    return min(complete, key=lambda label: complete[label]["losses"][-1])


def apart(rounds: list[dict[str, Any]], variant: str) -> float:
    """Median distance between the final losses of a trial on both sides."""
    return statistics.median(
        abs(trial["losses"][-1] - found[variant]["trials"][label]["losses"][-1])
        for found in rounds
        for label, trial in found["peer"]["trials"].items()
    )


# -------------------------------------------------------------------- our side alone


def orchestration(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """What a trial costs besides its training and evaluation."""
    steps, rows, held_out = (10, 128, 64) if quick else (100, 960, 300)
    few, many = 1, 3
    trials = {f"lora_{i}": lora(8, ["query", "value"], 1e-3 * (i + 1)) for i in range(many)}
    work = Work(model, trials, steps, max(1, steps // 3), rows, held_out)
    first = replace(work, trials=dict(list(trials.items())[:few]))
    shares, rounds = [], []
    for _ in range(repeats):
        small, large = run("ours", first, one_core=True), run("ours", work, one_core=True)
        extra = (beside(large) - beside(small)) / (many - few)
        trial = statistics.mean(found["work"] for found in large["trials"].values()) * 100 / steps
        shares.append(100 * extra / (extra + trial))
        rounds.append({"few": small, "many": large, "seconds_a_trial": extra, "trial": trial})
    share = statistics.median(shares)
    return Report(
        [Row("orchestration a trial (ask, inject, log, tell, remove)", "≤ 2 %", f"{share:.2f} %", share <= 2)],
        f"Share of a 100-step trial (LoRA, batch 32), of which {statistics.median(r['trial'] for r in rounds):.1f} s "
        f"are training and evaluation and {statistics.median(r['seconds_a_trial'] for r in rounds):.2f} s are not: "
        f"what a study of {many} trials takes beyond the seconds recorded for training and evaluation, less the same "
        f"of a study of {few}; on one core, so that nothing runs beside it.",
        {"work": vars(work), "rounds": rounds},
    )


def beside(side: dict[str, Any]) -> float:
    """Seconds of a study that are neither training nor evaluation."""
    return side["seconds"] - sum(trial["work"] for trial in side["trials"].values())


def linear(model: str, layers: int, quick: bool, repeats: int) -> Report:
    """More trials take more time in proportion, and no more memory."""
    sizes = (4, 8, 16) if quick else (8, 16, 32, 64)
    rounds: list[dict[int, dict[str, Any]]] = []
    for _ in range(repeats):
        found = {}
        for size in sizes:
            trials = {f"lora_{i}": lora(8, ["query", "value"], 1e-3 + 1e-5 * i) for i in range(size)}
            found[size] = run("ours", Work(model, trials, 6, 3, 192, 64), memory=True)
        rounds.append(found)
    seconds = [statistics.median(found[size]["seconds"] for found in rounds) for size in sizes]
    memory = [statistics.median(settled(found[size]["memory"]) for found in rounds) for size in sizes]
    slope, start = np.polyfit(sizes, seconds, 1).tolist()
    off = 100 * max(abs(s / (start + slope * n) - 1) for n, s in zip(sizes, seconds, strict=True))
    growth = 100 * (max(memory) / min(memory) - 1)
    span = f"{sizes[0]} … {sizes[-1]} trials"
    table = "; ".join(f"{n}: {s:.0f} s, {m:.0f} MiB" for n, s, m in zip(sizes, seconds, memory, strict=True))
    return Report(
        [
            Row(f"{span}: makespan", "linear", f"at most {off:.1f} % off a line, {slope:.2f} s a trial", off <= 5),
            Row(f"{span}: resident memory", "within 5 %", f"{growth:.1f} %", growth <= 5),
        ],
        f"LoRA, 6 steps of 32 rows. By number of trials: {table}. Memory is the proportional set size of the process "
        "and its children, the mean over the last quarter of the run.",
        {"sizes": sizes, "rounds": rounds},
    )


def settled(memory: list[float]) -> float:
    """Mean of the last quarter of the samples."""
    return statistics.mean(memory[-max(1, len(memory) // 4) :])
