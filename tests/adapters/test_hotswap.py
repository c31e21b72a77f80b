"""Swapping one LoRA adapter's weights for another's, and scaling an adapter's update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import workbench.adapters as ours
from workbench.adapters.helpers import check_if_peft_model, no_split_modules, rescale_adapter_scale
from workbench.adapters.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from workbench.adapters.layer_types import LoraLayer
from workbench.errors import AdapterError, ConfigError, MergeError, MismatchError

from .models import conv_groups, inputs, llama_untied, mlp, output

TARGETS: dict[Any, list[str]] = {
    mlp: ["emb", "head"],
    conv_groups: ["conv1", "conv2"],
    llama_untied: ["embed_tokens", "q_proj"],
}


def adapted(make: Any, r: int, **more: Any) -> Any:
    config = {"target_modules": TARGETS[make], "r": r, "lora_alpha": 3, "init_lora_weights": False}
    return ours.get_peft_model(make(), ours.LoraConfig(**config | more)).eval()  # type: ignore[arg-type]


def answer(model: Any, make: Any) -> torch.Tensor:
    with torch.no_grad():
        return output(model, inputs(make)).clone()


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("make", [mlp, conv_groups, llama_untied])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_a_swapped_adapter_answers_as_if_loaded(
    make: Any, prepared: bool, first: int, second: int, tmp_path: Path
) -> None:
    model, other = adapted(make, first), adapted(make, second)
    before, wanted = answer(model, make), answer(other, make)
    model.save_pretrained(tmp_path / "first")
    other.save_pretrained(tmp_path / "second")
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        torch.testing.assert_close(answer(model, make), before)
    identities = [id(p) for p in model.parameters()]
    hotswap_adapter(model, tmp_path / "second", "default")
    torch.testing.assert_close(answer(model, make), wanted)
    hotswap_adapter(model, tmp_path / "first", "default")
    torch.testing.assert_close(answer(model, make), before)
    assert [id(p) for p in model.parameters()] == identities  # the same parameters, for whoever holds them


def test_layers_that_the_new_adapter_lacks_give_no_update(tmp_path: Path) -> None:
    model, other = adapted(mlp, 2), adapted(mlp, 2, target_modules=["head"])
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(answer(model, mlp), answer(other, mlp))
    model.save_pretrained(tmp_path)
    before = answer(other, mlp)
    with pytest.raises(MismatchError, match="unexpected keys"):
        hotswap_adapter(other, tmp_path, "default")
    assert torch.equal(answer(other, mlp), before)


def test_what_cannot_be_swapped_is_refused(tmp_path: Path) -> None:
    model = adapted(mlp, 2)
    adapted(mlp, 2, use_rslora=True).save_pretrained(tmp_path / "rslora")
    with pytest.raises(ConfigError, match="use_rslora"):
        hotswap_adapter(model, tmp_path / "rslora", "default")
    ours.get_peft_model(mlp(), ours.LoKrConfig(target_modules=["head"])).save_pretrained(tmp_path / "lokr")
    with pytest.raises(ConfigError, match="LORA and LOKR"):
        hotswap_adapter(model, tmp_path / "lokr", "default")
    model.merge_adapter()
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    with pytest.raises(MergeError):
        hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


def test_preparing_refuses_smaller_ranks_and_models_without_lora() -> None:
    with pytest.raises(ConfigError, match=r"original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(adapted(mlp, 4), target_rank=3)
    with pytest.raises(ConfigError, match="not divisible by"):
        prepare_model_for_compiled_hotswap(adapted(conv_groups, 2), target_rank=5)
    with pytest.raises(AdapterError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(mlp())


def test_scaling_multiplies_and_goes_back() -> None:
    model = adapted(mlp, 2)
    before, layers = answer(model, mlp), lora_layers(model)
    for layer in layers:
        layer.scale_layer(2)
        layer.scale_layer(3)
    assert {layer.scaling["default"] for layer in layers} == {9.0}
    for layer in layers:
        layer.unscale_layer(3)
    assert {layer.scaling["default"] for layer in layers} == {3.0}
    for layer in layers:
        layer.set_scale("default", 4)
    assert {layer.scaling["default"] for layer in layers} == {6.0}
    for layer in layers:
        layer.scaling["default"] = 7.0  # as users of peft write it
    assert not torch.allclose(answer(model, mlp), before)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(answer(model, mlp), before)


def test_rescaling_ends_with_its_context() -> None:
    model = adapted(mlp, 2)
    before = answer(model, mlp)
    with model.disable_adapter():
        base = answer(model, mlp)
    with rescale_adapter_scale(model, 0):
        assert torch.equal(answer(model, mlp), base)
    assert torch.equal(answer(model, mlp), before)
    with pytest.raises(TypeError), rescale_adapter_scale(model, "a"):  # type: ignore[arg-type]
        pass
    with pytest.raises(AdapterError), rescale_adapter_scale(mlp(), 0.5):
        pass


def test_an_adapter_is_told_from_other_folders(tmp_path: Path) -> None:
    adapted(mlp, 2).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    assert check_if_peft_model(tmp_path / "adapter")
    assert not check_if_peft_model(tmp_path)
    assert not check_if_peft_model(tmp_path / "nothing")


def test_modules_that_a_device_map_keeps_whole() -> None:
    assert no_split_modules(llama_untied()) == {"LlamaDecoderLayer"}
    assert no_split_modules(mlp()) == set()
