"""AdaLoRA beyond the conformance table: the loss's penalty, dropping triplets in training, files of what is left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench import adapters
from workbench.errors import CheckpointError, ConfigError

from .models import bert_classifier, conv_net, inputs, output

STEPS = 30
OPTIONS: dict[str, Any] = {
    "task_type": "SEQ_CLS",  # without one peft forgets the penalty
    "target_modules": ["query", "value", "dense"],
    "init_r": 6,
    "target_r": 2,
    "tinit": 5,
    "tfinal": 8,
    "deltaT": 3,
    "total_step": STEPS,
    "lora_alpha": 20,
}


def build(library: Any, base: Any = bert_classifier, **changes: Any) -> Any:
    torch.manual_seed(0)
    return library.get_peft_model(base(), library.AdaLoraConfig(**copy.deepcopy(OPTIONS | changes)))


def pair(**changes: Any) -> tuple[Any, Any]:
    """The same adapter, with the same values, in both libraries."""
    ours, theirs = build(adapters, **changes), build(peft, **changes)
    adapters.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def train(model: nn.Module, first: int = 1, last: int = STEPS) -> list[float]:
    """Steps of SGD on the model's own loss, and the losses."""
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(first, last + 1):
        loss = labelled(model, step)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def labelled(model: nn.Module, seed: int = 0) -> Tensor:
    labels = torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(seed))
    return model(**inputs(bert_classifier), labels=labels).loss


def triplets(model: Any) -> dict[str, Tensor]:
    """All parameters in memory, dropped triplets included, by path and name."""
    return {
        f"{path}.{name}": getattr(layer, name)["default"].detach().clone()
        for path, layer in model.named_modules()
        if hasattr(layer, "ranknum") and hasattr(layer, "base_layer")
        for name in ("lora_A", "lora_E", "lora_B")
    }


def pattern(model: Any) -> dict[str, list[bool]]:
    return {key.removesuffix(".default"): kept for key, kept in model.peft_config["default"].rank_pattern.items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), inputs(bert_classifier))


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_allocator_agrees_with_peft() -> None:
    """Over a whole schedule: the same losses, the same triplets dropped at every step, the same weights."""
    ours, theirs = pair()
    for step in range(1, STEPS + 1):
        assert train(ours, step, step) == pytest.approx(train(theirs, step, step), rel=1e-5)
        assert (ours.peft_config["default"].rank_pattern is None) == (step <= 5), step
        if step > 5:
            assert pattern(ours) == pattern(theirs), step
        for key, expected in triplets(theirs).items():
            same(triplets(ours)[key], expected)
    kept = pattern(ours).values()
    assert sum(map(sum, kept)) == 2 * len(kept)  # target_r on average,
    assert len(set(map(sum, kept))) > 1  # but not the same everywhere


