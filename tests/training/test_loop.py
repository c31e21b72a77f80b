"""The loop on tiny models: what trains, what stays, what is measured and what stops a trial."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.adapters import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from workbench.errors import Diverged, OutOfMemory
from workbench.training import loop
from workbench.training.base import Base, load_base
from workbench.training.config import DataSection, ModelSection, TrainingSection
from workbench.training.data import TaskData, collate, read_data, tokenize
from workbench.training.loop import Result, evaluate, train, training_mode
from workbench.training.memory import Meter
from workbench.training.metrics import METRICS

from .conftest import write_rows


@dataclass
class Workplace:
    base: Base
    data: TaskData

    def adapted(self, config: Any = None) -> PeftModel:
        """A new adapter, the same every time."""
        torch.manual_seed(0)
        lora = {"CAUSAL_LM": ["q_proj"], "SEQ_2_SEQ_LM": ["q", "v"]}.get(self.base.task, ["query", "value"])
        config = config or LoraConfig(task_type=self.base.task, r=4, target_modules=lora)
        return get_peft_model(self.base.model, config)

    def train(
        self, config: Any = None, seed: int = 0, order_seed: int = 0, on_eval: Any = None, **settings: Any
    ) -> Result:
        """Train an adapter and take it off again."""
        model = self.adapted(config)
        try:
            return train(
                model,
                self.base,
                self.data,
                TrainingSection(**{"steps": 4, "batch_size": 8, "device": "cpu", **settings}),
                seed=seed,
                order_seed=order_seed,
                on_eval=on_eval or (lambda step, metrics: None),
            )
        finally:
            model.delete_adapter("default")


def workplace(folder: Path, cache: Path, section: DataSection, task: str) -> Workplace:
    raw = read_data(section, task)  # type: ignore[arg-type]
    base = load_base(ModelSection(path=str(folder), task=task), raw.labels or None, 0, "cpu")  # type: ignore[arg-type]
    return Workplace(base, tokenize(raw, base.tokenizer, cache))


@pytest.fixture
def classifying(bert_folder: Path, reviews: Path, tmp_path: Path) -> Workplace:
    return workplace(bert_folder, tmp_path, DataSection(path=str(reviews), text="text", label="label"), "SEQ_CLS")


@pytest.fixture
def tagging(bert_folder: Path, names: Path, tmp_path: Path) -> Workplace:
    return workplace(bert_folder, tmp_path, DataSection(path=str(names), tokens="tokens", tags="tags"), "TOKEN_CLS")


def questions(tmp_path: Path, **columns: str) -> DataSection:
    rows = [{"q": "Ann likes", "a": "Paris"}, {"q": "Bob likes the film", "a": "Rome Rome"}, {"q": "was", "a": "good"}]
    path = str(write_rows(tmp_path / "questions.jsonl", rows))
    return DataSection(train=path, validation=path, text="q", **columns)


@pytest.fixture
def continuing(llama_folder: Callable[[bool], Path], tmp_path: Path) -> Workplace:
    return workplace(llama_folder(True), tmp_path, questions(tmp_path), "CAUSAL_LM")


@pytest.fixture
def answering(llama_folder: Callable[[bool], Path], tmp_path: Path) -> Workplace:
    return workplace(llama_folder(True), tmp_path, questions(tmp_path, target="a"), "CAUSAL_LM")


@pytest.fixture
def translating(t5_folder: Path, tmp_path: Path) -> Workplace:
    return workplace(t5_folder, tmp_path, questions(tmp_path, target="a"), "SEQ_2_SEQ_LM")


KINDS = ["classifying", "tagging", "continuing", "answering", "translating"]
SETTINGS = TrainingSection(steps=1, eval_batch_size=5)


# ---------------------------------------------------------------- training


def test_same_seeds_give_the_same_losses_to_the_bit(classifying: Workplace) -> None:
    def losses(seed: int, order_seed: int) -> list[float]:
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.3)
        return classifying.train(config, seed, order_seed).losses

    assert losses(1, 1) == losses(1, 1)
    assert losses(1, 1) != losses(2, 1)
    assert losses(1, 1) != losses(1, 2)


def test_the_process_random_numbers_do_not_matter_and_are_left_alone(classifying: Workplace) -> None:
    model = classifying.adapted()
    state = torch.get_rng_state()
    train(model, classifying.base, classifying.data, SETTINGS, seed=0, order_seed=0, on_eval=lambda *_: None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]),
        IA3Config(task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
        TrainableTokensConfig(task_type="SEQ_CLS", token_indices=[5, 6], modules_to_save=["classifier"]),
    ],
    ids=lambda config: config.peft_type,
)
def test_it_learns_and_the_base_stays(classifying: Workplace, config: Any) -> None:
    before = {name: tensor.clone() for name, tensor in classifying.base.model.state_dict().items()}
    result = classifying.train(config, steps=60, learning_rate=5e-2, eval_every=60)
    assert result.metrics["accuracy"] == 1.0
    assert result.losses[-1] < 0.3 < result.losses[0]
    after = classifying.base.model.state_dict()
    assert list(after) == list(before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_lowers_its_loss(kind: str, request: pytest.FixtureRequest) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    result = request.getfixturevalue(kind).train(
        steps=30, eval_every=10, learning_rate=2e-2, on_eval=lambda step, metrics: seen.append((step, metrics))
    )
    assert [step for step, _ in seen] == [10, 20, 30]
    assert seen[-1][1]["loss"] < seen[0][1]["loss"]
    assert result.metrics == seen[-1][1]
    known = METRICS[request.getfixturevalue(kind).base.task]
    for name, best in result.best.items():
        assert best == (max if known[name] == "maximize" else min)(metrics[name] for _, metrics in seen)


def test_steps_follow_the_schedule(classifying: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    classifying.train(steps=5, warmup=0.4, learning_rate=1.0)
    assert rates == pytest.approx([0, 1 / 2, 1, 2 / 3, 1 / 3])
    rates.clear()
    classifying.train(steps=3, warmup=0, schedule="constant", learning_rate=0.5)
    assert rates == [0.5, 0.5, 0.5]


def test_gradients_are_clipped_and_weight_decay_is_passed(
    classifying: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, decays = [], []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        decays.append(self.param_groups[0]["weight_decay"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    classifying.train(steps=2, max_grad_norm=1e-3, weight_decay=0.25)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert decays == [0.25, 0.25]


def test_base_dropout_is_off_and_the_adapter_s_is_on(classifying: Workplace) -> None:
    batch = collate(classifying.data.train, range(8))

    def two_passes_equal(lora_dropout: float, base_dropout: bool) -> bool:
        config = LoraConfig(
            task_type="SEQ_CLS", target_modules=["query"], lora_dropout=lora_dropout, init_lora_weights=False
        )
        model = classifying.adapted(config)
        training_mode(model, base_dropout)
        first, second = model(**batch).logits, model(**batch).logits
        model.unload()
        return torch.equal(first, second)

    assert classifying.base.model.config.hidden_dropout_prob == 0.1
    assert two_passes_equal(lora_dropout=0.0, base_dropout=False)
    assert not two_passes_equal(lora_dropout=0.5, base_dropout=False)
    assert not two_passes_equal(lora_dropout=0.0, base_dropout=True)


def test_evaluation_between_steps_does_not_change_training(classifying: Workplace) -> None:
    config = lambda: LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.3)  # noqa: E731
    assert classifying.train(config(), eval_every=1).losses == classifying.train(config(), eval_every=4).losses


def test_half_precision_base_trains_float32_adapters(bert_folder: Path, reviews: Path, tmp_path: Path) -> None:
    raw = read_data(DataSection(path=str(reviews), text="text", label="label"), "SEQ_CLS")
    base = load_base(ModelSection(path=str(bert_folder), task="SEQ_CLS", dtype="bfloat16"), raw.labels, 0, "cpu")
    place = Workplace(base, tokenize(raw, base.tokenizer, tmp_path))
    model = place.adapted()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    model.unload()
    assert place.train(steps=60, learning_rate=5e-2).metrics["accuracy"] == 1.0


def test_counts_tokens_and_measures_phases(classifying: Workplace) -> None:
    result = classifying.train(steps=5, batch_size=8)  # 5 batches of 8 of 40 rows: each row once
    assert result.tokens == sum(len(row) for row in classifying.data.train.features["input_ids"])
    assert set(result.meter.metrics) == {
        f"{what}/{phase}" for what in ("seconds", "process_peak_growth_mib") for phase in ("train", "eval")
    }
    meter = Meter(torch.device("cpu"))
    with meter.phase("load"):
        model = classifying.adapted()
    train(
        model, classifying.base, classifying.data, SETTINGS, seed=0, order_seed=0, on_eval=lambda *_: None, meter=meter
    )
    assert {"seconds/load", "seconds/train"} < set(meter.metrics)


# ---------------------------------------------------------------- what stops a trial


class Pruned(Exception):
    pass


def test_pruning_passes_through_and_leaves_no_gradients(classifying: Workplace) -> None:
    def prune(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise Pruned

    model, steps = classifying.adapted(), []
    with pytest.raises(Pruned):
        train(
            model,
            classifying.base,
            classifying.data,
            TrainingSection(steps=4, eval_every=1),
            seed=0,
            order_seed=0,
            on_eval=prune,
            on_step=lambda step, loss: steps.append((step, loss)),
        )
    assert [step for step, _ in steps] == [1, 2]
    assert all(p.grad is None for p in model.parameters())


def test_divergence_names_the_step_and_the_remedy(classifying: Workplace) -> None:
    with pytest.raises(Diverged, match=r"at step \d+ of 20 with learning rate 1e\+30; try a lower learning_rate"):
        classifying.train(steps=20, learning_rate=1e30, warmup=0)


def test_a_broken_last_step_is_seen_in_validation(classifying: Workplace) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    with pytest.raises(Diverged, match=r"validation loss became \w+ at step 1 of 1"):
        classifying.train(config, steps=1, learning_rate=1e30, warmup=0)


def test_out_of_memory_releases_everything(classifying: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = classifying.adapted(), []

    def greedy(parameters: Any, limit: float) -> None:
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore lines")

    class Watched(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            held.append(weakref.ref(self))

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", greedy)
    with pytest.raises(OutOfMemory, match=r"smaller eval_batch_size .*Tried to allocate 3 GiB") as caught:
        train(model, classifying.base, classifying.data, SETTINGS, seed=0, order_seed=0, on_eval=lambda *_: None)
    assert [reference() for reference in held] == [None, None], "the error must not keep the loop's frames alive"
    assert caught.value.__context__ is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**60)], ids=["torch", "python"])
def test_memory_of_the_machine_can_run_out(classifying: Workplace, allocate: Callable[[], Any]) -> None:
    with pytest.raises(OutOfMemory):
        classifying.train(on_eval=lambda *_: allocate())


def test_other_errors_pass_through(classifying: Workplace) -> None:
    def fail(step: int, metrics: dict[str, float]) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        classifying.train(on_eval=fail)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_the_task_and_do_not_depend_on_the_batch(
    kind: str, request: pytest.FixtureRequest
) -> None:
    place: Workplace = request.getfixturevalue(kind)
    model = place.adapted()
    whole, alone = (
        evaluate(model, place.base, place.data.validation, TrainingSection(steps=1, eval_batch_size=n)).metrics
        for n in (64, 1)
    )
    expected = set(METRICS[place.base.task]) - ({"exact_match", "chrf"} if kind == "continuing" else set())
    assert set(whole) == expected
    assert whole == pytest.approx(alone, rel=1e-4)
    assert not model.training


def test_loss_is_the_mean_over_tokens_not_over_batches(tagging: Workplace) -> None:
    model, split = tagging.adapted(), tagging.data.validation
    model.eval()
    total, count = 0.0, 0
    for i in range(len(split)):
        batch = collate(split, [i])
        n = int((batch["labels"] >= 0).sum())
        total, count = total + model(**batch).loss.item() * n, count + n
    metrics = evaluate(model, tagging.base, split, TrainingSection(steps=1, eval_batch_size=2)).metrics
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["classifying", "continuing", "answering", "translating"])
def test_loss_is_that_of_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    place: Workplace = request.getfixturevalue(kind)
    model, split = place.adapted(), place.data.validation
    metrics = evaluate(model, place.base, split, TrainingSection(steps=1, eval_batch_size=64)).metrics
    assert metrics["loss"] == pytest.approx(model(**collate(split, range(len(split)))).loss.item(), rel=1e-5)
    if "perplexity" in metrics:
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_predictions_are_in_the_order_of_the_rows(classifying: Workplace, tagging: Workplace) -> None:
    place = classifying
    model, split = place.adapted(), place.data.validation
    measured = evaluate(model, place.base, split, SETTINGS)
    metrics, predicted = measured.metrics, measured.predicted
    logits = model(**collate(split, range(len(split)))).logits
    assert predicted == [place.base.labels[i] for i in logits.argmax(-1).tolist()]
    assert metrics["accuracy"] == sum(p == ("yes" if i % 2 else "no") for i, p in enumerate(predicted)) / len(split)
    tags = evaluate(tagging.adapted(), tagging.base, tagging.data.validation, SETTINGS).predicted
    assert [len(row) for row in tags] == [3, 4, 3]
    assert {tag for row in tags for tag in row} <= set(tagging.data.labels)


@pytest.mark.parametrize("kind", ["answering", "translating"])
def test_learnt_answers_are_produced(kind: str, request: pytest.FixtureRequest) -> None:
    place: Workplace = request.getfixturevalue(kind)
    module = "lm_head" if kind == "answering" else "wo"
    config = LoraConfig(task_type=place.base.task, r=16, target_modules="all-linear", modules_to_save=[module])
    model = place.adapted(config)
    settings = TrainingSection(steps=200, eval_every=200, learning_rate=1e-2, batch_size=3)
    result = train(model, place.base, place.data, settings, seed=0, order_seed=0, on_eval=lambda *_: None)
    assert result.metrics["exact_match"] == 1.0
    assert result.metrics["chrf"] == pytest.approx(100)
    texts = evaluate(model, place.base, place.data.validation, SETTINGS).predicted
    assert texts == ["Paris", "Rome Rome", "good"]


def test_plain_text_predicts_the_loss_of_each_row(continuing: Workplace) -> None:
    model, split = continuing.adapted(), continuing.data.validation
    losses = evaluate(model, continuing.base, split, SETTINGS).predicted
    for i, loss in enumerate(losses):
        assert loss == pytest.approx(model(**collate(split, [i])).loss.item(), rel=1e-5)


def test_new_tokens_train_and_the_base_is_whole_again(answering: Workplace, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in answering.base.model.state_dict().items()}
    raw = read_data(questions(tmp_path, target="a"), "CAUSAL_LM")
    with answering.base.vocabulary(["likes the"]) as base:
        data = tokenize(raw, base.tokenizer, tmp_path)
        new = base.tokenizer.convert_tokens_to_ids("likes the")
        assert any(new in row for row in data.train.features["input_ids"])
        model = Workplace(base, data).adapted(TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[new, 5]))
        result = train(model, base, data, TrainingSection(steps=5), seed=0, order_seed=0, on_eval=lambda *_: None)
        assert result.losses[-1] < result.losses[0]
        model.unload()
    after = answering.base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_loop_names_are_those_of_transformers() -> None:
    assert set(loop.SCHEDULES) == set(TrainingSection.model_fields["schedule"].annotation.__args__)  # type: ignore[union-attr]
