"""`PeftMixedModel`: adapters of different methods on one model, with peft's as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from workbench import adapters
from workbench.adapters import METHODS, PeftMixedModel
from workbench.errors import AdapterNameError, ConfigError, MergeError

from . import models
from .models import inputs, output

pytestmark = pytest.mark.filterwarnings("ignore")

# configurations that mix, on one model; some layers have several of them, others one
ON_MLP: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["layers.0", "layers.1"], "r": 4, "lora_alpha": 3},
    "adalora": {"target_modules": ["layers.0", "head"], "init_r": 4, "total_step": 10},
    "loha": {"target_modules": ["layers.0", "layers.1"], "r": 2},
    "lokr": {"target_modules": ["layers.1", "head"], "r": 2},
}
PAIRS = [("lora", "loha"), ("loha", "lora"), ("lora", "lokr"), ("adalora", "lokr"), ("lora", "adalora")]
BEYOND = {"ia3": {"target_modules": ["layers.0", "layers.1"], "feedforward_modules": ["layers.1"]}}  # not in peft's

mixing = pytest.mark.parametrize("methods", PAIRS, ids="+".join)


def config(library: Any, method: str) -> Any:
    ours = METHODS[method].config
    of = ours if library is adapters else peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(ours.peft_type)]
    return of(**(ON_MLP | BEYOND)[method])


def saved_by_peft(method: str, folder: Path) -> Path:
    """An adapter with random values, in peft's file."""
    torch.manual_seed(len(method))
    model = peft.get_peft_model(models.mlp(), config(peft, method))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder / method)
    return folder / method


def loaded(library: Any, methods: tuple[str, ...], folder: Path) -> Any:
    """A mixed model with saved adapters, named after their methods; the first is active."""
    first, *others = methods
    model = library.PeftMixedModel.from_pretrained(models.mlp(), folder / first, first)
    for method in others:
        model.load_adapter(folder / method, method)
    return model.eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model, inputs(models.mlp))


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@mixing
def test_answers_as_peft_s(methods: tuple[str, str], tmp_path: Path) -> None:
    """Each adapter alone, both in either order, none, merged, and one of them after the other is deleted."""
    for method in methods:
        saved_by_peft(method, tmp_path)
    ours, theirs = loaded(adapters, methods, tmp_path), loaded(peft, methods, tmp_path)
    assert ours.active_adapters == theirs.active_adapters == [methods[0]]
    outputs = []
    for active in ([methods[0]], [methods[1]], list(methods), list(methods)[::-1]):
        for model in (ours, theirs):
            model.set_adapter(active)
        same(run(ours), run(theirs))
        outputs.append(run(ours))
        with ours.disable_adapter():
            same(run(ours), run(models.mlp()))
    assert not any(torch.allclose(outputs[2], other, atol=1e-3) for other in outputs[:2])
    ours.base_model.merge_adapter()
    same(run(ours), outputs[3])
    ours.base_model.unmerge_adapter()
    ours.delete_adapter(methods[1])
    theirs.delete_adapter(methods[1])
    assert ours.active_adapters == theirs.active_adapters == [methods[0]]
    same(run(ours), run(theirs))
    ours.delete_adapter(methods[0])
    assert torch.equal(run(ours), run(models.mlp()))


def test_each_is_saved_as_if_it_were_alone(tmp_path: Path) -> None:
    """Peft reads what a mixed model writes."""
    for method in ("lora", "loha"):
        saved_by_peft(method, tmp_path)
    mixed = loaded(adapters, ("lora", "loha"), tmp_path)
    mixed.save_pretrained(tmp_path / "mixed")
    for method in ("lora", "loha"):
        alone = peft.PeftModel.from_pretrained(models.mlp(), tmp_path / "mixed" / method)
        mixed.set_adapter(method)
        same(run(mixed), run(alone))


@pytest.mark.parametrize("order", [("ia3", "lora"), ("lora", "ia3")], ids="+".join)
def test_methods_that_do_not_commute_merge_to_what_they_give(order: tuple[str, str]) -> None:
    model = adapters.get_peft_model(models.mlp(), config(adapters, "lora"), "lora", mixed=True)
    model.add_adapter("ia3", config(adapters, "ia3"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    model.eval().set_adapter(list(order)[::-1])
    other = run(model)
    model.set_adapter(list(order))
    expected = run(model)
    assert not torch.allclose(expected, other, atol=1e-3)
    same(run(model.merge_and_unload()), expected)


def test_both_train() -> None:
    """A head trains only where a configuration names it."""
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    model = adapters.get_peft_model(models.bert_classifier(), adapters.LoraConfig(**options), "a", mixed=True)
    assert type(model) is PeftMixedModel
    model.add_adapter("b", adapters.LoHaConfig(**options))
    model.set_adapter(["a", "b"])
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part for name in trains for part in name.split(".")} >= {"a", "b"}
    assert not any("classifier" in name for name in trains)
    output(model, inputs(models.bert_classifier)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def two() -> Any:
    model = adapters.get_peft_model(models.mlp(), config(adapters, "lora"), "a", mixed=True)
    model.add_adapter("b", config(adapters, "loha"))
    return model


def merge_and_delete(model: Any) -> None:
    model.merge_adapter(["b"])
    model.delete_adapter(["a", "b"])


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (lambda m: m.add_adapter("c", adapters.PrefixTuningConfig()), ConfigError, "PREFIX_TUNING.*not compatible"),
        (lambda m: m.set_adapter(["a", "c"]), AdapterNameError, r"\['c'\] not found, available adapters: \['a', 'b'\]"),
        (lambda m: m.delete_adapter(["a", "c"]), AdapterNameError, "c does not exist"),
        (merge_and_delete, MergeError, r"\['b'\] while they are merged"),
        (lambda m: m.get_layer_status(), TypeError, "not supported for PeftMixedModel"),
        (lambda m: m.get_model_status(), TypeError, "not supported for PeftMixedModel"),
    ],
    ids=["prompt", "unknown", "unknown-deleted", "merged", "layer-status", "model-status"],
)
def test_refusals_change_nothing(wrong: Callable[[Any], Any], error: type[Exception], says: str) -> None:
    model = two()
    with pytest.raises(error, match=says):
        wrong(model)
    assert list(model.peft_config) == ["a", "b"]
    assert model.active_adapters == ["a"]


def test_other_models_refuse_other_methods() -> None:
    model = adapters.get_peft_model(models.mlp(), config(adapters, "lora"))
    with pytest.raises(ConfigError, match=r"different peft types.*mixed=True"):
        model.add_adapter("b", config(adapters, "loha"))
    model.set_adapter("default")
    model = adapters.get_peft_model(models.mlp(), config(adapters, "adalora"))
    with pytest.raises(ConfigError, match="only 1 trainable"):
        model.add_adapter("b", config(adapters, "adalora"))
