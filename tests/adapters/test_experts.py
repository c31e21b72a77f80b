"""Layers of experts that transformers 5 keeps as parameters are targets by their old names, as in peft."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import workbench.adapters as ours
from workbench.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=4, num_experts=3, num_experts_per_tok=2, head_dim=4)
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen, "all-linear"),
        (qwen, r".*\.(q_proj|gate_proj|up_proj|down_proj)"),
        (qwen, ["gate_proj", "mlp.experts.up_proj", "q_proj"]),
        (qwen, r".*\.q_proj"),
        (mixtral, ["w1", "w2", "w3", "gate", "v_proj"]),
        (mixtral, ["w2"]),
    ],
)
def test_the_configuration_and_the_keys_are_peft_s(make: Any, targets: Any) -> None:
    model, other = (
        library.get_peft_model(make(), library.LoraConfig(target_modules=targets, r=2)) for library in (ours, peft)
    )
    config, theirs = model.peft_config["default"], other.peft_config["default"]
    assert config.target_modules == theirs.target_modules
    assert set(config.target_parameters or ()) == set(theirs.target_parameters)
    assert (config.rank_pattern, config.alpha_pattern) == (theirs.rank_pattern, theirs.alpha_pattern)
    tensors, wanted = ours.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(other)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in wanted.items()}


def test_a_saved_adapter_loads_again(tmp_path: Any) -> None:
    base = qwen().eval()
    state, ids = base.state_dict(), torch.arange(10)[None]
    model = ours.get_peft_model(base, ours.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    fresh = qwen().eval()
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}, strict=False)
    ours.set_base_model_state_dict(model, fresh.state_dict())
    loaded = ours.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], r".*\.up_proj"])
def test_half_of_a_fused_parameter_is_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match="up_proj without also targeting gate_proj"):
        ours.get_peft_model(qwen(), ours.LoraConfig(target_modules=targets))
