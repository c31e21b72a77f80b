"""What is particular to virtual tokens: how they enter, what cannot be done with them, and generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertModel, Gemma4ForCausalLM, Gemma4TextConfig

from workbench import adapters
from workbench.adapters.model import PeftModelForCausalLM
from workbench.adapters.registry import METHODS
from workbench.errors import AdapterError, AdapterNameError, CheckpointError, ConfigError, MergeError

from . import models
from .models import inputs

pytestmark = pytest.mark.filterwarnings("ignore")

SINGLE = ("prompt_tuning", "prefix_tuning", "p_tuning")
every_method = pytest.mark.parametrize("method", [*SINGLE, "multitask_prompt_tuning"])


def both(method: str, base: models.Factory, task_type: str, **options: Any) -> tuple[Any, Any]:
    """The method in workbench and in peft, with the same random values in both."""
    options = {"task_type": task_type, "num_virtual_tokens": 3} | options
    ours, theirs = one(method, base, **options), peft_model(method, base, **options)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    return ours, theirs


def one(method: str, base: models.Factory, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3} | options
    return adapters.get_peft_model(base(), METHODS[method].config(**options)).eval()


def peft_model(method: str, base: models.Factory, **options: Any) -> Any:
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[METHODS[method].config.peft_type]
    return peft.get_peft_model(base(), config(**options)).eval()


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def padded() -> dict[str, Tensor]:
    """Rows of which one is padded on the left."""
    ids = inputs(models.gpt2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- generation ---


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
@pytest.mark.parametrize("base", [models.gpt2, models.llama_tied, models.t5], ids=lambda base: base.__name__)
@every_method
def test_generate(method: str, base: models.Factory, options: dict[str, Any]) -> None:
    """Padded rows, beams, sampling: peft's tokens."""
    task, own, more = "CAUSAL_LM" if base is not models.t5 else "SEQ_2_SEQ_LM", {}, {}
    if method.startswith("multitask"):
        own, more = {"num_tasks": 2}, {"task_ids": torch.tensor([0, 1, 1, 0])}
    made = []
    for model in both(method, base, task, **own):
        torch.manual_seed(1)
        made.append(model.generate(**padded(), max_new_tokens=6, **({"do_sample": False} | options), **more))
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("base", [models.gpt2, models.llama_tied, models.t5], ids=lambda base: base.__name__)
@pytest.mark.parametrize("method", SINGLE)
def test_generate_without_cache(method: str, base: models.Factory) -> None:
    """The cache saves time and changes nothing (peft's prefix tuning fails without it)."""
    task = "CAUSAL_LM" if base is not models.t5 else "SEQ_2_SEQ_LM"
    model, _ = both(method, base, task)
    ids = {"input_ids": inputs(base)["input_ids"], "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    made = [model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("method", SINGLE)
def test_generate_is_forward_again_and_again(method: str) -> None:
    """Each new token is the likeliest one that a call of the model itself gives."""
    model, _ = both(method, models.llama_tied, "CAUSAL_LM")
    ids = inputs(models.llama_tied)["input_ids"]
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    for length in range(ids.shape[1], made.shape[1]):
        assert torch.equal(model(input_ids=made[:, :length]).logits[:, -1].argmax(-1), made[:, length])


def test_static_cache_is_refused() -> None:
    """It has no room for virtual tokens."""
    model = one("prompt_tuning", models.llama_tied)
    with pytest.raises(AdapterError, match="static"):
        model.generate(**padded(), max_new_tokens=2, cache_implementation="static", disable_compile=True)


# --- arguments ---


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize(
    ("base", "task", "given"),
    [
        (models.gpt2, "CAUSAL_LM", {"labels": torch.randint(0, 50, (4, 6))}),
        (models.bert_classifier, "SEQ_CLS", {"labels": torch.tensor([0, 1, 2, 0])}),
        (models.bert_classifier, "SEQ_CLS", {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)}),
        (models.t5, "SEQ_2_SEQ_LM", {"labels": torch.randint(0, 50, (4, 5)), "decoder_input_ids": None}),
        (models.t5, "SEQ_2_SEQ_LM", {"attention_mask": None}),
        (models.llama_tied, "CAUSAL_LM", {"position_ids": torch.tensor([[0, 0, 1, 2, 3, 4]] * 4)}),
        (models.llama_tied, "CAUSAL_LM", {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)}),
        (models.gpt2, "CAUSAL_LM", {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else getattr(value, "__name__", value),
)
def test_arguments(method: str, base: models.Factory, task: str, given: dict[str, Any]) -> None:
    """Labels, masks, token types and positions have peft's effect on logits and loss."""
    ours, theirs = both(method, base, task)
    call = {name: value for name, value in (inputs(base) | given).items() if value is not None}
    one, other = ours(**call), theirs(**call)
    same(one.logits, other.logits)
    if "labels" in call:
        same(one.loss, other.loss)


@pytest.mark.parametrize("method", SINGLE)
def test_labels_of_tokens(method: str) -> None:
    """Virtual tokens have none (peft fails at that)."""
    model = one(method, models.bert_tagger, task_type="TOKEN_CLS")
    labels = torch.randint(0, 3, (4, 6))
    answer = model(**inputs(models.bert_tagger), labels=labels)
    same(answer.loss, torch.nn.functional.cross_entropy(answer.logits[:, -6:].flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("method", SINGLE)
def test_embeddings_instead_of_ids(method: str) -> None:
    model, _ = both(method, models.gpt2, "CAUSAL_LM")
    ids = inputs(models.gpt2)["input_ids"]
    expected = model(ids).logits  # by position, too
    same(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)


@pytest.mark.parametrize("method", SINGLE)
def test_question_answering_and_features(method: str) -> None:
    """The other two tasks."""
    config = copy.deepcopy(models.bert_classifier().config)
    config.num_labels = 2
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "QUESTION_ANS": BertForQuestionAnswering(config),
        "FEATURE_EXTRACTION": BertModel(config),
    }
    for task, model in made.items():
        ours, theirs = both(method, lambda model=model: copy.deepcopy(model).eval(), task)  # type: ignore[misc]
        call = inputs(models.bert_classifier)
        same(ours(**call)[0], theirs(**call)[0])


# --- multitask ---


@pytest.mark.parametrize("submodules", [1, 2])
def test_multitask_encoder_decoder(submodules: int) -> None:
    """With two submodules the decoder has virtual tokens of its own; loss, logits and gradients are peft's."""
    ours, theirs = both(
        "multitask_prompt_tuning", models.t5, "SEQ_2_SEQ_LM", num_tasks=3, num_transformer_submodules=submodules
    )
    call = {name: value for name, value in inputs(models.t5).items() if name != "decoder_input_ids"}
    call |= {"labels": call["input_ids"].roll(1, 1), "task_ids": torch.tensor([0, 2, 1, 2])}
    one, other = ours(**call), theirs(**call)
    same(one.logits, other.logits)
    for output in (one, other):
        output.loss.backward()
    for mine, expected in zip(ours.prompt_encoder.parameters(), theirs.prompt_encoder.parameters(), strict=True):
        same(mine.grad, expected.grad)


def test_multitask_needs_tasks() -> None:
    call = inputs(models.gpt2)
    with pytest.raises(AdapterError, match="task_ids cannot be None"):
        one("multitask_prompt_tuning", models.gpt2, num_tasks=2)(**call)
    single = one("multitask_prompt_tuning", models.gpt2)
    same(single(**call).logits, single(**call, task_ids=torch.zeros(4, dtype=torch.long)).logits)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_from_a_source(init: str, tmp_path: Path) -> None:
    """A target task starts from what the source tasks were trained to."""
    source = one("multitask_prompt_tuning", models.gpt2, num_tasks=3)
    source.save_pretrained(tmp_path)
    options = {
        "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 2,
    }
    ours = one("multitask_prompt_tuning", models.gpt2, **options).prompt_encoder["default"].state_dict()
    torch.manual_seed(0)
    theirs = peft_model("multitask_prompt_tuning", models.gpt2, task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    expected = theirs.prompt_encoder["default"].state_dict()
    shared = ["embedding.weight"]
    for name in shared if init == "ONLY_SOURCE_SHARED" else expected:
        same(ours[name], expected[name])


def test_multitask_source_that_does_not_fit(tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    options = {"prompt_tuning_init": "ONLY_SOURCE_SHARED"}
    with pytest.raises(ConfigError, match="prompt_tuning_init_state_dict_path"):
        one("multitask_prompt_tuning", models.gpt2, **options)
    with pytest.raises(CheckpointError, match="does not fit"):
        one(
            "multitask_prompt_tuning",
            models.gpt2,
            prompt_tuning_init_state_dict_path=str(tmp_path / "x.safetensors"),
            **options,
        )


# --- what a prompt cannot do ---


@every_method
def test_refusals(method: str) -> None:
    """Merging, rows and two prompts at once are refused; without prompts the bare base model is left."""
    model = one(method, models.gpt2)
    model.add_adapter("second", METHODS[method].config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(MergeError):
        model.merge_adapter()
    with pytest.raises(MergeError):
        model.merge_and_unload()
    with pytest.raises(AdapterNameError):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="adapter_names"):
        model(**inputs(models.gpt2), adapter_names=["default", "second", "default", "default"])
    with pytest.raises(AttributeError, match="delete_adapter"):
        model.unload()
    with pytest.raises(TypeError, match="requires_grad"):
        model.set_requires_grad("default")
    twin = copy.deepcopy(model)
    model.delete_adapter(["default", "second"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    twin(**inputs(models.gpt2), task_ids=torch.zeros(4, dtype=torch.long))
    assert any(module._forward_pre_hooks for module in twin.modules())


@every_method
def test_low_cpu_mem_usage(method: str, tmp_path: Path) -> None:
    """Loading without allocating first ends at the same."""
    model, _ = both(method, models.bert_classifier, "SEQ_CLS")
    model.save_pretrained(tmp_path)
    loaded = adapters.PeftModel.from_pretrained(models.bert_classifier(), tmp_path, low_cpu_mem_usage=True)
    same(loaded(**inputs(models.bert_classifier)).logits, model(**inputs(models.bert_classifier)).logits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_prefix_tuning_refuses_gradient_checkpointing(when: str) -> None:
    """transformers would drop the prefix with the cache and train nothing."""
    base = models.llama_tied()
    config = METHODS["prefix_tuning"].config(task_type="CAUSAL_LM", num_virtual_tokens=2)
    if when == "before":
        base.gradient_checkpointing_enable()  # type: ignore[operator]
        with pytest.raises(ConfigError, match="does not work with gradient checkpointing"):
            adapters.get_peft_model(base, config)
        assert not any(module._forward_pre_hooks for module in base.modules())
        return
    model = adapters.get_peft_model(base, config)
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="does not work with gradient checkpointing"):
        model.train()(**inputs(models.llama_tied))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens"),
        ({"task_type": None}, "task_type"),
        ({"prompt_tuning_init": "NOISE"}, "prompt_tuning_init"),
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs"),
    ],
)
def test_refused_configurations(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        one("prompt_tuning", models.gpt2, **options)
    assert caught.value.field == field


def test_a_reparameterised_prompt_trains_no_further(tmp_path: Path) -> None:
    """Its file holds what its network gave out; that answers alike, but is not taken apart again."""
    model, _ = both("p_tuning", models.gpt2, "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    base = models.gpt2()
    with pytest.raises(CheckpointError, match="for inference"):
        adapters.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert not base._forward_pre_hooks
    loaded = adapters.PeftModel.from_pretrained(base, tmp_path)
    same(loaded(**inputs(models.gpt2)).logits, model(**inputs(models.gpt2)).logits)


# --- what peft's users reach for ---


def test_names() -> None:
    model = one("prompt_tuning", models.gpt2)
    assert type(model) is PeftModelForCausalLM
    assert model.word_embeddings is model.base_model.transformer.wte
    assert model.prompt_tokens["default"].tolist() == [0, 1, 2]
    assert model.get_prompt(batch_size=2).shape == (2, 3, models.HIDDEN)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), model.prompt_encoder["default"].embedding.weight)
    prefix = one("prefix_tuning", models.gpt2)
    assert prefix.get_prompt(batch_size=2).get_seq_length() == 3


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a text, over and over, and no code of the tokenizer's repository is run."""
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return lambda text: {"input_ids": [4, 5]}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    model = one(
        "prompt_tuning",
        models.gpt2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a film",
        tokenizer_name_or_path="words",
        tokenizer_kwargs={"trust_remote_code": True, "use_fast": False},
    )
    assert asked == {"name": "words", "use_fast": False, "trust_remote_code": False}
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, model.word_embeddings.weight[[4, 5, 4]])


# --- keys and values ---


@pytest.mark.parametrize("base", [models.gpt2, models.llama_tied, models.mistral], ids=lambda base: base.__name__)
def test_a_prefix_from_a_cache(base: models.Factory) -> None:
    """It starts as peft's does, and answers as the words themselves would."""
    ours, theirs = both("prefix_tuning", base, "CAUSAL_LM")
    ids = inputs(base)["input_ids"][:1]
    caches = []
    for library, model in ((adapters, ours), (peft, theirs)):
        with torch.no_grad(), model.disable_adapter():
            caches.append(model(input_ids=ids, use_cache=True).past_key_values)
        library.initialize_kv_prefix_from_past_key_values(model, past_key_values=caches[-1])
    prefix = ours.prompt_encoder["default"].embedding.weight
    same(prefix, theirs.prompt_encoder["default"].embedding.weight)
    same(prefix, adapters.prompt_embeddings_from_past_key_values(caches[0], num_virtual_tokens=3))
    with torch.no_grad():
        tail = {"input_ids": ids[:, 3:], "attention_mask": torch.ones_like(ids[:, 3:])}
        said = ours(**tail, position_ids=torch.arange(ids.shape[1] - 3)[None]).logits
        with ours.disable_adapter():
            same(said, ours(input_ids=ids).logits[:, 3:])
    with pytest.raises(AdapterError, match="cached tokens"):
        adapters.prompt_embeddings_from_past_key_values(caches[0], num_virtual_tokens=100)


def test_a_prefix_from_a_text() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    ours, theirs = both("prefix_tuning", models.gpt2, "CAUSAL_LM")
    adapters.initialize_kv_prefix_from_text(ours, tokenizer, text="4 9 2 7")
    peft.initialize_kv_prefix_from_text(theirs, tokenizer, text="4 9 2 7")
    same(ours.prompt_encoder["default"].embedding.weight, theirs.prompt_encoder["default"].embedding.weight)
    with pytest.raises(ConfigError, match="must be one of prefix tuning"):
        adapters.initialize_kv_prefix_from_text(one("prompt_tuning", models.gpt2), tokenizer, text="4 9 2 7")


def _gemma4(heads: int) -> nn.Module:
    """Layers 1 and 3 have one head of keys, twice as wide as those of the others; the upper two use keys from below."""
    config = Gemma4TextConfig(
        vocab_size=models.VOCAB,
        hidden_size=models.HIDDEN,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=heads,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        per_layer_config={layer: {"head_dim": 16, "num_key_value_heads": 1} for layer in (1, 3)},
        num_kv_shared_layers=2,
        sliding_window=16,
        vocab_size_per_layer_input=models.VOCAB,
        hidden_size_per_layer_input=8,
        pad_token_id=0,
    )
    return Gemma4ForCausalLM(config)


@models.tiny
def gemma4() -> nn.Module:
    return _gemma4(heads=1)


@models.tiny
def gemma4_more_heads() -> nn.Module:
    return _gemma4(heads=2)


@pytest.mark.parametrize(
    ("base", "said"),
    [(gemma4, r"layers \[0, 1\]; skipped \[2, 3\]"), (gemma4_more_heads, r"layers \[1\]; skipped \[0, 2, 3\]")],
)
def test_layers_with_unlike_keys(base: models.Factory, said: str) -> None:
    """Each takes as much of the prefix as it has room for; those that lack some of it take none."""
    ours, theirs = both("prefix_tuning", base, "CAUSAL_LM")
    given = {"input_ids": inputs(models.gpt2)["input_ids"]}
    with pytest.warns(UserWarning, match=said):
        logits = ours(**given).logits
    same(logits, theirs(**given).logits)
    ours.model.config.get_text_config().num_key_value_heads = 99
    ours.model.config.get_text_config().per_layer_config = {1: {"head_dim": 99}}
    with pytest.raises(ConfigError, match="skipped every layer"):
        ours(**given)


def test_an_encoder_decoder_generates_by_name_alone() -> None:
    """As in peft."""
    ids = inputs(models.gpt2)["input_ids"]
    for model in both("prompt_tuning", models.t5, "SEQ_2_SEQ_LM"):
        with pytest.raises(TypeError, match="positional"):
            model.generate(ids)
