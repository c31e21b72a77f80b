"""The table of cases: which configuration goes on which base model. Each row is run through every property.

A new method needs at least one row here; `test_conformance.test_every_method_has_a_case` sees to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import models
from .models import TOKENS, Factory


@dataclass(frozen=True)
class Case:
    """One configuration of one method on one base model.

    Attributes:
        method: name in the registry.
        base: factory of the base model.
        options: arguments of the method's configuration; peft's takes the same.
        other: what a second adapter beside this one has otherwise; None where one layer holds a single adapter of it.
        starts_as_base: whether a new adapter leaves the base model's output as it is.
        together: whether two of them may be active at once.
    """

    id: str
    method: str
    base: Factory
    options: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] | None = field(default_factory=dict)
    starts_as_base: bool = True
    together: bool = True


def _lora(id: str, base: Factory, **rest: Any) -> Case:
    facts = {name: rest.pop(name) for name in ("other", "starts_as_base", "together") if name in rest}
    return Case(f"lora-{id}", "lora", base, rest, **facts)


def _ia3(id: str, base: Factory, **rest: Any) -> Case:
    facts = {name: rest.pop(name) for name in ("other", "starts_as_base", "together") if name in rest}
    return Case(f"ia3-{id}", "ia3", base, rest, **facts)


def _tokens(id: str, base: Factory, **rest: Any) -> Case:
    facts = {name: rest.pop(name) for name in ("starts_as_base",) if name in rest}
    rest.setdefault("token_indices", TOKENS)
    return Case(f"tokens-{id}", "trainable_tokens", base, rest, other={"token_indices": [20, 5]}, **facts)


CASES = [
    # SEQ_CLS and TOKEN_CLS put the task head into modules_to_save, of which one at a time is active
    _lora("bert-seq-cls", models.bert_classifier, task_type="SEQ_CLS", r=4, together=False),
    _lora("bert-token-cls", models.bert_tagger, task_type="TOKEN_CLS", r=4, together=False),
    _lora("bert-no-task", models.bert_classifier, r=4),
    _lora(
        "bert-unequal",
        models.bert_classifier,
        r=4,
        other={"r": 2, "lora_alpha": 3, "target_modules": ["query", "dense"]},
    ),
    _lora("bert-all-linear", models.bert_classifier, target_modules="all-linear", r=2),
    _lora(
        "bert-all-linear-cls",
        models.bert_classifier,
        task_type="SEQ_CLS",
        target_modules="all-linear",
        r=2,
        together=False,
    ),
    _lora("bert-regex", models.bert_classifier, target_modules=r".*layer\.1\..*(query|key)", r=4),
    _lora(
        "bert-exclude", models.bert_classifier, target_modules=["query", "dense"], exclude_modules=["pooler.dense"], r=4
    ),
    _lora(
        "bert-exclude-regex", models.bert_classifier, target_modules=["query"], exclude_modules=r".*layer\.0\..*", r=4
    ),
    _lora("bert-layers", models.bert_classifier, target_modules=["query"], layers_to_transform=[1], r=4),
    _lora(
        "bert-layers-pattern",
        models.bert_classifier,
        target_modules=["query"],
        layers_to_transform=0,
        layers_pattern="layer",
    ),
    _lora(
        "bert-patterns",
        models.bert_classifier,
        target_modules=["query", "value", "pooler.dense"],
        r=4,
        rank_pattern={"query": 2, r".*layer\.1\..*value": 3},
        alpha_pattern={"value": 5, "pooler.dense": 1},
    ),
    _lora(
        "bert-modules-to-save", models.bert_classifier, modules_to_save=["pooler", "classifier"], r=2, together=False
    ),
    _lora("bert-rslora", models.bert_classifier, r=4, lora_alpha=6, use_rslora=True),
    _lora("bert-dropout", models.bert_classifier, r=4, lora_dropout=0.3),
    _lora("bert-gaussian", models.bert_classifier, r=4, init_lora_weights="gaussian"),
    _lora("bert-random", models.bert_classifier, r=4, init_lora_weights=False, starts_as_base=False),
    _lora("bert-bias", models.bert_classifier, r=4, bias="lora_only", other=None),
    _lora("opt-bias", models.opt, task_type="CAUSAL_LM", bias="all", other=None),
    _lora("opt", models.opt, task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "fc1", "fc2"]),
    _lora("gpt2", models.gpt2, task_type="CAUSAL_LM", fan_in_fan_out=True, r=4),
    _lora("gpt2-all-linear", models.gpt2, task_type="CAUSAL_LM", fan_in_fan_out=True, target_modules="all-linear", r=2),
    _lora("gpt2-tokens", models.gpt2, fan_in_fan_out=True, r=4, trainable_token_indices=TOKENS, together=False),
    _lora("llama", models.llama_tied, task_type="CAUSAL_LM", r=4),
    _lora("llama-all-linear", models.llama_untied, task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    _lora("llama-head", models.llama_untied, task_type="CAUSAL_LM", target_modules=["v_proj", "lm_head"], r=4),
    _lora(
        "llama-embedding", models.llama_untied, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], r=4
    ),
    _lora("llama-tokens-tied", models.llama_tied, r=4, trainable_token_indices=TOKENS, together=False),
    _lora("llama-tokens-untied", models.llama_untied, r=4, trainable_token_indices=TOKENS, together=False),
    _lora(
        "llama-tokens-dict", models.llama_untied, r=4, trainable_token_indices={"embed_tokens": TOKENS}, together=False
    ),
    _lora(
        "llama-tokens-both",
        models.llama_untied,
        trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [1, 2]},
        target_modules=["q_proj"],
        together=False,
    ),
    _lora("llama-head-saved", models.llama_untied, task_type="CAUSAL_LM", modules_to_save=["lm_head"], together=False),
    _lora("gemma3-embedding", models.gemma3_untied, target_modules=["embed_tokens"], r=4),
    _lora(
        "gemma3-tokens", models.gemma3_tied, task_type="CAUSAL_LM", r=4, trainable_token_indices=TOKENS, together=False
    ),
    _lora("t5", models.t5, task_type="SEQ_2_SEQ_LM", r=4),
    _lora("t5-feedforward", models.t5, task_type="SEQ_2_SEQ_LM", r=4, target_modules=["wi", "wo", "k"]),
    _lora("conv", models.conv_net, target_modules=["conv1", "conv2", "head"], r=4),
    _lora("conv-rank-over-width", models.conv_net, target_modules=["conv1"], r=12),
    _lora("mlp", models.mlp, target_modules=["layers.0", "layers.1"], modules_to_save=["head"], r=4, together=False),
    _lora("mlp-embedding", models.mlp, target_modules=["emb", "layers.0"], r=4),
    _lora(
        "mlp-embedding-random", models.mlp, target_modules=["emb"], r=4, init_lora_weights=False, starts_as_base=False
    ),
    _lora("mlp-embedding-gaussian", models.mlp, target_modules=["emb"], r=4, init_lora_weights="gaussian"),
    _ia3("bert-seq-cls", models.bert_classifier, task_type="SEQ_CLS", together=False),
    _ia3("bert-no-task", models.bert_classifier),
    _ia3("bert-no-feedforward", models.bert_classifier, target_modules=["key", "value"], feedforward_modules=[]),
    _ia3("bert-regex", models.bert_classifier, target_modules=r".*(key|dense)", feedforward_modules=r".*output\.dense"),
    _ia3("bert-random", models.bert_classifier, init_ia3_weights=False, starts_as_base=False),
    _ia3("bert-exclude", models.bert_classifier, exclude_modules=["layer.0.attention.self.key"]),
    _ia3("gpt2", models.gpt2, task_type="CAUSAL_LM", fan_in_fan_out=True),
    _ia3("llama", models.llama_tied, task_type="CAUSAL_LM"),
    _ia3("opt", models.opt, task_type="CAUSAL_LM"),
    _ia3("t5", models.t5, task_type="SEQ_2_SEQ_LM"),
    _ia3("conv", models.conv_net, target_modules=["conv1", "conv2"], feedforward_modules=["conv2"]),
    _ia3(
        "mlp",
        models.mlp,
        target_modules=["layers.0", "layers.1"],
        feedforward_modules=["layers.1"],
        modules_to_save=["head"],
        together=False,
    ),
    _tokens("bert", models.bert_classifier),
    _tokens("bert-padding", models.bert_classifier, token_indices=[0, 3]),
    _tokens("bert-random", models.bert_classifier, init_weights=False, starts_as_base=False),
    _tokens("gpt2-tied", models.gpt2, task_type="CAUSAL_LM"),
    _tokens("llama-tied", models.llama_tied, task_type="CAUSAL_LM"),
    _tokens("llama-untied", models.llama_untied, task_type="CAUSAL_LM"),
    _tokens("llama-head", models.llama_untied, task_type="CAUSAL_LM", target_modules=["lm_head"]),
    _tokens("gemma3-scaled", models.gemma3_tied, task_type="CAUSAL_LM"),
    _tokens("t5-tied", models.t5, task_type="SEQ_2_SEQ_LM"),
    _tokens("opt", models.opt, task_type="CAUSAL_LM"),
    _tokens("mlp", models.mlp, target_modules=["emb"]),
]
