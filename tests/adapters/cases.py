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
        merges: whether it can be written into the base weights.
        by_row: whether each row of a batch can have an adapter of its own.
        same_layers: whether peft has one adapted layer where we have one.
        keeps_base: whether the base model answers as it did without the adapter while the adapter is disabled.
        wrong_in_peft: parameters of which peft computes wrong gradients.
        arguments: what a call of the adapted model gets besides the base model's inputs.
        reparameterised: the parameters are a network's, of which a checkpoint holds the output only.
    """

    id: str
    method: str
    base: Factory
    options: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] | None = field(default_factory=dict)
    starts_as_base: bool = True
    together: bool = True
    keeps_base: bool = True
    merges: bool = True
    by_row: bool = True
    same_layers: bool = True
    wrong_in_peft: tuple[str, ...] = ()
    arguments: dict[str, list[int]] = field(default_factory=dict)
    reparameterised: bool = False


FACTS = {"other", "starts_as_base", "together", "keeps_base", "merges", "by_row", "same_layers", "wrong_in_peft"}


def _row(method: str, id: str, base: Factory, **rest: Any) -> Case:
    """A case: `rest` holds facts about it and options of the method."""
    facts = {name: rest.pop(name) for name in FACTS & rest.keys()}
    return Case(f"{method}-{id}", method, base, rest, **facts)


def _lora(id: str, base: Factory, **rest: Any) -> Case:
    return _row("lora", id, base, **rest)


def _adalora(id: str, base: Factory, **rest: Any) -> Case:
    return _row("adalora", id, base, **{"total_step": 10, "other": None} | rest)  # only one of its adapters trains


def _adaption_prompt(id: str, base: Factory, **rest: Any) -> Case:
    facts = {"together": False, "merges": False, "by_row": False, "other": {"adapter_len": 5}}
    return _row("adaption_prompt", id, base, **{"task_type": "CAUSAL_LM"} | facts | rest)


def _ia3(id: str, base: Factory, **rest: Any) -> Case:
    return _row("ia3", id, base, **rest)


def _lycoris(id: str, base: Factory, **rest: Any) -> list[Case]:
    """The same row for LoHa and LoKr."""
    return [_row(method, id, base, **rest) for method in ("loha", "lokr")]


def _lokr(id: str, base: Factory, **rest: Any) -> Case:
    return _row("lokr", id, base, **rest)


def _effective(id: str, base: Factory, **rest: Any) -> list[Case]:
    """The same row for LoHa and LoKr, with a core for convolution kernels."""
    rest["use_effective_conv2d"] = True
    # in its own backward pass for LoHa peft takes the core of the other product
    return [_row("loha", id, base, **rest, wrong_in_peft=("hada_w1_a", "hada_w2_a")), _row("lokr", id, base, **rest)]


def _prompt(id: str, method: str, base: Factory, task_type: str, **rest: Any) -> Case:
    """A row for a prompt method: one prompt acts at a time, and a new one changes what the model says."""
    facts = {name: rest.pop(name) for name in ("other", "arguments", "reparameterised") if name in rest}
    facts.setdefault("other", {"num_virtual_tokens": 2})
    rest = {"task_type": task_type, "num_virtual_tokens": 3, **rest}
    return Case(f"{method}-{id}", method, base, rest, starts_as_base=False, together=False, **facts)


def _prompts(method: str, **rest: Any) -> list[Case]:
    """Rows of a prompt method for each task."""
    tasks = {
        "bert-seq-cls": (models.bert_classifier, "SEQ_CLS"),
        "bert-token-cls": (models.bert_tagger, "TOKEN_CLS"),
        "gpt2": (models.gpt2, "CAUSAL_LM"),
        "gemma2": (models.gemma2, "CAUSAL_LM"),
        "gemma3": (models.gemma3_tied, "CAUSAL_LM"),
        "opt": (models.opt, "CAUSAL_LM"),
        "t5": (models.t5, "SEQ_2_SEQ_LM"),
    }
    return [_prompt(id, method, base, task, **rest) for id, (base, task) in tasks.items()]


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
    _lora("gemma2", models.gemma2, task_type="CAUSAL_LM", r=4),
    _lora("vit", models.vit, target_modules=["q_proj", "fc2", "projection"], r=4),
    _lora("t5", models.t5, task_type="SEQ_2_SEQ_LM", r=4),
    _lora("t5-feedforward", models.t5, task_type="SEQ_2_SEQ_LM", r=4, target_modules=["wi", "wo", "k"]),
    _lora("conv", models.conv_net, target_modules=["conv1", "conv2", "head"], r=4),
    _lora("conv1d", models.conv1d_net, target_modules=["conv1", "conv2"], r=4),
    _lora("conv3d", models.conv3d_net, target_modules=["conv1", "conv2"], r=4),
    _lora("conv-rank-over-width", models.conv_net, target_modules=["conv1"], r=12),
    _lora("mlp", models.mlp, target_modules=["layers.0", "layers.1"], modules_to_save=["head"], r=4, together=False),
    _lora("mlp-embedding", models.mlp, target_modules=["emb", "layers.0"], r=4),
    _lora(
        "mlp-embedding-random", models.mlp, target_modules=["emb"], r=4, init_lora_weights=False, starts_as_base=False
    ),
    _lora("mlp-embedding-gaussian", models.mlp, target_modules=["emb"], r=4, init_lora_weights="gaussian"),
    _lora("bert-lora-bias", models.bert_classifier, r=4, lora_bias=True),
    _lora("conv-lora-bias", models.conv_net, target_modules=["conv1", "head"], r=4, lora_bias=True, lora_alpha=4),
    _lora("bert-dora", models.bert_classifier, r=4, use_dora=True),
    _lora("bert-dora-unequal", models.bert_classifier, r=4, use_dora=True, other={"use_dora": False, "r": 2}),
    _lora("bert-dora-second", models.bert_classifier, r=4, other={"use_dora": True, "lora_alpha": 2}),
    _lora("bert-dora-dropout", models.bert_classifier, r=4, use_dora=True, lora_dropout=0.3),
    _lora("gpt2-dora", models.gpt2, task_type="CAUSAL_LM", r=4, fan_in_fan_out=True, use_dora=True),
    _lora("conv-dora", models.conv_net, target_modules=["conv1", "conv2", "head"], r=4, use_dora=True),
    _lora("conv-dora-dropout", models.conv_net, target_modules=["conv1", "conv2"], use_dora=True, lora_dropout=0.3),
    _lora("mlp-dora", models.mlp, target_modules=["emb", "layers.0"], r=4, use_dora=True),
    _lora("gemma3-dora", models.gemma3_untied, target_modules=["embed_tokens", "v_proj"], r=4, use_dora=True),
    _lora("attention", models.parts, target_modules=["attention"], r=4, by_row=False, same_layers=False),
    _lora("attention-too", models.parts, target_modules=["attention", "head"], by_row=False, same_layers=False),
    _lora("experts", models.parts, target_modules=[], target_parameters=["experts.up"], r=4, by_row=False),
    _lora("experts-2d", models.parts, target_modules=["head"], target_parameters=["down"], r=4, by_row=False),
    _lora(
        "experts-both",
        models.parts,
        target_modules=[],
        target_parameters=["experts.up", "experts.down"],
        rank_pattern={"experts.up": 2},
        alpha_pattern={"down": 3},
        by_row=False,
        same_layers=False,
    ),
    _lora("bert-pissa", models.bert_classifier, r=4, init_lora_weights="pissa", other=None, keeps_base=False),
    _lora("gpt2-pissa", models.gpt2, fan_in_fan_out=True, init_lora_weights="pissa", other=None, keeps_base=False),
    _lora("bert-olora", models.bert_classifier, r=4, init_lora_weights="olora", other=None, keeps_base=False),
    _lora(
        "bert-pissa-dora",
        models.bert_classifier,
        r=4,
        lora_alpha=2,
        init_lora_weights="pissa",
        use_dora=True,
        other=None,
        keeps_base=False,
    ),
    _lora("bert-orthogonal", models.bert_classifier, r=4, init_lora_weights="orthogonal"),
    _lora("bert-mica", models.bert_classifier, r=4, init_lora_weights="mica"),
    _lora("mlp-mica", models.mlp, target_modules=["emb", "layers.0"], r=4, init_lora_weights="mica"),
    _lora("bert-eva", models.bert_classifier, r=4, init_lora_weights="eva"),
    _lora("conv-lora-ga", models.conv_net, target_modules=["conv1", "head"], r=4, init_lora_weights="lora_ga"),
    _lora(
        "llama-alora",
        models.llama_untied,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        alora_invocation_tokens=[TOKENS[0]],
        other={"alora_invocation_tokens": [TOKENS[1]]},
        together=False,
        merges=False,
    ),
    _lora("bert-kasa", models.bert_classifier, r=4, kasa_config={}, other=None, starts_as_base=False, keeps_base=False),
    _lora(
        "bert-bdlora",
        models.bert_classifier,
        target_modules=["query", "dense"],
        use_bdlora={"target_modules_bd_a": ["query"], "target_modules_bd_b": ["intermediate"], "match_strict": False}
        | {"nblocks": 4},
    ),
    _lora("bert-velora", models.bert_classifier, r=4, velora_config={"num_groups": 5, "init_type": "random"}),
    _adalora("bert-seq-cls", models.bert_classifier, task_type="SEQ_CLS", init_r=4, target_r=2),
    _adalora("bert-no-task", models.bert_classifier, lora_alpha=3),
    _adalora(
        "bert-layers",
        models.bert_classifier,
        target_modules=["dense"],
        layers_to_transform=[1],
        init_r=4,
        lora_alpha=32,
    ),
    _adalora("bert-random", models.bert_classifier, init_r=4, init_lora_weights=False, starts_as_base=False),
    _adalora("bert-dropout", models.bert_classifier, init_r=4, lora_dropout=0.3),
    _adalora("bert-bias", models.bert_classifier, init_r=4, bias="lora_only"),
    _adalora("bert-modules-to-save", models.bert_classifier, init_r=4, modules_to_save=["classifier"]),
    _adalora("gpt2", models.gpt2, task_type="CAUSAL_LM", fan_in_fan_out=True, init_r=4),
    _adalora("gpt2-tokens", models.gpt2, fan_in_fan_out=True, init_r=4, trainable_token_indices=TOKENS),
    _adalora("gemma2", models.gemma2, task_type="CAUSAL_LM", init_r=4),
    _adalora("vit", models.vit, target_modules=["q_proj", "fc2"], modules_to_save=["classifier"], init_r=4),
    _adalora("llama", models.llama_tied, task_type="CAUSAL_LM", target_modules="all-linear", init_r=4),
    _adalora("opt", models.opt, task_type="CAUSAL_LM"),
    _adalora("t5", models.t5, task_type="SEQ_2_SEQ_LM", init_r=3),
    _adalora("conv", models.conv_net, target_modules=["conv1", "conv2", "head"], init_r=4, lora_dropout=0.2),
    _adalora("mlp", models.mlp, target_modules=["layers.0", "layers.1"], modules_to_save=["head"], init_r=20),
    _adaption_prompt("llama", models.llama_tied, adapter_len=4, adapter_layers=2),
    _adaption_prompt("llama-top", models.llama_untied, adapter_len=3, adapter_layers=1, task_type=None),
    _adaption_prompt("mistral", models.mistral, adapter_len=4, adapter_layers=2, target_modules="self_attn"),
    _adaption_prompt("gpt2", models.gpt2, adapter_len=4, adapter_layers=1),
    _ia3("bert-seq-cls", models.bert_classifier, task_type="SEQ_CLS", together=False),
    _ia3("bert-no-task", models.bert_classifier),
    _ia3("bert-no-feedforward", models.bert_classifier, target_modules=["key", "value"], feedforward_modules=[]),
    _ia3("bert-regex", models.bert_classifier, target_modules=r".*(key|dense)", feedforward_modules=r".*output\.dense"),
    _ia3("bert-random", models.bert_classifier, init_ia3_weights=False, starts_as_base=False),
    _ia3("bert-exclude", models.bert_classifier, exclude_modules=["layer.0.attention.self.key"]),
    _ia3("gpt2", models.gpt2, task_type="CAUSAL_LM", fan_in_fan_out=True),
    _ia3("gemma2", models.gemma2, task_type="CAUSAL_LM"),
    _ia3("vit", models.vit, target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
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
    _ia3("conv3d", models.conv3d_net, target_modules=["conv1", "conv2"], feedforward_modules=["conv2"]),
    _ia3("conv-groups", models.conv_groups, target_modules=["conv1", "conv2"], feedforward_modules=["conv2"]),
    *_lycoris("bert-seq-cls", models.bert_classifier, task_type="SEQ_CLS", r=4, together=False),
    *_lycoris("bert-no-task", models.bert_classifier, r=4, alpha=6),
    *_lycoris(
        "bert-unequal", models.bert_classifier, r=2, other={"r": 3, "alpha": 5, "target_modules": ["query", "dense"]}
    ),
    *_lycoris(
        "bert-all-linear", models.bert_classifier, target_modules="all-linear", exclude_modules=["pooler.dense"], r=2
    ),
    *_lycoris("bert-layers", models.bert_classifier, target_modules=["value"], layers_to_transform=[1], r=2),
    *_lycoris(
        "bert-patterns",
        models.bert_classifier,
        target_modules=["query", "value", "pooler.dense"],
        r=4,
        rank_pattern={"query": 2, r".*layer\.1\..*value": 1},
        alpha_pattern={"value": 5, "pooler.dense": 1},
    ),
    *_lycoris("bert-dropout", models.bert_classifier, r=2, rank_dropout=0.3, module_dropout=0.2),
    *_lycoris("bert-random", models.bert_classifier, r=2, init_weights=False, starts_as_base=False),
    *_lycoris("llama", models.llama_tied, task_type="CAUSAL_LM", r=1),
    *_lycoris("gemma2", models.gemma2, task_type="CAUSAL_LM", r=2),
    *_lycoris("vit", models.vit, target_modules=["q_proj", "fc2", "projection"], r=2),
    *_lycoris("opt", models.opt, task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "fc1", "fc2"]),
    *_lycoris("t5", models.t5, task_type="SEQ_2_SEQ_LM", r=2),
    *_lycoris("mlp", models.mlp, target_modules=["layers.0"], modules_to_save=["head"], r=2, together=False),
    *_lycoris("conv", models.conv_net, target_modules=["conv1", "conv2", "head"], r=2),
    *_lycoris("conv-dropout", models.conv_net, target_modules=["conv1", "conv2"], rank_dropout=0.3, module_dropout=0.2),
    *_lycoris("conv1d", models.conv1d_net, target_modules=["conv1", "conv2"], r=2),
    *_lycoris("conv-groups", models.conv_groups, target_modules=["conv1", "conv2"], r=2),
    *_effective("conv-effective", models.conv_net, target_modules=["conv1", "conv2", "head"], r=2),
    *_effective("conv1d-effective", models.conv1d_net, target_modules=["conv1", "conv2"], r=2),
    *_effective("conv-groups-effective", models.conv_groups, target_modules=["conv1", "conv2"], r=2),
    _lokr("bert-both", models.bert_classifier, r=1, decompose_both=True),
    _lokr("bert-factor", models.bert_classifier, target_modules=["query", "dense"], r=2, decompose_factor=2),
    _lokr("bert-lycoris", models.bert_classifier, r=1, init_weights="lycoris"),
    _lokr("bert-whole-lycoris", models.bert_classifier, r=8, init_weights="lycoris"),
    _lokr("bert-scaled-dropout", models.bert_classifier, rank_dropout=0.3, module_dropout=0.1, rank_dropout_scale=True),
    _tokens("bert", models.bert_classifier),
    _tokens("bert-padding", models.bert_classifier, token_indices=[0, 3]),
    _tokens("bert-random", models.bert_classifier, init_weights=False, starts_as_base=False),
    _tokens("gpt2-tied", models.gpt2, task_type="CAUSAL_LM"),
    _tokens("llama-tied", models.llama_tied, task_type="CAUSAL_LM"),
    _tokens("llama-untied", models.llama_untied, task_type="CAUSAL_LM"),
    _tokens("llama-head", models.llama_untied, task_type="CAUSAL_LM", target_modules=["lm_head"]),
    _tokens("gemma2-tied", models.gemma2, task_type="CAUSAL_LM"),
    _tokens("gemma3-scaled", models.gemma3_tied, task_type="CAUSAL_LM"),
    _tokens("t5-tied", models.t5, task_type="SEQ_2_SEQ_LM"),
    _tokens("opt", models.opt, task_type="CAUSAL_LM"),
    _tokens("mlp", models.mlp, target_modules=["emb"]),
    *_prompts("prompt_tuning"),
    _prompt("llama-sampled", "prompt_tuning", models.llama_untied, "CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
    _prompt("opt-one", "prompt_tuning", models.opt, "CAUSAL_LM", num_virtual_tokens=1),
    _prompt("bert-saved", "prompt_tuning", models.bert_classifier, "SEQ_CLS", modules_to_save=["pooler"]),
    *_prompts("prefix_tuning"),
    _prompt("llama", "prefix_tuning", models.llama_untied, "CAUSAL_LM", init_weights="zero"),
    _prompt("t5-deep", "prefix_tuning", models.t5_deep, "SEQ_2_SEQ_LM"),
    _prompt(
        "llama-projection",
        "prefix_tuning",
        models.llama_tied,
        "CAUSAL_LM",
        prefix_projection=True,
        encoder_hidden_size=5,
        reparameterised=True,
    ),
    _prompt("t5-projection", "prefix_tuning", models.t5, "SEQ_2_SEQ_LM", prefix_projection=True, reparameterised=True),
    *_prompts("p_tuning", reparameterised=True),
    _prompt("llama", "p_tuning", models.llama_untied, "CAUSAL_LM", encoder_hidden_size=5, reparameterised=True),
    _prompt(
        "llama-lstm",
        "p_tuning",
        models.llama_untied,
        "CAUSAL_LM",
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=5,
        encoder_num_layers=1,
        reparameterised=True,
    ),
    *[
        case
        for case in _prompts("multitask_prompt_tuning", num_tasks=3, num_ranks=2, arguments={"task_ids": [0, 2, 1, 0]})
        if case.base is not models.t5  # of an encoder-decoder peft loses the decoder's input; see test_prompts
    ],
]
