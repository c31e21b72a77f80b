"""Files of models whose vocabulary grew hold the embeddings too: the same keys as peft's, and they load both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from workbench import adapters

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "targets": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 49]},
}


def grown(folder: Path) -> Any:
    """The saved base model, with three tokens more."""
    model = OPTForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(53, mean_resizing=False)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=16, tie_word_embeddings=False)
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grown_embeddings_are_saved_and_loaded_as_in_peft(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    files = {}
    for library in (adapters, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(grown(base), library.LoraConfig(task_type="CAUSAL_LM", **options))
        model.save_pretrained(tmp_path / library.__name__)
        files[library] = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
    assert files[adapters].keys() == files[peft].keys()
    ids = torch.arange(40, 53)[None]
    for source in files:
        outputs = []
        for library in (adapters, peft):
            torch.manual_seed(2)  # the new rows of this base are other ones
            loaded = library.PeftModel.from_pretrained(grown(base), tmp_path / source.__name__)
            outputs.append(loaded(input_ids=ids).logits)
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
