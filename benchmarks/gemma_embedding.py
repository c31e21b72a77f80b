"""What it takes to train the embeddings of gemma-2-2b: all of them, LoRA on them, a few tokens; ours and peft's.

    python benchmarks/gemma_embedding.py              prints the table, in half a minute; no weights, no GPU
    python benchmarks/gemma_embedding.py --cuda       besides, what a GPU measures, with random weights (12 GiB)
    python benchmarks/gemma_embedding.py --write      puts the table into docs/memory.md

A figure is the peak of one training step in bfloat16, run on tensors without data (`Rehearsal`): weights, activations,
gradients, AdamW's moments and what it takes for a while; not what an operation takes for itself inside.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from plain_step import PAGE, Adapt, plain_peak, plain_step, write_into
from speed.report import machine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedConfig

from workbench import adapters
from workbench.training.rehearsal import Rehearsal

GIB = 2**30
RANK, TOKENS = 8, 8
SHAPE = Gemma2Config(
    vocab_size=256_000,
    hidden_size=2_304,
    num_hidden_layers=26,
    intermediate_size=9_216,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
    use_cache=False,
)


@dataclass(frozen=True)
class Case:
    """One way to train embeddings.

    Attributes:
        adapt: makes a frozen model one that trains this way.
        published: GiB that it saves against training them all, as published; None: nothing is.
    """

    name: str
    adapt: Adapt
    published: float | None = None


def everything(model: Any) -> nn.Module:
    """The embedding matrix itself; it is the output layer's, too."""
    model.get_input_embeddings().requires_grad_(True)
    return model


def everything_copied(model: Any) -> nn.Module:
    """As peft does it: a copy that the output layer does not share. It asks for a layer with LoRA besides."""
    config = peft.LoraConfig(r=1, target_modules=["layers.0.self_attn.q_proj"], modules_to_save=["embed_tokens"])
    return peft.get_peft_model(model, config)


def low_rank(library: Any) -> Adapt:
    """LoRA on the input embeddings; the output layer stays."""
    return lambda model: library.get_peft_model(model, library.LoraConfig(r=RANK, target_modules=["embed_tokens"]))


def few_tokens(library: Any, tied: bool = True) -> Adapt:
    """Trainable tokens, in the tied output layer as well or in the input embeddings alone."""

    def adapt(model: Any) -> nn.Module:
        model.config.tie_word_embeddings = tied  # what both libraries go by; the weights remain one
        return library.get_peft_model(
            model, library.TrainableTokensConfig(token_indices=list(range(100, 100 + TOKENS)))
        )

    return adapt


CASES = [
    Case("the embedding matrix", everything),
    Case("the same with peft's `modules_to_save`", everything_copied),
    Case(f"LoRA on it, rank {RANK}, peft", low_rank(peft), 6.3),
    Case(f"LoRA on it, rank {RANK}, ours", low_rank(adapters)),
    Case(f"{TOKENS} tokens, peft", few_tokens(peft), 4.8),
    Case(f"{TOKENS} tokens, ours", few_tokens(adapters)),
    Case(f"{TOKENS} tokens, not in the output layer, peft", few_tokens(peft, tied=False)),
    Case(f"{TOKENS} tokens, not in the output layer, ours", few_tokens(adapters, tied=False)),
]


# ---------------------------------------------------------------- one step


