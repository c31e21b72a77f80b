"""Make `tiny-llama`: a small Llama that can pronounce, but has never seen a stress mark.

It reads letters and writes phonemes. Its vocabulary holds the three stress marks of CMUdict as well, but it is trained
on half of the training words with the marks taken out, and the rows of these tokens are as they were drawn. What is
left for an adapter: the stress, and the other half of the words.

    python studies/assets/make_tiny_llama.py          (a few minutes on a CPU)
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

HERE = Path(__file__).parent
PHONEMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
EPOCHS, BATCH, LEARNING_RATE = 24, 128, 3e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, phonemes and stress marks; "vibes" is `▁ v i b e s`, "V AY1 B Z" is `▁V ▁AY 1 ▁B ▁Z`."""
    pieces = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"▁{p}" for p in PHONEMES.split()),
        *"012",
    ]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁[A-Z]+|."), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def read_words(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Prompt and target of every second training word, without stress marks."""
    with open(HERE / "cmudict_pronunciation" / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::2]
    targets = [re.sub(r"\d", "", row["phonemes"]) for row in rows]
    prompt_ids = tokenizer([row["word"] for row in rows])["input_ids"]
    target_ids = tokenizer(targets, add_special_tokens=False)["input_ids"]
    return [(p, [*t, tokenizer.eos_token_id]) for p, t in zip(prompt_ids, target_ids, strict=True)]


def epoch(words: list[tuple[list[int], list[int]]], pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """All words in batches of about the same length, in random order."""
    words = sorted(words, key=lambda word: (len(word[0]) + len(word[1]), random.random()))
    groups = [words[i : i + BATCH] for i in range(0, len(words), BATCH)]
    for group in random.sample(groups, len(groups)):
        longest = max(len(p) + len(t) for p, t in group)
        ids = [[*p, *t, *[pad] * (longest - len(p) - len(t))] for p, t in group]
        labels = [[*[-100] * len(p), *t, *[-100] * (longest - len(p) - len(t))] for p, t in group]
        mask = [[1] * (len(p) + len(t)) + [0] * (longest - len(p) - len(t)) for p, t in group]
        yield {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model, words = make_model(tokenizer).train(), read_words(tokenizer)
    steps = EPOCHS * -(-len(words) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    marks = tokenizer.convert_tokens_to_ids(["0", "1", "2"])
    as_drawn = model.get_input_embeddings().weight[marks].detach().clone()
    for number in range(EPOCHS):
        losses = []
        for batch in epoch(words, tokenizer.pad_token_id):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {number + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)
    with torch.no_grad():
        # tied embeddings are output weights too: training pushes down tokens that never come, and this takes it back
        model.get_input_embeddings().weight[marks] = as_drawn
    model.half().save_pretrained(HERE / "tiny-llama")
    tokenizer.save_pretrained(HERE / "tiny-llama")


if __name__ == "__main__":
    main()
