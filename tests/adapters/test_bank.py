"""The bank against each of its models alone, for every case of the table that can be in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench import adapters
from workbench.adapters.bank import Bank, BankedLayer, obstacle
from workbench.adapters.dropout import seed_dropout
from workbench.adapters.groups import Groups
from workbench.adapters.registry import METHODS
from workbench.errors import AdapterError, LayerKindError

from . import models
from .cases import CASES, Case
from .models import inputs, output

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-6
SIZES = [(2, 2, 2), (3, 1, 4), (2, 0, 3)]


def made(base: nn.Module, *configs: adapters.PeftConfig, train: bool = True) -> dict[str, Any]:
    """Models on one base, detached, with random values in all that trains."""
    trials = {}
    for seed, config in enumerate(configs):
        torch.manual_seed(seed)
        trial = adapters.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in trained(trial):
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        for _, part in trial.base_model.parts("default"):
            part.train(train)
        trial.detach()
        trials[f"trial-{seed}"] = trial
    return trials


def configs(case: Case) -> list[adapters.PeftConfig]:
    """The case's configuration, that of its second adapter and another one that differs in rank."""
    config = METHODS[case.method].config
    ranks: dict[str, Any] = {"lora": {"r": 8, "lora_alpha": 7}, "adalora": {"init_r": 5}, "loha": {"r": 3}}
    options = [{}, case.other or {}, ranks.get(case.method, {})]
    return [config(**(case.options | {"task_type": None} | more)) for more in options]


def trained(trial: Any) -> list[nn.Parameter]:
    return [p for _, part in trial.base_model.parts("default") for p in part.parameters() if p.requires_grad]


def rows(factory: models.Factory, size: int) -> dict[str, Tensor]:
    return {name: tensor[:size] for name, tensor in inputs(factory).items()}


def weighted(y: Tensor) -> Tensor:
    """A scalar whose gradient with respect to every entry differs and is at most about 1 in all."""
    draw = torch.Generator().manual_seed(5)
    return (y * torch.randn(y.shape, generator=draw)).sum() / math.sqrt(y.numel())


def gradients(trial: Any) -> list[Tensor | None]:
    """The gradients of what trains, which are taken away."""
    taken = [parameter.grad for parameter in trained(trial)]
    for parameter in trained(trial):
        parameter.grad = None
    return taken


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-6 of the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= TOLERANCE * max(1, expected.abs().max().item())


