"""Tiny base models with random weights, one for each architecture and layer kind that the conformance table needs.

Every factory is deterministic and draws no dropout, so two calls give equal models and train mode equals eval mode.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 50
HIDDEN = 16
ROWS, LENGTH = 4, 6
TOKENS = [3, 7, 11]  # every row of the inputs holds at least one of them, so training them shows

Factory = Callable[[], nn.Module]


def tiny(make: Factory) -> Factory:
    """Build a model once, from fixed seeds, and hand out copies of it in eval mode."""

    @functools.cache
    def original() -> nn.Module:
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # libraries start biases at zero and norms at one: let each matter
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    @functools.wraps(make)
    def a_copy() -> nn.Module:
        return copy.deepcopy(original())

    return a_copy


def _bert_config() -> BertConfig:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 3
    return config


@tiny
def bert_classifier() -> nn.Module:
    return BertForSequenceClassification(_bert_config())


@tiny
def bert_tagger() -> nn.Module:
    return BertForTokenClassification(_bert_config())


@tiny
def gpt2() -> nn.Module:
    """Conv1D layers and tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=HIDDEN,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(tied: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@tiny
def llama_tied() -> nn.Module:
    return _llama(tied=True)


@tiny
def llama_untied() -> nn.Module:
    return _llama(tied=False)


@tiny
def mistral() -> nn.Module:
    """Attention in which two heads share keys and values."""
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return MistralForCausalLM(config)


@tiny
def gemma2() -> nn.Module:
    """Norms before and after each block, and soft-capped logits."""
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


def _gemma3(tied: bool) -> nn.Module:
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return Gemma3ForCausalLM(config)


@tiny
def gemma3_tied() -> nn.Module:
    """Its embedding multiplies what it looks up by the square root of the width."""
    return _gemma3(tied=True)


@tiny
def gemma3_untied() -> nn.Module:
    return _gemma3(tied=False)


def _t5(layers: int) -> nn.Module:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=24,
        num_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


@tiny
def t5() -> nn.Module:
    return _t5(layers=1)


@tiny
def t5_deep() -> nn.Module:
    return _t5(layers=3)


@tiny
def opt() -> nn.Module:
    """Linear layers with biases in a causal language model."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        word_embed_proj_dim=HIDDEN,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return OPTForCausalLM(config)


@tiny
def vit() -> nn.Module:
    """A transformer on images of 8 by 8."""
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 3
    return ViTForImageClassification(config)


class ConvNet(nn.Module):
    """Two convolutions, one of them padded, one strided, and a linear head."""

    def __init__(self, conv: Any, **first: Any) -> None:
        super().__init__()
        self.conv1 = conv(3, 10, kernel_size=3, padding=1, **first)
        self.conv2 = conv(10, 6, kernel_size=3, stride=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (rows, 3, *size) -> logits (rows, 3)."""
        hidden = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(hidden.flatten(2).mean(dim=2))


class Mlp(nn.Module):
    """A model of one's own: no `config`, an embedding that is not called embed_tokens, layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)])
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids (rows, length) -> logits (rows, length, 3)."""
        hidden = self.emb(x)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


@tiny
def conv_net() -> nn.Module:
    return ConvNet(nn.Conv2d)


@tiny
def conv1d_net() -> nn.Module:
    return ConvNet(nn.Conv1d)


@tiny
def conv3d_net() -> nn.Module:
    return ConvNet(nn.Conv3d)


@tiny
def conv_groups() -> nn.Module:
    """A dilated convolution, and one with groups."""
    model = ConvNet(nn.Conv2d, dilation=2)
    model.conv2 = nn.Conv2d(10, 6, kernel_size=3, groups=2)
    return model


CONV_NETS: dict[Factory, int] = {conv1d_net: 1, conv_net: 2, conv_groups: 2, conv3d_net: 3}  # dimensions of the input


@tiny
def mlp() -> nn.Module:
    return Mlp()


class Experts(nn.Module):
    """A mixture of experts whose weights are bare parameters: `up` (experts, out, in) and `down`, 2-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(HIDDEN, 20) / 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Hidden states (rows, length, width) -> the same, and nothing besides, as a tuple."""
        return torch.tanh(torch.einsum("rlh,eoh->rlo", x, self.up)) @ self.down.T, None


class Parts(nn.Module):
    """Layers of kinds that say little of themselves: attention, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.experts = Experts()
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids (rows, length) -> logits (rows, length, 3)."""
        hidden = self.emb(x)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(hidden + self.experts(hidden)[0])


@tiny
def parts() -> nn.Module:
    return Parts()


def inputs(factory: Factory) -> dict[str, Any]:
    """Arguments of one forward call, equal at every call: ids (rows, length) or images (rows, 3, 8[, 8[, 8]])."""
    draw = torch.Generator().manual_seed(2)
    if factory is vit:
        return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=draw)}
    if factory in CONV_NETS:
        return {"x": torch.randn(ROWS, 3, *[8] * CONV_NETS[factory], generator=draw)}
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=draw)
    for row in range(ROWS):
        ids[row, row] = TOKENS[row % len(TOKENS)]
    if factory in (mlp, parts):
        return {"x": ids}
    ids[0, -1] = 0  # a padding token, where embeddings with a padding_idx differ from those without
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if factory in (t5, t5_deep):
        given["decoder_input_ids"] = ids.roll(1, dims=1)
    return given


def output(model: nn.Module, given: dict[str, Any], **more: Any) -> torch.Tensor:
    """The logits of one forward call, whatever kind of model it is."""
    result = model(**given, **more)
    return result if isinstance(result, torch.Tensor) else result.logits
