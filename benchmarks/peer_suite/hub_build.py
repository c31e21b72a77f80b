"""Builds the local hub: models, diffusion pipelines, data sets, and adapters made by the peer itself.

python hub_build.py FOLDER
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import peft
import torch
import transformers as hf
from hub_models import MODELS, opt_tokenizer, sentences, trained
from hub_server import folder_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file

HUB = Path(sys.argv[1])
TINY_OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
# a test of mixed adapters wants four different continuations of a sentence, which not every seed gives
SEEDS = {TINY_OPT: 0}


def place(repository: str, kind: str = "models") -> Path:
    """The folder of `owner/name` or `owner/name@revision`."""
    name, _, revision = repository.partition("@")
    return folder_of(HUB, kind, name) / (revision or "main")


def seed(repository: str) -> None:
    """Let random numbers depend on the repository's name alone."""
    name, _, revision = repository.partition("@")
    drawn = hashlib.sha256(f"{name}{revision or 'main'}".encode()).hexdigest()[:8]
    torch.manual_seed(SEEDS.get(repository, int(drawn, 16)))


# ---------------------------------------------------------------- models


def build_models() -> None:
    for model in MODELS:
        for repository in model.repositories:
            seed(repository)
            made: Any = model.make().eval()
            if "flan" in repository:  # a test compares what two such models generate, which must be of one length
                made.generation_config.min_new_tokens = made.generation_config.max_new_tokens = 20
            made.save_pretrained(place(repository))
            if model.tokenizer is not None:
                model.tokenizer().save_pretrained(place(repository))


def build_pipelines() -> None:
    """A Stable Diffusion pipeline and a Flux transformer."""
    import diffusers

    folder = place("hf-internal-testing/tiny-sd-pipe")
    seed("sd")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=32,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    sizes = {"vocab_size": 1000, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text_encoder = hf.CLIPTextModel(hf.CLIPTextConfig(**sizes, num_attention_heads=2, **ends))
    bpe = json.loads(trained(999, ("<|startoftext|>", "<|endoftext|>")))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    words = folder / "tokenizer"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (words / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=hf.CLIPTokenizer.from_pretrained(words, model_max_length=77),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)

    folder = place("hf-internal-testing/tiny-flux2")
    torch.manual_seed(1)
    diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[2, 2, 2, 2],
    ).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')


# ---------------------------------------------------------------- adapters


def adapter(
    repository: str,
    base: str,
    config: peft.PeftConfig,
    auto: Any = hf.AutoModelForCausalLM,
    vocabulary: int | None = None,
    tokenizer: Callable[[], Any] | None = None,
    subfolder: str = "",
    **more: Any,
) -> Path:
    """An adapter of the peer's with random weights.

    Args:
        vocabulary: resize the base model's embedding to this first.
        tokenizer: saved beside it.
        more: fields of adapter_config.json.
    """
    seed(repository)
    model = auto.from_pretrained(place(base))
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    folder = place(repository) / subfolder
    peft.get_peft_model(model, config).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base} | more, indent=2))
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: peft\n---\n")
    if tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def longer(size: int) -> Callable[[], Any]:
    """OPT's tokenizer with more tokens."""

    def make() -> Any:
        made = opt_tokenizer()
        made.add_tokens([f"<extra_{i}>" for i in range(size - len(made))])
        return made

    return make


