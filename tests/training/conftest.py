"""Tiny models, tokenizers and data sets, made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: a test that asks the hub fails at once

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,"]
WORDS = ["good", "bad", "film", "the", "was", "Ann", "Bob", "Paris", "Rome", "likes"]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """WordPiece over a few words and all letters; further arguments name special tokens."""
    pieces = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    if "cls_token" in special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    elif "eos_token" in special:
        backend.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 4)])
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if "cls_token" in special else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", model_max_length=64, model_input_names=inputs, **special
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a task head, with dropout 0.1 of its own."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,  # wide enough that an untrained model tells inputs apart
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A decoder with input and output embeddings tied or not; its tokenizer has no padding token."""

    def make(tied: bool) -> Path:
        folder = tmp_path_factory.mktemp("llama")
        tokenizer = make_tokenizer(eos_token="[EOS]")
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 3,  # as many models have it: rows to spare
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=tied,
            eos_token_id=4,
            bos_token_id=4,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and decoder."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = make_tokenizer(pad_token="[PAD]", eos_token="[EOS]")
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=4,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """SEQ_CLS: `good` and `bad` decide, the rest is noise."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, n in (("train", 40), ("validation", 12), ("test", 8)):
        rows = [
            (f"the film was {'good' if i % 2 else 'bad'} {'a ' * (i % 5)}", "yes" if i % 2 else "no") for i in range(n)
        ]
        lines = "".join(f'"{text}",{label}\n' for text, label in rows)
        (folder / f"{split}.csv").write_text("text,label\n" + lines)
    return folder


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """TOKEN_CLS: people and towns, without BIO."""
    folder = tmp_path / "names"
    folder.mkdir()
    rows = [
        {"tokens": ["Ann", "likes", "Paris"], "tags": ["person", "O", "town"]},
        {"tokens": ["Bob", "Bob", "likes", "Rome"], "tags": ["person", "person", "O", "town"]},
        {"tokens": ["Rome", "was", "good"], "tags": ["town", "O", "O"]},
    ]
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def known_places() -> dict[str, Any]:
    return {}


@pytest.fixture
def places(
    known_places: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    """Gives a `Place` by its kind, the same to all tests; after each the base must be as it was."""
    from workbench.training import bench

    from .places import State, make_place  # which need this file

    monkeypatch.setattr(bench, "release", lambda device: None)  # takes longer than a tiny model trains
    used: dict[str, State] = {}

    def place(kind: str) -> Any:
        if kind not in known_places:
            known_places[kind] = make_place(kind, tmp_path_factory.mktemp(kind))
        used.setdefault(kind, State.of(known_places[kind].base.model))
        return known_places[kind]

    yield place
    for kind, state in used.items():
        state.check(known_places[kind].base.model)
