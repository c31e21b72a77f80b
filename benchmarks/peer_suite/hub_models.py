"""The models and tokenizers of the local hub: architectures and, roughly, shapes of the repositories that the peer's
tests name, with random weights. Nothing is downloaded."""

from __future__ import annotations

import functools
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

Sizes = dict[str, Any]
END = "<|endoftext|>"

# ---------------------------------------------------------------- tokenizers


def sentences() -> Iterator[str]:
    """English text that every Python has: its own help."""
    for topic in pydoc_data.topics.topics.values():
        yield from (line for line in topic.splitlines() if line.strip())


@functools.cache
def trained(size: int, special: tuple[str, ...]) -> str:
    """A byte-level tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer.to_str()


def tokenizer(special: list[str], before: str = "", after: str = "", size: int = 1000, **roles: str) -> Any:
    """A tokenizer with special tokens, of which `before` and `after` go round every sentence; `roles` says what they
    are for."""
    made = Tokenizer.from_str(trained(size, tuple(special)))
    if before or after:
        round_a, round_b = (" ".join(filter(None, [before, name, after])) for name in ("$A", "$B"))
        made.post_processor = processors.TemplateProcessing(
            single=round_a,
            pair=f"{round_a} {round_b}",
            special_tokens=[(token, special.index(token)) for token in (before, after) if token],
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **roles)


def opt_tokenizer() -> Any:
    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return tokenizer(["<s>", "<pad>", "</s>", "<unk>"], before="</s>", **roles)


def gpt2_tokenizer() -> Any:
    return tokenizer([END], size=999, bos_token=END, eos_token=END, unk_token=END)


def llama_tokenizer() -> Any:
    return tokenizer(["<unk>", "<s>", "</s>"], "<s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_tokenizer() -> Any:
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tokenizer(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>", **roles)


def t5_tokenizer() -> Any:
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tokenizer(["<pad>", "</s>", "<unk>"], after="</s>", **roles)


def bert_tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return tokenizer(special, "[CLS]", "[SEP]", **roles)


def llava_processor() -> Any:
    tokens = llama_tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<pad>", "<image>"]})
    tokens.pad_token, tokens.image_token = "<pad>", "<image>"
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokens,
        patch_size=2,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def resnet_processor() -> Any:
    return hf.ConvNextImageProcessorPil(size={"shortest_edge": 224})


# ---------------------------------------------------------------- sizes


def decoder(vocabulary: int, width: int, inner: int, heads: int, layers: int = 2, **more: Any) -> Sizes:
    """Sizes as Llama and its kin name them; `heads` of the queries."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    return sizes | {"num_hidden_layers": layers, "max_position_embeddings": 512} | more


TWO_KEYS = {"num_key_value_heads": 2}
LLAMA = decoder(32000, 16, 64, 4, num_key_value_heads=4) | {"max_position_embeddings": 2048}
QWEN2 = decoder(32000, 8, 32, 4, **TWO_KEYS)
BERT = decoder(1124, 32, 37, 4, layers=5, type_vocab_size=16)
ROBERTA = BERT | {"type_vocab_size": 1}
DEBERTA = BERT | {"vocab_size": 1024, "type_vocab_size": 0}
OPT_ENDS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
OPT = {"vocab_size": 50265, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "ffn_dim": 4}
OPT |= {"max_position_embeddings": 100, "word_embed_proj_dim": 16} | OPT_ENDS
OPT_125M = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
OPT_125M |= {"ffn_dim": 3072, "max_position_embeddings": 2048, "word_embed_proj_dim": 768} | OPT_ENDS
GPT_ENDS = {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}
GPT2 = {"vocab_size": 1000, "n_positions": 512, "n_embd": 32, "n_layer": 5, "n_head": 4} | GPT_ENDS
T5 = {"vocab_size": 1103, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "relative_attention_num_buckets": 8}
FLAN_T5 = T5 | {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 8, "feed_forward_proj": "gated-gelu"}
SMALL_PAIR = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
SMALL_PAIR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = SMALL_PAIR | {"vocab_size": 1024, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 100}
WHISPER = SMALL_PAIR | GPT_ENDS | {"vocab_size": 200, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WHISPER |= {"num_mel_bins": 80, "max_source_positions": 60, "max_target_positions": 40, "pad_token_id": 0}
WHISPER |= {"decoder_start_token_id": 85, "suppress_tokens": None, "begin_suppress_tokens": None}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CLIP_TEXT = decoder(1000, 32, 37, 4, layers=5, projection_dim=32, bos_token_id=0, eos_token_id=2)
CLIP_TEXT |= {"max_position_embeddings": 77}
CLIP_VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_VISION |= {"image_size": 30, "patch_size": 2, "projection_dim": 32}
GEMMA3 = decoder(32000, 32, 64, 4, head_dim=8, layer_types=["sliding_attention", "full_attention"], **TWO_KEYS)
GEMMA4 = decoder(1000, 32, 64, 4, layers=6, num_key_value_heads=1, head_dim=8, global_head_dim=16, sliding_window=16)
GEMMA4 |= {"vocab_size_per_layer_input": 1000, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "use_double_wide_mlp": True}
LLAMA4 = decoder(1000, 16, 32, 4, head_dim=8, intermediate_size_mlp=64, pad_token_id=0, **TWO_KEYS)
LLAMA4 |= {"num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 128}
GPT_OSS = decoder(1000, 8, 32, 4, head_dim=4, pad_token_id=0, eos_token_id=2, bos_token_id=1, **TWO_KEYS, **EXPERTS)
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"]}
QWEN3_MOE = decoder(1000, 8, 32, 4, head_dim=4, moe_intermediate_size=16, num_experts=4, **TWO_KEYS)
QWEN3_MOE |= {"num_experts_per_tok": 2}
NEMOTRON = decoder(1000, 32, 64, 4, head_dim=8, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, **TWO_KEYS)
NEMOTRON |= {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "n_groups": 2, "chunk_size": 16}
NEMOTRON |= {"use_mamba_kernels": False}
del NEMOTRON["num_hidden_layers"]  # the list of blocks says it
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 16}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}

