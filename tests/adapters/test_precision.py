"""Which numbers parameters are kept in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import workbench.adapters as ours
from workbench.adapters.empty import init_empty_weights, skip_init_on_device

from .models import llama_untied


@pytest.mark.parametrize(("quantiser", "dtype"), [(None, torch.float32), ("gptq", torch.float16)])
def test_a_quantised_base_is_frozen_and_what_is_not_quantised_becomes_float32(quantiser: Any, dtype: Any) -> None:
    model: Any = llama_untied().half()
    model.is_loaded_in_8bit, model.quantization_method = True, quantiser
    assert ours.prepare_model_for_kbit_training(model) is model
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, False)}
    assert model.is_gradient_checkpointing
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_a_plain_base_keeps_its_activations() -> None:
    model: Any = ours.prepare_model_for_kbit_training(llama_untied())
    assert not model.is_gradient_checkpointing


def test_frozen_parameters_become_half_and_trained_ones_float32() -> None:
    model = ours.get_peft_model(llama_untied(), ours.LoraConfig(target_modules=["q_proj"]))
    ours.cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {
        (torch.bfloat16, False),
        (torch.float32, True),
    }


def test_modules_without_memory() -> None:
    def linear() -> nn.Module:
        return nn.Linear(2, 2)

    with init_empty_weights():
        assert linear().weight.is_meta
        assert not skip_init_on_device(linear)().weight.is_meta
        assert linear().weight.is_meta
    assert not linear().weight.is_meta
