"""Sweeps over prompt methods."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from mlflow.entities import Run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

METHODS = """
prompt_tuning:
  num_virtual_tokens: {values: [2, 4]}
  prompt_tuning_init: SAMPLE_VOCAB
  learning_rate: 3e-2
prefix_tuning:
  num_virtual_tokens: 3
  prefix_projection: {values: [true, false]}
  learning_rate: 1e-2
p_tuning:
  num_virtual_tokens: 3
  encoder_reparameterization_type: {values: [MLP, LSTM]}
  encoder_dropout: 0.1
  learning_rate: 1e-2
"""


def test_sweep_over_prompt_methods(lab: Any) -> None:
    """Every prompt method trains a tiny classifier, one after the other on one base, and its adapter loads in peft."""
    lab.write(METHODS, budget="{trials: 20}", more="search: {sampler: grid, pruner: none}\n")
    done = lab.sweep()
    assert (done.code, done.err) == (0, "")
    runs = lab.trials
    assert len(runs) == 6
    assert {run.data.tags["workbench.outcome"] for run in runs} == {"complete"}
    trained = {run.data.params.get("prompt_tuning.num_virtual_tokens"): run.data.metrics for run in runs}
    head, hidden = 16 * 2 + 2, 16
    assert trained["2"]["trainable_params"] == head + 2 * hidden
    assert trained["4"]["trainable_params"] == head + 4 * hidden
    for run in runs:
        assert accuracy_in_peft(lab, run) == pytest.approx(run.data.metrics["validation.accuracy"])


def accuracy_in_peft(lab: Any, run: Run) -> float:
    """Accuracy on the validation file of the trial's adapter on a base drawn anew, by peft."""
    with (lab.data / "validation.csv").open(newline="") as file:
        reviews = list(csv.DictReader(file))
    words = AutoTokenizer.from_pretrained(lab.model)
    names = sorted({review["label"] for review in reviews})
    base = AutoModelForSequenceClassification.from_pretrained(lab.model, num_labels=len(names), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, lab.adapter(run)).eval()
    texts = [review["text"] for review in reviews]
    with torch.no_grad():
        logits = model(**words(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
    right = [names[i] == review["label"] for i, review in zip(logits.argmax(-1).tolist(), reviews, strict=True)]
    return sum(right) / len(right)


def test_preflight_finds_what_is_missing(lab: Any) -> None:
    """The number of virtual tokens has no default."""
    lab.write("prompt_tuning:\n  learning_rate: 1e-2\n")
    done = lab.sweep()
    assert done.code == 2
    assert "num_virtual_tokens" in done.err
