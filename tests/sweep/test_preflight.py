"""What only the model and the data can tell is told before anything trains, all at once and each at its place."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest


def check(lab: Any, methods: str) -> list[str]:
    """The problems that a sweep reports, without the file's name. In `methods`, § marks where each one is expected."""
    shutil.rmtree(lab.home)
    lab.write(methods)
    marked = lab.file.read_text()
    expected = []
    for line, text in enumerate(marked.splitlines(), 1):
        while "§" in text:
            expected.append(f"{line}:{text.index('§') + 1}")
            text = text.replace("§", "", 1)
    lab.file.write_text(marked.replace("§", ""))
    done = lab.sweep()
    assert done.code == 2
    *problems, last = done.err.splitlines()
    assert last == f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was run"
    found = [re.fullmatch(rf"{re.escape(str(lab.file))}:(\d+:\d+): (.*)", problem).groups() for problem in problems]
    assert [place for place, _ in found] == expected
    assert [file for file in lab.home.glob("*") if file.is_file()] == []  # neither Optuna's nor MLflow's database
    assert not (lab.home / "artifacts").exists()
    return [message for _, message in found]


def test_every_problem_at_once(lab):
    messages = check(
        lab,
        """
        misspelt:
          method: lora
          target_modules: §[querry]
        one_of_two:
          method: lora
          target_modules: §[query, valeu]
        second_choice:
          method: lora
          r: 2
          target_modules: §{values: [[query], [nope], all-linear]}
        wrong_kind:
          method: lora
          target_modules: §[LayerNorm]
        saved:
          method: lora
          target_modules: [query]
          modules_to_save: §[head]
        ia3:
          target_modules: all-linear
          feedforward_modules: §[word_embeddings]
        ia3_pattern:
          method: ia3
          target_modules: [key, output.dense]
          feedforward_modules: §'.*intermediate.*'
        trainable_tokens:
          token_indices: §[unbelievableness]
        too_high:
          method: trainable_tokens
          token_indices: §[3, 8000]
        too_many:
          method: trainable_tokens
          token_indices: §{most_frequent: {values: [5, 7000]}}
        known:
          method: trainable_tokens
          token_indices: §{new_tokens: [film]}
        two_at_once:
          method: lora
          target_modules: §[querry]
          trainable_token_indices: §[unbelievableness]
        right:
          method: lora
          target_modules: {values: [[query, value], all-linear, '.*attention.*key']}
          trainable_token_indices: {values: [[film], {new_tokens: [unbelievableness]}]}
        """,
    )
    expected = [
        r"Target modules .'querry'. not found in the base model\. The model has .*\bkey, .*\bquery\b.*",
        r"target_modules: nothing is called 'valeu'; the model has .*\bkey, .*",
        r"Target modules .'nope'. not found in the base model\..*",
        r"Target module .*LayerNorm is a LayerNorm, which LoRA is not supported on .*",
        r"modules_to_save: nothing is called 'head'; the model has .*\bclassifier, .*",
        r"feedforward_modules: nothing is called 'word_embeddings'; the modules to adapt are .*\bdense, .*",
        r"feedforward_modules: nothing is called '\.\*intermediate\.\*'; the modules to adapt are dense, key\.",
        r"'unbelievableness' is not one token but .*To train it as one, write \{new_tokens: \['unbelievableness'\]\}\.",
        r"Token ids \[8000\] are outside the vocabulary, which has 8000 tokens\.",
        r"7000 tokens are asked for, but the training split has only \d+ different ones\.",
        r"new_tokens: 'film' is a token already .*",
        r"Target modules .'querry'. not found in the base model\..*",
        r"'unbelievableness' is not one token but .*",
    ]
    assert len(messages) == len(expected)
    for message, pattern in zip(messages, expected, strict=True):
        assert re.fullmatch(pattern, message), message


def test_both_ends_of_a_search_are_tried(lab):
    (message,) = check(
        lab, "trainable_tokens: {token_indices: §{most_informative: {min: 8, max: 100000, distribution: int_uniform}}}"
    )
    assert message.startswith("100000 tokens are asked for")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "label: label",
            "label: lable",
            "data.label: the train split has no column 'lable'; its columns are text, label",
        ),
        (
            "task: SEQ_CLS}",
            "task: SEQ_CLS, overrides: {widht: 3}}",
            "model.overrides: widht is no field of BertConfig.",
        ),
    ],
    ids=["column", "override"],
)
def test_data_and_model_that_do_not_fit(lab, old: str, new: str, message: str):
    shutil.rmtree(lab.home)
    lab.write()
    lab.file.write_text(lab.file.read_text().replace(old, new))
    done = lab.sweep()
    assert (done.code, done.err.startswith(f"error: {message}")) == (2, True), done.err
    assert len(done.err.splitlines()) == 1
    assert [file for file in lab.home.glob("*") if file.is_file()] == []
