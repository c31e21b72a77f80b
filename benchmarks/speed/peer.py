"""The peer: what a user would write today with Optuna, transformers.Trainer and peft, a fresh model for each trial.

    python -m speed.peer WORK.json RESULT.json

It gets every fair advantage: rows are tokenised once, nothing is saved or logged, Optuna keeps its study in memory, and
only the loss is computed in evaluation. As on our side the base's own dropout is off and the batches are those of the
work, so that both train the same trials.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import torch
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .work import Work

CONFIGS = {"lora": LoraConfig, "ia3": IA3Config, "trainable_tokens": TrainableTokensConfig}


def main(work: Work) -> dict[str, Any]:
    """Run the study; seconds from the files to the last trial, and what each trial came to."""
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    train = tokenised(tokenizer, work, "train", work.train_rows)
    validation = tokenised(tokenizer, work, "validation", work.eval_rows)
    in_order = [train[i] for i in row_order(work)]
    trials: dict[str, Any] = {}

    def objective(trial: optuna.Trial) -> float:
        label = trial.suggest_categorical("trial", list(work.trials))
        begun = time.perf_counter()
        fields = dict(work.trials[label])
        learning_rate = fields.pop("learning_rate")
        set_seed(work.seed)
        trainer = Trainer(
            adapted_model(work.model, fields),
            arguments(work, learning_rate),
            train_dataset=in_order,
            eval_dataset=validation,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        trials[label] = {"losses": losses, "seconds": time.perf_counter() - begun}
        return losses[-1]

    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"trial": list(work.trials)}, seed=work.seed))
    study.optimize(objective, n_trials=len(work.trials))
    return {"seconds": time.perf_counter() - started, "trials": trials}


def tokenised(tokenizer: Any, work: Work, split: str, rows: int) -> list[dict[str, Any]]:
    """The first rows of a split as token ids and a class."""
    with open(Path(work.data, f"{split}.csv"), newline="") as file:
        table = list(csv.DictReader(file))[:rows]
    encoded = tokenizer([row["text"] for row in table], truncation=True, max_length=work.max_length)
    labels = [int(row["label"] == "positive") for row in table]
    return [{"input_ids": ids, "labels": label} for ids, label in zip(encoded["input_ids"], labels, strict=True)]


def row_order(work: Work) -> list[int]:
    """The rows of all steps: one random order of all rows after the other, as our side draws them."""
    generator, order = torch.Generator().manual_seed(work.seed), []
    while len(order) < work.steps * work.batch_size:
        order += torch.randperm(work.train_rows, generator=generator).tolist()
    return order[: work.steps * work.batch_size]


def adapted_model(folder: str, fields: dict[str, Any]) -> torch.nn.Module:
    """A fresh model with an adapter and a new head that trains."""
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    method = fields.pop("method")
    if method == "head":
        base.requires_grad_(False)
        base.classifier.requires_grad_(True)
        return base
    model = get_peft_model(base, CONFIGS[method](task_type="SEQ_CLS", **fields))
    if method == "trainable_tokens":  # has no modules_to_save
        base.classifier.requires_grad_(True)
    return model


def arguments(work: Work, learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        max_steps=work.steps,
        per_device_train_batch_size=work.batch_size,
        per_device_eval_batch_size=work.eval_batch_size,
        learning_rate=learning_rate,
        warmup_steps=round(work.warmup * work.steps),
        weight_decay=0.0,
        seed=work.seed,
        train_sampling_strategy="sequential",  # the rows come in the order of the steps
        eval_strategy="steps",
        eval_steps=work.eval_every,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        label_names=["labels"],
    )


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    Path(sys.argv[2]).write_text(json.dumps(main(Work.read(sys.argv[1]))))