def build_adapters() -> None:
    def lora(task: str | None = "CAUSAL_LM", **options: Any) -> LoraConfig:
        return LoraConfig(init_lora_weights=False, task_type=task, **options)

    own = "peft-internal-testing/"
    whisper = {
        "base_model_class": "WhisperForConditionalGeneration",
        "parent_library": "transformers.models.whisper.modeling_whisper",
    }
    adapter(own + "tiny-OPTForCausalLM-lora", TINY_OPT, lora())
    classify, answer = hf.AutoModelForSequenceClassification, hf.AutoModelForQuestionAnswering
    adapter(own + "tiny_OPTForSequenceClassification-lora", TINY_OPT, lora("SEQ_CLS"), classify)
    adapter(own + "tiny_OPTForQuestionAnswering-lora", TINY_OPT, lora("QUESTION_ANS"), answer)
    adapter(own + "tiny_OPTForFeatureExtraction-lora", TINY_OPT, lora("FEATURE_EXTRACTION"), hf.AutoModel)
    adapter(
        own + "tiny_GPT2ForTokenClassification-lora",
        own + "tiny-random-gpt2",
        lora("TOKEN_CLS", fan_in_fan_out=True),
        hf.AutoModelForTokenClassification,
    )
    adapter(own + "tiny_T5ForSeq2SeqLM-lora", own + "tiny-random-t5", lora("SEQ_2_SEQ_LM"), hf.AutoModelForSeq2SeqLM)
    adapter(
        own + "tiny_WhisperForConditionalGeneration-lora",
        "openai/whisper-large-tiny",
        lora(None, target_modules=["q_proj", "v_proj"]),
        hf.WhisperForConditionalGeneration,
        auto_mapping=whisper,
    )
    adapter(own + "tiny-random-BertModel-lora@v1.2.3", "hf-internal-testing/tiny-random-BertModel", lora())
    adapter(own + "gpt2-lora-random", "gpt2", lora(fan_in_fan_out=True))
    adapter(own + "opt-125m-dummy-lora", own + "opt-125m", lora())
    adapter(own + "tiny-opt-lora-revision", TINY_OPT, lora())
    adapter(own + "tiny-opt-lora-revision@test", TINY_OPT, lora())
    adapter(own + "test-lora-subfolder", TINY_OPT, lora(), subfolder="test")
    adapter("ybelkada/test-st-lora", TINY_OPT, lora())
    vocabulary = 50265  # of the base model
    extended = own + "tiny-random-OPTForCausalLM-extended-vocab"
    adapter(extended, TINY_OPT, lora(), tokenizer=longer(vocabulary + 7))
    adapter(own + "opt-tokenizer-revision", TINY_OPT, lora(), tokenizer=opt_tokenizer)
    adapter(
        own + "opt-tokenizer-revision@my-revision",
        TINY_OPT,
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        vocabulary=vocabulary + 3,
        tokenizer=longer(vocabulary + 3),
    )
    build_old_boft()


def build_old_boft() -> None:
    """An adapter as peft 0.12 wrote it, with the permutations; the test makes the same one from this seed."""
    model = hf.AutoModelForCausalLM.from_pretrained(place(TINY_OPT))
    torch.manual_seed(0)
    made = peft.get_peft_model(model, peft.BOFTConfig(init_weights=False))
    folder = place("peft-internal-testing/boft-tiny-opt-peft-v0.12")
    made.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    permutations = {n: b.clone().contiguous() for n, b in made.named_buffers() if n.endswith("boft_P")}
    save_file(load_file(file) | permutations, file, metadata={"format": "pt"})


# ---------------------------------------------------------------- data sets


def write(repository: str, name: str) -> Path:
    """Where to write a file of a data set."""
    path = place(repository, "datasets") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def build_data() -> None:
    from sklearn.datasets import load_iris

    iris = load_iris()
    names = ["SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm"]
    table = pd.DataFrame(iris.data, columns=names)
    table.insert(0, "Id", range(1, len(table) + 1))
    table["Species"] = [f"Iris-{iris.target_names[i]}" for i in iris.target]
    table.to_csv(write("scikit-learn/iris", "Iris.csv"), index=False)

    draw = random.Random(0)
    words = [["awful", "dull", "bad", "boring", "weak"], ["great", "lovely", "fine", "moving", "funny"]]
    for split, size in (("train", 400), ("validation", 80), ("test", 40)):
        labels = [draw.randint(0, 1) for _ in range(size)]
        reviews = [f"a {draw.choice(words[label])} {draw.choice(['film', 'story'])} " for label in labels]
        rows = pd.DataFrame({"sentence": reviews, "label": labels, "idx": range(size)})
        rows.to_parquet(write("nyu-mll/glue", f"sst2/{split}-00000-of-00001.parquet"))
    splits = "".join(f"  - split: {s}\n    path: sst2/{s}-*\n" for s in ("train", "validation", "test"))
    card = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{splits}---\n"
    write("nyu-mll/glue", "README.md").write_text(card)

    quotes = [line.strip() for line in islice((line for line in sentences() if len(line) > 30), 2500)]
    rows = pd.DataFrame({"quote": quotes, "author": "pydoc", "tags": "['doc']"})
    rows.to_json(write("ybelkada/english_quotes_copy", "quotes.jsonl"), orient="records", lines=True)

    import datasets

    image = {"image": [{"bytes": png(640, 480), "path": None}]}
    made = datasets.Dataset.from_dict(image, features=datasets.Features({"image": datasets.Image()}))
    made.to_parquet(write("huggingface/cats-image", "data/test-00000-of-00001.parquet"))


def png(width: int, height: int) -> bytes:
    """An image of three gradients."""
    rows = (b"\0" + bytes(v for x in range(width) for v in (x % 256, y % 256, (x + y) % 256)) for y in range(height))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"".join(rows))), chunk(b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)
    build_models()
    build_pipelines()
    build_data()
    build_adapters()