def build(config: PreTrainedConfig) -> Any:
    """A frozen model in bfloat16."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).requires_grad_(False)


def some_text(config: PreTrainedConfig, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, each predicted from those before it."""
    ids = torch.randint(1, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def predicted(config: PreTrainedConfig, batch: dict[str, Tensor], adapt: Adapt, foreach: bool = False) -> int:
    """Bytes at the peak of a step, on tensors without data."""
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        model = build(config)
    return plain_peak(Rehearsal(mode), model, batch, adapt, foreach)


def measured(config: PreTrainedConfig, batch: dict[str, Tensor], adapt: Adapt) -> int:
    """Bytes at the peak of a step on a GPU, by its allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        model = adapt(build(config)).train()
    there = {name: tensor.cuda() for name, tensor in batch.items()}
    torch.cuda.reset_peak_memory_stats()
    plain_step(model, there, foreach=True)
    return torch.cuda.max_memory_allocated()


# ---------------------------------------------------------------- the table


def report(rows: int, length: int, cuda: bool) -> str:
    """The table and what it says, in Markdown."""
    batch = some_text(SHAPE, rows, length)
    found = {
        case.name: [predicted(SHAPE, batch, case.adapt, foreach) / GIB for foreach in (False, True)]
        + ([measured(SHAPE, batch, case.adapt) / GIB] if cuda else [])
        for case in CASES
    }
    kinds = ["AdamW by tensor", "AdamW foreach", *(["measured on the GPU"] if cuda else [])]
    heads = ["what trains", *(f"{kind}, GiB | saved" for kind in kinds), "published saving"]
    lines = [f"| {' | '.join(heads)} |", "|---" * (2 * len(kinds) + 2) + "|"]
    whole = found[CASES[0].name]
    for case in CASES:
        pairs = [f"{peak:.2f} | {full - peak:.2f}" for peak, full in zip(found[case.name], whole, strict=True)]
        lines.append(f"| {case.name} | {' | '.join(pairs)} | {case.published or ''} |")
    return "\n".join([*lines, "", *words(rows, length, {name: peaks[0] for name, peaks in found.items()})])


def words(rows: int, length: int, peak: dict[str, float]) -> Iterator[str]:
    """What the table says.

    Args:
        peak: GiB, by case.
    """
    table = SHAPE.vocab_size * SHAPE.hidden_size * 2 / GIB
    names = [case.name for case in CASES]
    tied, inputs = peak[names[4]] - peak[names[5]], peak[names[6]] - peak[names[7]]
    yield (
        f"The peak of one step, {rows} x {length} tokens, gemma-2-2b's shape in bfloat16, predicted from tensors "
        "without data: weights, activations, gradients and AdamW's moments. The logits are counted in bfloat16 and, "
        "for the loss, in float32, with their gradients. AdamW takes tensors one by one on a CPU and all at once "
        "(foreach) on a GPU, with one temporary of the matrix's size less. That size is "
        f"{table:.2f} GiB."
    )
    yield ""
    yield (
        "Trained as a whole, the matrix is there six times in the optimiser's step: itself, its gradient, two moments, "
        "two temporaries; with `modules_to_save` once more, since the output layer keeps the old one. LoRA and our "
        "tokens peak in the backward pass of the loss, where the matrix is there once, beside logits, which every "
        "method has. peft's tokens copy it at every lookup, to put the trained rows in, and once more for the tied "
        "output layer; the backward pass needs that copy, and the copy's gradient comes on top. Ours puts rows in "
        f"after the lookup, and logits after the product: {tied:.2f} GiB less. With the output layer left alone peft's "
        "copy, and later its gradient, lives for a moment only: "
        f"{inputs:.2f} GiB, and nothing with longer batches, whose logits take more."
    )
    yield ""
    yield (
        "The published savings, 4.8 and 6.3 GiB, are quoted for PEFT's documentation and could not be looked up; those "
        "of its pages that could say about 4 GiB for tokens and about as much for LoRA. They were measured on a GPU, "
        "with which batch they do not say. "
        f"{date.today():%B %Y}: {machine()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--cuda", action="store_true", help="measure on a GPU as well")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.cuda and not torch.cuda.is_available():
        parser.error("--cuda: there is no GPU that torch can use; without it the table needs none")
    text = report(arguments.batch, arguments.length, arguments.cuda)
    print(text)
    if arguments.write:
        write_into("gemma", text)


if __name__ == "__main__":
    main()
