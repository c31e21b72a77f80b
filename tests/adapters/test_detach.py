"""Several models with adapters on one base model, in turn: while they are detached the base is plain, to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench import adapters
from workbench.errors import AdapterError, ConfigError, MergeError

from . import models
from .cases import CASES, Case
from .models import inputs, output
from .test_conformance import config_of, given

pytestmark = pytest.mark.filterwarnings("ignore")


def on(base: nn.Module, case: Case, seed: int = 0) -> Any:
    """A model on the base, with random values in all that trains."""
    torch.manual_seed(seed)
    model = adapters.get_peft_model(base, config_of(adapters, case)).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state(base: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def exactly(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_models_on_one_base_in_turn(case: Case) -> None:
    base = case.base().requires_grad_(False)  # with gradients to come attention is summed in another order
    before, modules, plain = state(base), [type(m) for m in base.modules()], output(base, inputs(case.base))
    made = []
    for seed in range(2):
        model = on(base, case, seed)
        made.append((model, output(model, given(model, case)), state(model), list(trained(model))))
        model.detach()
        assert [type(m) for m in base.modules()] == modules
        assert not any(p.requires_grad for p in base.parameters())
        exactly(state(base), before)
        exactly(output(base, inputs(case.base)), plain)
        with pytest.raises(AdapterError, match="attach"):
            model(**given(model, case))
    for model, expected, values, names in [*made, *reversed(made)]:
        assert not torch.equal(expected, plain)
        model.attach()
        exactly(output(model, given(model, case)), expected)
        exactly(state(model), values)
        assert list(trained(model)) == names
        model.detach()
    first = made[0][0]
    first.attach()
    first.delete_adapter("default")
    exactly(state(base), before)
    exactly(output(base, inputs(case.base)), plain)


def test_other_methods_are_not_seen() -> None:
    """Adapters of one name, of different methods, on one base: each model has its own only, and no warning comes."""
    base: Any = models.llama_tied()
    configs = [
        adapters.LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, r=2),
        adapters.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        adapters.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ]
    made = []
    for config in configs:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.append(adapters.get_peft_model(base, config))
        made[-1].detach()
    for model, word in zip(made, ("lora_", "ia3_", "prompt_encoder"), strict=True):
        model.attach()
        assert trained(model)
        assert all(word in name for name in trained(model))
        model.detach()


def test_biases_are_the_base_s_own_again() -> None:
    """However the adapter that trained them goes."""
    config = adapters.LoraConfig(target_modules=["fc1"], bias="all")
    for leave in ("delete", "unload", "injected"):
        base: Any = models.opt()
        before = state(base)
        if leave == "injected":
            adapters.inject_adapter_in_model(config, base)
            holder = base
        else:
            holder = adapters.get_peft_model(base, config)
        biases = [p for name, p in holder.named_parameters() if name.endswith("bias") and p.requires_grad]
        assert biases
        with torch.no_grad():
            for bias in biases:
                bias.add_(1)
        if leave == "delete":
            holder.delete_adapter("default")
        elif leave == "unload":
            holder.unload()
        else:
            adapters.functional.delete_adapter(base, "default")
        exactly(state(base), before)
        assert not any(bias.requires_grad for bias in biases)


def test_training_goes_on_after_a_pause() -> None:
    """A gradient step after detaching and attaching is that of a model that was never detached."""
    results = []
    for pause in (False, True):
        base = models.bert_classifier()
        model = on(base, next(case for case in CASES if case.id == "lora-bert-pissa"))
        if pause:
            model.detach()
            on(base, next(case for case in CASES if case.id == "ia3-bert-seq-cls")).detach()
            model.attach()
        output(model, inputs(models.bert_classifier)).square().mean().backward()
        results.append({name: p.grad for name, p in trained(model).items()})
    exactly(*results)


def test_what_cannot_be_done() -> None:
    model: Any = adapters.get_peft_model(models.mlp(), adapters.LoraConfig(target_modules=["head"]))
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        model.detach()
    model.unmerge_adapter()
    model.attach()  # it is
    model.detach()
    for action in (model.detach, model.merge_adapter, model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(AdapterError, match="attach"):
            action()
    with pytest.raises(AdapterError, match="attach"):
        model.add_adapter("second", adapters.LoraConfig(target_modules=["head"]))
    replicated: Any = adapters.get_peft_model(
        models.llama_untied(), adapters.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    )
    with pytest.raises(ConfigError, match="replicated"):
        replicated.detach()