# ---------------------------------------------------------------- repositories


@dataclass(frozen=True)
class Model:
    """A model under one or several repository names, an optional revision after an @.

    Attributes:
        repositories: the names; each gets weights of its own.
        make: the model, with weights from torch's random numbers.
        tokenizer: its tokenizer or processor, if it has one.
    """

    repositories: list[str]
    make: Callable[[], nn.Module]
    tokenizer: Callable[[], Any] | None


def model(names: str, cls: Any, config: Any, sizes: Sizes, tokenizer: Callable[[], Any] | None) -> Model:
    """A row of the table; `names` apart by spaces, "peft:" short for "peft-internal-testing/" and so on."""
    owners = {"peft:": "peft-internal-testing/", "hf:": "hf-internal-testing/", "trl:": "trl-internal-testing/"}
    for short, owner in owners.items():
        names = names.replace(short, owner)
    return Model(names.split(), lambda: cls(config(**sizes)), tokenizer)


def llava_config(**sizes: Any) -> Any:
    text = hf.LlamaConfig(**LLAMA | {"vocab_size": 1100, "hidden_size": 32})
    return hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**CLIP_VISION), text_config=text, **sizes)


MODELS = [
    model("peft:tiny-random-OPTForCausalLM", hf.OPTForCausalLM, hf.OPTConfig, OPT, opt_tokenizer),
    model("peft:opt-125m facebook/opt-125m", hf.OPTForCausalLM, hf.OPTConfig, OPT_125M, opt_tokenizer),
    model("gpt2 openai-community/gpt2", hf.GPT2LMHeadModel, hf.GPT2Config, {}, gpt2_tokenizer),
    model(
        "peft:tiny-random-GPT2LMHeadModel peft:tiny-random-gpt2 hf:tiny-random-gpt2",
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        GPT2,
        gpt2_tokenizer,
    ),
    model(
        "peft:tiny-random-GPTJForCausalLM",
        hf.GPTJForCausalLM,
        hf.GPTJConfig,
        GPT2 | {"vocab_size": 1024, "rotary_dim": 4},
        gpt2_tokenizer,
    ),
    model(
        "trl:tiny-random-LlamaForCausalLM peft:tiny-random-LlamaForCausalLM hf:tiny-random-LlamaForCausalLM",
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        LLAMA,
        llama_tokenizer,
    ),
    model(
        "trl:tiny-LlamaForSequenceClassification-3.2",
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig,
        LLAMA | {"num_labels": 2, "pad_token_id": 0},
        llama_tokenizer,
    ),
    model(
        "hf:tiny-random-MistralForCausalLM",
        hf.MistralForCausalLM,
        hf.MistralConfig,
        decoder(32000, 32, 37, 4, **TWO_KEYS),
        llama_tokenizer,
    ),
    model(
        "peft:tiny-dummy-qwen2 trl:tiny-Qwen2ForCausalLM-2.5 Qwen/Qwen2-0.5B",
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        QWEN2,
        gpt2_tokenizer,
    ),
    model("trl:tiny-Qwen3ForCausalLM", hf.Qwen3ForCausalLM, hf.Qwen3Config, QWEN2 | {"head_dim": 8}, gpt2_tokenizer),
    model(
        "peft:tiny-random-BloomForCausalLM",
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4},
        gpt2_tokenizer,
    ),
    model(
        "peft:tiny-random-GPTNeoXForCausalLM",
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        decoder(1024, 32, 37, 4, layers=5),
        gpt2_tokenizer,
    ),
    model("hf:tiny-random-Gemma3ForCausalLM", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GEMMA3, gemma_tokenizer),
    model("peft:tiny-random-gemma4-E2B", hf.Gemma4ForCausalLM, hf.Gemma4TextConfig, GEMMA4, gemma_tokenizer),
    model("trl:tiny-Llama4ForCausalLM", hf.Llama4ForCausalLM, hf.Llama4TextConfig, LLAMA4, llama_tokenizer),
    model("trl:tiny-GptOssForCausalLM", hf.GptOssForCausalLM, hf.GptOssConfig, GPT_OSS, llama_tokenizer),
    model(
        "trl:tiny-Qwen3MoeForCausalLM hf:tiny-qwen3-moe",
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        QWEN3_MOE,
        gpt2_tokenizer,
    ),
    model(
        "hf:Mixtral-tiny",
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        decoder(1000, 32, 64, 4, **TWO_KEYS, **EXPERTS),
        llama_tokenizer,
    ),
    model(
        "tiiuae/falcon-mamba-tiny-dev",
        hf.FalconMambaForCausalLM,
        hf.FalconMambaConfig,
        {"vocab_size": 1000, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 64},
        gpt2_tokenizer,
    ),
    model(
        "trl:tiny-NemotronHForCausalLM-nano",
        hf.NemotronHForCausalLM,
        hf.NemotronHConfig,
        NEMOTRON,
        llama_tokenizer,
    ),
    model(
        "peft:tiny-random-BertModel peft:tiny-random-BertModel@v2.0.0 hf:tiny-random-BertModel bert-base-uncased",
        hf.BertForPreTraining,
        hf.BertConfig,
        BERT,
        bert_tokenizer,
    ),
    model(
        "peft:tiny-random-BertForSequenceClassification",
        hf.BertForSequenceClassification,
        hf.BertConfig,
        BERT,
        bert_tokenizer,
    ),
    model("peft:tiny-random-RobertaModel", hf.RobertaModel, hf.RobertaConfig, ROBERTA, bert_tokenizer),
    model(
        "peft:tiny-random-RobertaForSequenceClassification",
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig,
        ROBERTA,
        bert_tokenizer,
    ),
    model("peft:tiny-random-DebertaModel", hf.DebertaModel, hf.DebertaConfig, DEBERTA, bert_tokenizer),
    model("peft:tiny-random-DebertaV2Model", hf.DebertaV2Model, hf.DebertaV2Config, DEBERTA, bert_tokenizer),
    model(
        "peft:tiny-random-t5 peft:tiny-random-T5ForConditionalGeneration t5-base "
        "peft:tiny-random-T5ForConditionalGeneration-calibrated",
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5,
        t5_tokenizer,
    ),
    model(
        "google/flan-t5-small google/flan-t5-base",
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        FLAN_T5,
        t5_tokenizer,
    ),
    model(
        "peft:tiny-random-BartForConditionalGeneration",
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        BART,
        bert_tokenizer,
    ),
    model("peft:tiny-clip-text-2", hf.CLIPTextModelWithProjection, hf.CLIPTextConfig, CLIP_TEXT, gpt2_tokenizer),
    model("openai/whisper-large-tiny", hf.WhisperForConditionalGeneration, hf.WhisperConfig, WHISPER, None),
    model(
        "peft:tiny-random-ResNetForImageClassification",
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        RESNET,
        resnet_processor,
    ),
    model(
        "hf:tiny-random-LlavaForConditionalGeneration peft:tiny-LlavaForConditionalGeneration",
        hf.LlavaForConditionalGeneration,
        llava_config,
        {"image_token_index": 1001, "image_token_id": 1001, "vision_feature_layer": -1, "image_seq_length": 224},
        llava_processor,
    ),
    model(
        "trl:tiny-Qwen2_5_VLForConditionalGeneration",
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLConfig,
        {
            "text_config": decoder(1000, 16, 32, 4, rope_parameters=ROPE, **TWO_KEYS),
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]},
            "image_token_id": 990,
            "video_token_id": 991,
            "vision_start_token_id": 992,
            "vision_end_token_id": 993,
        },
        None,
    ),
]
