"""The same trial with what a user would write today: `transformers.Trainer` and peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from workbench import adapters
from workbench.training import bench as bench_file
from workbench.training.adapted import adapted
from workbench.training.data import batches, collate

from .places import Place, made_settings, make_base, make_data

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    ("IA3Config", {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
]


class InOrder(Trainer):
    """The rows of the data set one after the other."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "options"), CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_evaluation_loss_is_that_of_trainer_and_peft(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_file, "release", lambda device: None)
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    place = Place(make_base("bert", "SEQ_CLS", **undropped), make_data("SEQ_CLS"), tmp_path)
    settings = made_settings(learning_rate=1e-2)
    options = {"task_type": "SEQ_CLS", **options}

    theirs: Any = peft.get_peft_model(copy.deepcopy(place.base.model), getattr(peft, name)(**options))
    with adapted(place.base, getattr(adapters, name)(**options), seed=0) as model:
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == start.keys()
    with torch.no_grad():
        for n, parameter in own.items():
            parameter.copy_(start[n])
    train, validation = place.data.train, place.data.validation
    order = [i for batch in batches(len(train), settings.batch_size, settings.steps, seed=0) for i in batch]
    trainer = InOrder(
        theirs,
        TrainingArguments(
            str(tmp_path / "trainer"),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=len(validation),
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(settings.warmup * settings.steps),
            max_grad_norm=settings.max_grad_norm,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=lambda indices: collate(train if len(indices) < len(validation) else validation, indices),
        train_dataset=order,  # type: ignore[arg-type]
        eval_dataset=list(range(len(validation))),  # type: ignore[arg-type]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    assert abs(before - expected) > 0.01
    for got in (
        place.alone(getattr(adapters, name)(**options), settings),
        place.plainly(getattr(adapters, name)(**options), settings),
    ):
        assert abs(got.metrics["loss"] - expected) < 5e-5
