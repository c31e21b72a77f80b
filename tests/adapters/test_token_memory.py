"""Trainable tokens cost memory for the trained rows, never for the table, forward and backward."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from workbench import adapters

VOCABULARY, WIDTH, LENGTH = 4000, 64, 4  # so that logits, (1, LENGTH, VOCABULARY), are much less than the table
TABLE = VOCABULARY * WIDTH


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        sizes = [tensor.numel() for tensor in made if tensor.untyped_storage().data_ptr() not in given]
        self.numel = max([self.numel, *sizes])
        return out


def largest(library: Any, tied: bool, config: Any) -> int:
    """Numbers in the largest tensor of one step."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    model = library.get_peft_model(base, config)
    ids = torch.arange(LENGTH)[None]
    with Largest() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    grads = {tuple(p.grad.shape) for p in model.parameters() if p.grad is not None}
    assert (3, WIDTH) in grads
    return seen.numel


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("beside_lora", [False, True], ids=["alone", "with-lora"])
def test_no_tensor_has_the_size_of_the_table(tied: bool, beside_lora: bool) -> None:
    def config(library: Any) -> Any:
        if beside_lora:
            return library.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2, 9])
        return library.TrainableTokensConfig(token_indices=[1, 2, 9])

    assert largest(adapters, tied, config(adapters)) < TABLE / 4
    assert largest(peft, tied, config(peft)) >= TABLE  # so the measure sees it where it is
