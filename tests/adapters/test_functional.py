"""Adapters in plain models: the functions for other libraries do what peft's do, and files go either way."""

from __future__ import annotations

from typing import Any

import peft
import peft.functional
import pytest
import torch
from torch import Tensor, nn

import workbench.adapters as ours
from workbench.adapters import functional, inject_adapter_in_model
from workbench.adapters.tuner_layer import TunerLayer
from workbench.errors import AdapterNameError, ConfigError, MismatchError

from .models import gpt2, inputs, llama_untied, output

LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}


def injected(**more: Any) -> nn.Module:
    return inject_adapter_in_model(ours.LoraConfig(**LORA | more), llama_untied())


def logits(model: nn.Module) -> Tensor:
    return output(model, inputs(llama_untied))


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("ours_config", "theirs_config", "options"),
    [
        (ours.LoraConfig, peft.LoraConfig, LORA),
        (ours.LoraConfig, peft.LoraConfig, LORA | {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}),
        (ours.IA3Config, peft.IA3Config, {}),
        (ours.LoKrConfig, peft.LoKrConfig, {"target_modules": ["q_proj"], "r": 2}),
    ],
)
def test_an_injected_adapter_has_peft_s_keys_and_loads_its_tensors(
    ours_config: Any, theirs_config: Any, options: dict[str, Any]
) -> None:
    model, other = llama_untied(), llama_untied()
    assert inject_adapter_in_model(ours_config(**options), model) is model
    peft.inject_adapter_in_model(theirs_config(**options), other)
    tensors = {k: torch.randn_like(v) for k, v in peft.get_peft_model_state_dict(other).items()}
    assert shapes(ours.get_peft_model_state_dict(model)) == shapes(tensors)
    result = ours.set_peft_model_state_dict(model, tensors)
    peft.set_peft_model_state_dict(other, tensors)
    assert not result.unexpected_keys
    assert not result.missing_keys
    torch.testing.assert_close(logits(model), logits(other))


def test_a_file_of_a_peft_model_loads_into_a_plain_model() -> None:
    wrapped, model = ours.get_peft_model(llama_untied(), ours.LoraConfig(**LORA)), injected()
    ours.set_peft_model_state_dict(model, ours.get_peft_model_state_dict(wrapped))
    assert torch.equal(logits(model), logits(wrapped))


def test_a_second_adapter_becomes_active_and_the_first_goes_on_training() -> None:
    model = injected()
    first = logits(model)
    inject_adapter_in_model(ours.LoraConfig(**LORA | {"target_modules": ["k_proj"]}), model, "other")
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("other",)}
    assert all(p.requires_grad for layer in layers for p in layer.adapters.parameters())
    assert list(model.peft_config) == ["default", "other"]  # type: ignore[arg-type]
    functional.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    assert functional.delete_adapter(model, "other") == ["default"]
    with pytest.raises(AdapterNameError):
        functional.set_adapter(model, "other")
    inject_adapter_in_model(ours.LoraConfig(**LORA), model, "other")  # its name is free again


def test_training_can_be_switched_on_and_off() -> None:
    model = injected()
    for trains in (False, True):
        functional.set_requires_grad(model, ["default"], trains)
        assert {p.requires_grad for n, p in model.named_parameters() if "lora" in n} == {trains}


def test_half_precision_becomes_float32() -> None:
    model = inject_adapter_in_model(ours.LoraConfig(**LORA), llama_untied().bfloat16())
    model.bfloat16()
    functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "default")
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}


def test_a_checkpoint_says_which_modules_to_adapt() -> None:
    tensors = ours.get_peft_model_state_dict(injected(target_modules=r".*\.0\.self_attn\.(k|v)_proj"))
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(
            ours.LoraConfig(**LORA), llama_untied(), state_dict=tensors, low_cpu_mem_usage=True
        )
    assert shapes(ours.get_peft_model_state_dict(model)) == shapes(tensors)
    ours.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())


def test_tensors_of_another_shape_are_refused_or_left_out() -> None:
    model, tensors = injected(), ours.get_peft_model_state_dict(injected(r=3))
    with pytest.raises(MismatchError, match="size mismatch"):
        ours.set_peft_model_state_dict(model, tensors)
    with pytest.raises(RuntimeError):  # as torch and peft raise
        ours.set_peft_model_state_dict(model, tensors)
    before = shapes(ours.get_peft_model_state_dict(model))
    with pytest.warns(UserWarning, match="size mismatch"):
        ours.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    assert shapes(ours.get_peft_model_state_dict(model)) == before


def test_prompts_are_not_injected_and_a_refusal_leaves_nothing() -> None:
    model = llama_untied()
    with pytest.raises(ConfigError, match="prompt"):
        inject_adapter_in_model(ours.PromptTuningConfig(num_virtual_tokens=2), model)
    with pytest.raises(ConfigError):
        inject_adapter_in_model(ours.LoraConfig(target_modules=["nothing"]), model)
    assert not hasattr(model, "peft_config")
    assert not any(isinstance(module, TunerLayer) for module in model.modules())


@pytest.mark.parametrize("make", [llama_untied, gpt2])
def test_the_base_s_own_weights_come_out_and_go_in_by_their_own_names(make: Any) -> None:
    before = {key: tensor.clone() for key, tensor in make().state_dict().items()}
    config: dict[str, Any] = {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    model = ours.get_peft_model(make(), ours.LoraConfig(**config, trainable_token_indices=[2]))
    tensors = ours.get_base_model_state_dict(model)
    assert list(tensors) == list(before)
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    result = ours.set_base_model_state_dict(model, {key: tensor + 1 for key, tensor in before.items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, tensor in ours.get_base_model_state_dict(model).items():
        assert torch.equal(tensor, before[key] + 1), key
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.set_base_model_state_dict(model, before | {"more": torch.zeros(1)})
    first = next(iter(before))
    result = ours.set_base_model_state_dict(model, {first: before[first]}, strict=False)
    assert result.missing_keys == [key for key in before if key != first]
