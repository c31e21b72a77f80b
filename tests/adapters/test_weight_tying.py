"""`ensure_weight_tying`: layers that share a weight share their adapter; peft is the oracle of outputs and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from workbench import adapters

from . import models
from .models import inputs, output
from .test_conformance import exactly, far, keyed, same

pytestmark = pytest.mark.filterwarnings("ignore")

BASES = {"llama": (models.llama_tied, "lm_head"), "t5": (models.t5, "lm_head")}


def build(library: Any, base: str, **options: Any) -> Any:
    return library.get_peft_model(BASES[base][0](), library.LoraConfig(r=4, ensure_weight_tying=True, **options)).eval()


def run(model: Any, base: str) -> Any:
    with torch.no_grad():
        return output(model, inputs(BASES[base][0]))


every_role = pytest.mark.parametrize("role", ["target_modules", "modules_to_save"])


def options_of(base: str, role: str) -> dict[str, Any]:
    options: dict[str, Any] = {"target_modules": ["v_proj" if base == "llama" else "v"]}
    options[role] = [*options.get(role, []), BASES[base][1]]
    return options


@every_role
def test_as_in_peft(role: str, tmp_path: Path) -> None:
    ours, theirs = (
        build(adapters, "llama", **options_of("llama", role)),
        build(peft, "llama", **options_of("llama", role)),
    )
    draw = torch.Generator().manual_seed(3)
    drawn = {
        key: value + (0 if "base_layer" in key else 0.2) * torch.randn(value.shape, generator=draw)
        for key, value in keyed(peft, theirs).items()
    }
    peft.set_peft_model_state_dict(theirs, drawn)
    values = keyed(peft, theirs)  # after tied parameters overwrote each other
    assert not adapters.set_peft_model_state_dict(ours, values).unexpected_keys
    expected = run(theirs, "llama")
    same(run(ours, "llama"), expected)
    assert far(expected, run(models.llama_tied(), "llama"))

    ours.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    extra = {key for key in written if key.endswith(".base_layer.weight")}  # the embedding itself, frozen
    assert written.keys() - extra == values.keys() - extra
    for key, value in values.items():
        exactly(written[key], value)
    for library in (adapters, peft):
        same(run(library.PeftModel.from_pretrained(models.llama_tied(), tmp_path).eval(), "llama"), expected)


@every_role
@pytest.mark.parametrize("base", BASES)
def test_files_and_merging(base: str, role: str, tmp_path: Path) -> None:
    """Also in an encoder-decoder, where peft leaves the encoder's embedding out or fails."""
    make = BASES[base][0]
    ours = build(adapters, base, **options_of(base, role))
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.2)
    expected = run(ours, base)
    assert far(expected, run(make(), base))
    ours.save_pretrained(tmp_path)
    same(run(adapters.PeftModel.from_pretrained(make(), tmp_path), base), expected)
    ours.merge_adapter()
    same(run(ours, base), expected)
    ours.unmerge_adapter()
    exactly(run(ours, base), expected)
    exactly(run(ours.unload(), base), run(make(), base))


def test_tied_parameters_are_one() -> None:
    """One step of the optimiser moves what both layers use, once, and they stay tied."""
    ours = build(adapters, "llama", target_modules=["lm_head"])
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == 2
    run_loss = output(ours.train(), inputs(models.llama_tied)).square().sum()
    run_loss.backward()
    torch.optim.AdamW(trained, lr=0.1).step()
    embedding, head = ours.get_base_model().model.embed_tokens, ours.get_base_model().lm_head
    exactly(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].T)
    exactly(head.lora_B["default"].weight, embedding.lora_embedding_A["default"].T)


def test_a_model_without_text_has_nothing_to_tie() -> None:
    """transformers' vision models raise when they are asked for their input embedding."""
    base = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))
    with pytest.raises(NotImplementedError):
        base.get_input_embeddings()
    config = adapters.LoraConfig(target_modules=["convolution"], modules_to_save=["classifier", "normalization"])
    model = adapters.get_peft_model(base, config)
    assert model(pixel_values=torch.ones(2, 3, 32, 32)).logits.requires_grad