def test_penalty() -> None:
    """It is added to the loss of a training adapter and of no other."""
    ours, theirs = pair()
    same(labelled(ours), labelled(theirs))
    without = labelled(pair(orth_reg_weight=0)[0])
    assert labelled(ours) - without > 0.1
    ours.base_model.set_requires_grad("default", False)
    same(labelled(ours), without)
    ours.base_model.set_requires_grad("default", True)
    with ours.disable_adapter():
        same(labelled(ours), labelled(bert_classifier()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_hold_what_is_left(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    ours, theirs = pair()
    train(ours), train(theirs)
    expected = logits(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, wanted = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        same(mine[key], value)
    assert sum(len(value) for key, value in mine.items() if "lora_E" in key) == 2 * len(pattern(ours))
    for who in ("ours", "theirs"):
        loaded = adapters.PeftModel.from_pretrained(
            bert_classifier(), tmp_path / who, low_cpu_mem_usage=low_cpu_mem_usage
        )
        same(logits(loaded), expected)
        same(logits(loaded.merge_and_unload()), expected)
        same(logits(peft.PeftModel.from_pretrained(bert_classifier(), tmp_path / who)), expected)


def test_a_file_can_be_saved_again_and_trained_on(tmp_path: Path) -> None:
    """Training that goes on from a file drops on from there; what was dropped before stays dropped."""
    model = build(adapters)
    train(model, last=15)
    before = sum(map(sum, pattern(model).values()))
    model.save_pretrained(tmp_path / "half")
    loaded = adapters.PeftModel.from_pretrained(bert_classifier(), tmp_path / "half", is_trainable=True)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("half", "again"))
    assert all(torch.equal(second[key], value) for key, value in first.items())
    train(loaded, first=16)
    after = pattern(loaded)
    assert sum(map(sum, after.values())) == 2 * len(after) < before
    assert all(
        old or not new for key, kept in pattern(model).items() for old, new in zip(kept, after[key], strict=True)
    )
    loaded.save_pretrained(tmp_path / "end")
    same(logits(peft.PeftModel.from_pretrained(bert_classifier(), tmp_path / "end")), logits(loaded))


def test_set_and_get_after_dropping() -> None:
    model = build(adapters)
    train(model)
    expected = logits(model)
    values = {key: value.clone() for key, value in adapters.get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    adapters.set_peft_model_state_dict(model, values)
    same(logits(model), expected)


def test_a_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    build(adapters).save_pretrained(tmp_path)
    config = adapters.AdaLoraConfig(**OPTIONS | {"init_r": 5})
    with pytest.raises(CheckpointError, match="size mismatch"):
        adapters.PeftModel.from_pretrained(bert_classifier(), tmp_path, config=config)
    with pytest.raises(ConfigError, match="init_r=6"):
        build(adapters, rank_pattern={"bert.encoder.layer.0.attention.self.query.lora_E": [True]})


def test_nothing_is_dropped_where_the_target_is_the_start() -> None:
    """peft fails here."""
    model = build(adapters, target_r=6)
    train(model)
    assert all(all(kept) for kept in pattern(model).values())


def test_a_layer_without_gradients_counts_as_unimportant() -> None:
    """The second convolution's update gets no gradient in the loss below; peft fails on it."""
    options = {"task_type": None, "init_r": 4, "tinit": 0, "tfinal": 0, "deltaT": 1, "init_lora_weights": False}
    model = build(adapters, conv_net, target_modules=["conv1", "conv2"], **options)
    for step in range(1, STEPS + 1):
        model.get_base_model().conv1(inputs(conv_net)["x"]).square().mean().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    assert {key: sum(kept) for key, kept in pattern(model).items()} == {"conv1.lora_E": 4, "conv2.lora_E": 0}


def test_one_adapter_trains() -> None:
    model = build(adapters)
    with pytest.raises(ConfigError, match="only 1 trainable adapter"):
        model.add_adapter("second", adapters.AdaLoraConfig(**OPTIONS))
    model.add_adapter("second", adapters.AdaLoraConfig(**OPTIONS, inference_mode=True))
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"total_step": None}, "total_step"),
        ({"total_step": 10, "tinit": 5, "tfinal": 5}, "tfinal"),
        ({"total_step": 10, "tinit": 10}, "tinit"),
        ({"total_step": 10, "orth_reg_weight": -1}, "orth_reg_weight"),
        ({"total_step": 10, "beta1": 1.0}, "beta1"),
        ({"total_step": 10, "deltaT": 0}, "deltaT"),
        ({"total_step": 10, "init_r": 0}, "init_r"),
        ({"total_step": 10, "use_dora": True}, "use_dora"),
    ],
)
def test_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        adapters.AdaLoraConfig(**options)
    assert refusal.value.field == field


def test_options_without_effect_are_named() -> None:
    with pytest.warns(UserWarning, match="`use_rslora` is not used"):
        adapters.AdaLoraConfig(total_step=1, use_rslora=True)