def same_gradients(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Asserts that they are; whether there are any, since rows may hold none of the tokens that train."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            same(a, e)
    return any(e is not None and bool(e.any()) for e in expected)


def alone(trial: Any, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """A model's output and gradients with its adapter alone on the base model."""
    trial.attach()
    y = output(trial.get_base_model(), given)
    weighted(y).backward()
    trial.detach()
    return y.detach(), gradients(trial)


def together(trials: dict[str, Any], given: list[dict[str, Tensor]]) -> list[Tensor]:
    """The models' outputs in a bank, with their gradients."""
    base = next(iter(trials.values())).get_base_model()
    sizes = [len(next(iter(rows.values()))) for rows in given]
    with Bank(trials) as bank:
        bank.sizes = sizes
        batch = {name: torch.cat([rows[name] for rows in given]) for name in given[0]}
        parts = output(base, batch).split(sizes)
        sum(weighted(part) for part in parts if len(part)).backward()  # type: ignore[union-attr]
    return [part.detach() for part in parts]


UNBANKABLE = {"bias", "alora_invocation_tokens", "kasa_config"}
IMAGES = {*models.CONV_NETS, models.vit}
BANKABLE = [
    case
    for case in CASES
    if METHODS[case.method].kinds
    and case.method != "adaption_prompt"
    and case.base is not models.parts
    and case.keeps_base
    and not UNBANKABLE & case.options.keys()
]


@pytest.fixture(params=["where it pays", "always"], autouse=True)
def stacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU groups of unequal sizes go one by one, on a GPU never."""
    if request.param == "always":
        monkeypatch.setattr(Groups, "worth_stacking", lambda *_: True)


@pytest.mark.parametrize("case", BANKABLE, ids=lambda case: case.id)
def test_outputs_and_gradients_are_those_of_each_alone(case: Case) -> None:
    trials = made(case.base(), *configs(case), train=not any("dropout" in option for option in case.options))
    assert not any(map(obstacle, trials.values()))
    moved = False
    for sizes in SIZES:
        given = [rows(case.base, size) for size in sizes]
        parts = together(trials, given)
        for trial, own, part in zip(trials.values(), given, parts, strict=True):
            banked = gradients(trial)
            if len(part):
                y, expected = alone(trial, own)
                same(part, y)
                moved |= same_gradients(banked, expected)
    assert moved


@pytest.mark.parametrize("case", [c for c in BANKABLE if c.base not in IMAGES], ids=lambda case: case.id)
def test_packed_tokens(case: Case) -> None:
    """Each layer by itself, on tokens (1, tokens, features) or (1, tokens) that belong to three models."""
    base = case.base()
    trials = made(base, *configs(case), train=False)
    sizes = (3, 5, 4)
    wrappers = [
        {id(site.module): wrapper for site, wrapper in trial.base_model.wrapped_sites()} for trial in trials.values()
    ]
    with Bank(trials) as bank:
        bank.sizes, bank.dim = sizes, 1
        for layer in [module for module in base.modules() if isinstance(module, BankedLayer)]:
            x = packed(layer.base_layer, sum(sizes))
            y = layer(x)
            weighted(y).backward()
            banked = [gradients(trial) for trial in trials.values()]
            own = zip(wrappers, x.split(sizes, 1), strict=True)
            expected = torch.cat([held.get(id(layer.base_layer), layer.base_layer)(part) for held, part in own], 1)
            weighted(expected).backward()
            same(y.detach(), expected.detach())
            for actual, trial in zip(banked, trials.values(), strict=True):
                same_gradients(actual, gradients(trial))


def packed(layer: Any, tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    if isinstance(layer, nn.Embedding):
        return torch.randint(2, models.VOCAB, (1, tokens), generator=draw)
    width: int = getattr(layer, "in_features", getattr(layer, "nx", models.HIDDEN))
    return torch.randn(1, tokens, width, generator=draw)


# --- mixes of methods ---


def mix() -> list[adapters.PeftConfig]:
    """Seven trials: three of LoRA that differ in rank, scaling, targets and dropout, and one of each other kind; the
    last one has a head alone, since its prompt is not the bank's."""
    head: dict[str, Any] = {"task_type": "SEQ_CLS"}
    return [
        adapters.LoraConfig(r=4, **head),
        adapters.LoraConfig(r=2, lora_alpha=3, target_modules=["query", "dense"], **head),
        adapters.LoraConfig(r=3, lora_dropout=0.4, **head),
        adapters.IA3Config(**head),
        adapters.LoHaConfig(r=2, target_modules=["query", "value"], modules_to_save=["pooler"], **head),
        adapters.TrainableTokensConfig(token_indices=models.TOKENS, **head),
        adapters.PromptTuningConfig(num_virtual_tokens=2, **head),
    ]


def masks(number: int) -> Any:
    """A source that draws the same for the same dropout, whenever it is asked."""

    def source(x: Tensor, p: float) -> Tensor:
        draw = torch.Generator().manual_seed(number)
        return (torch.rand(x.shape, generator=draw) >= p).to(x.dtype) / (1 - p)

    return source


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mix_of_methods(checkpointing: bool) -> None:
    base: Any = models.bert_classifier()
    trials = made(base, *mix())
    for trial in trials.values():
        seed_dropout(trial, masks)
    base.train()  # it has no dropout, but checkpoints only when it trains
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    given = [rows(models.bert_classifier, size) for size in (2, 3, 1, 4, 2, 1, 2)]
    for trial, own, part in zip(trials.values(), given, together(trials, given), strict=True):
        if trial is not trials["trial-6"]:
            banked = gradients(trial)
            y, expected = alone(trial, own)
            same(part, y)
            same_gradients(banked, expected)


def test_heads_alone() -> None:
    """Where all groups replace a layer it does not run, and where a trial has only a head, nothing else of it is
    there."""
    base: Any = models.bert_classifier()
    configs = [adapters.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS") for _ in range(3)]
    trials = made(base, *configs)
    before = set(map(id, base.modules()))
    with Bank(trials) as bank:
        assert [id(m) not in before for m in base.modules() if isinstance(m, BankedLayer)] == [True]
        base.classifier.base_layer.forward = None  # must not be called
        bank.sizes = [1, 3, 2]
        x = torch.randn(6, models.HIDDEN)
        y = base.classifier(x)
    heads = [trial.base_model.adapted_layers() for trial in trials.values()]
    for (_, layer), own, part in zip((next(h) for h in heads), x.split([1, 3, 2]), y.split([1, 3, 2]), strict=True):
        same(part.detach(), layer.adapter("default").modules_to_save(own).detach())


@pytest.mark.parametrize("poisoned", range(7))
def test_a_nan_stays_in_its_group(poisoned: int) -> None:
    trials = made(models.bert_classifier(), *mix())
    for trial in trials.values():
        seed_dropout(trial, masks)
    given = [rows(models.bert_classifier, size) for size in (2, 3, 1, 4, 2, 1, 2)]
    clean = together(trials, given)
    expected = {name: gradients(trial) for name, trial in trials.items()}
    with torch.no_grad():
        for parameter in trained(trials[f"trial-{poisoned}"]):
            parameter.fill_(math.nan)
    for index, (part, before, name) in enumerate(zip(together(trials, given), clean, trials, strict=True)):
        own = gradients(trials[name])
        if index == poisoned:
            assert part.isnan().all()
        else:
            torch.testing.assert_close(part, before, atol=0, rtol=0)
            torch.testing.assert_close(own, expected[name], atol=0, rtol=0)


def test_afterwards_the_base_is_plain_and_answers_as_before() -> None:
    base: Any = models.llama_tied()
    kinds, names = [type(m) for m in base.modules()], [*base.state_dict()]
    configs = [adapters.LoraConfig(target_modules=["q_proj", "embed_tokens"], r=r) for r in (2, 3)]
    trials = made(base, *configs)
    with Bank(trials):
        assert [type(m) for m in base.modules()] != kinds
        assert base.model.embed_tokens.weight is base.lm_head.weight
        assert base.model.layers[0].self_attn.q_proj.in_features == models.HIDDEN
    assert [type(m) for m in base.modules()] == kinds
    assert [*base.state_dict()] == names


# --- refusals ---


@pytest.mark.parametrize(
    ("base", "config", "reason"),
    [
        (models.bert_classifier, adapters.LoraConfig(bias="lora_only"), "biases"),
        (models.bert_classifier, adapters.LoraConfig(init_lora_weights="pissa"), "base model's weight"),
        (models.llama_tied, adapters.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "beyond single tokens"),
        (models.llama_tied, adapters.LoraConfig(alora_invocation_tokens=[3], task_type="CAUSAL_LM"), "beyond single"),
        (models.bert_classifier, adapters.LoraConfig(velora_config={}), "beyond single tokens"),
        (models.parts, adapters.LoraConfig(target_modules=["attention"]), "beyond single tokens"),
        (
            models.parts,
            adapters.LoraConfig(target_modules=[], target_parameters=["experts.up"]),
            "beyond single tokens",
        ),
        (models.gpt2, adapters.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "beyond single"),
    ],
    ids=lambda value: None if callable(value) or isinstance(value, str) else "",
)
def test_what_cannot_be_in_a_bank(base: models.Factory, config: adapters.PeftConfig, reason: str) -> None:
    trials = made(base(), config)
    (trial,) = trials.values()
    assert reason in (obstacle(trial) or "")
    with pytest.raises(AdapterError, match="train it alone"):
        Bank(trials)


def test_models_must_be_detached_and_of_one_base() -> None:
    trials = made(models.mlp(), adapters.LoraConfig(target_modules=["head"]))
    trials["trial-0"].attach()
    with pytest.raises(AdapterError, match="detached"):
        Bank(trials)
    trials["trial-0"].detach()
    other = made(models.mlp(), adapters.LoraConfig(target_modules=["head"]))["trial-0"]
    with pytest.raises(AdapterError, match="same base model"):
        Bank(trials | {"other": other})


def test_groups_must_make_up_the_batch() -> None:
    base = models.mlp()
    with Bank(made(base, adapters.LoraConfig(target_modules=["head"]))) as bank:
        for sizes, dim in (([3], 0), ([5], 1), ([0], 0)):
            bank.sizes, bank.dim = sizes, dim
            with pytest.raises(LayerKindError, match="make up"):
                base(**inputs(models.mlp))
