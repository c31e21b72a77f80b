"""LoRA's starts that need data, and what becomes of a base model of which they took a part; peft is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda
from safetensors.torch import load_file
from torch import nn

from workbench import adapters
from workbench.adapters.incremental_pca import IncrementalPCA
from workbench.adapters.methods import lora_init

from . import models
from .models import inputs, output
from .test_conformance import exactly, far, keyed, same

pytestmark = pytest.mark.filterwarnings("ignore")


def config(library: Any, init: str, **more: Any) -> Any:
    return library.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=init, **more)


def run(model: nn.Module) -> Any:
    with torch.no_grad():
        return output(model, inputs(models.bert_classifier))


def bases() -> tuple[nn.Module, nn.Module]:
    return models.bert_classifier(), models.bert_classifier()


def same_products(ours: nn.Module, theirs: nn.Module) -> None:
    """B A is equal in every layer, whatever the signs of singular vectors."""
    mine, expected = keyed(adapters, ours), keyed(peft, theirs)
    assert mine.keys() == expected.keys()
    for key in mine:
        if key.endswith("lora_A.weight"):
            up = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(mine[up] @ mine[key], expected[up] @ expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(method: str) -> None:
    mine, base = bases()
    peft_config = config(peft, "corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method))
    our_config = config(adapters, "corda", corda_config=adapters.CordaConfig(corda_method=method))
    # peft's hook takes a batch of one, and makes a vector of the pooler's input, which has no length
    our_config.exclude_modules = peft_config.exclude_modules = {"pooler.dense"}

    def one_by_one(model: nn.Module) -> None:
        given = inputs(models.bert_classifier)
        for row in range(models.ROWS):
            model(**{name: value[row : row + 1] for name, value in given.items()})

    with torch.no_grad():
        adapters.preprocess_corda(mine, our_config, lambda: one_by_one(mine))
        peft_preprocess_corda(base, peft_config, run_model=lambda: one_by_one(base))
    ours = adapters.get_peft_model(mine, our_config)
    theirs = peft.get_peft_model(base, peft_config)
    same_products(ours, theirs)
    torch.testing.assert_close(run(ours), run(models.bert_classifier()), atol=1e-4, rtol=0)


def test_corda_files(tmp_path: Path) -> None:
    """Covariances and decompositions are kept in safetensors files and used instead of data."""
    first, again, third = (models.bert_classifier() for _ in range(3))
    options = adapters.CordaConfig(cache_file=f"{tmp_path}/cache/c", covariance_file=f"{tmp_path}/covariances")
    adapters.preprocess_corda(first, config(adapters, "corda", corda_config=options), lambda: run(first))
    adapters.preprocess_corda(again, config(adapters, "corda", corda_config=options))
    exactly(again.bert.pooler.dense.eigens.U_WC, first.bert.pooler.dense.eigens.U_WC)
    assert set(load_file(options.covariance_file)) >= {"bert.pooler.dense"}
    options.cache_file = None
    adapters.preprocess_corda(third, config(adapters, "corda", corda_config=options))
    exactly(third.bert.pooler.dense.eigens.V_WC, first.bert.pooler.dense.eigens.V_WC)


def test_corda_needs_its_preparation() -> None:
    with pytest.raises(ValueError, match="preprocess_corda"):
        adapters.get_peft_model(models.bert_classifier(), config(adapters, "corda"))


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_lora_ga(direction: str, scale: str) -> None:
    mine, base = bases()
    made = []
    for library, model in ((adapters, mine), (peft, base)):
        ga = library.LoraGAConfig if library is adapters else peft.tuners.lora.config.LoraGAConfig
        options = config(library, "lora_ga", lora_ga_config=ga(direction=direction, scale=scale, stable_gamma=8))

        def step(model: nn.Module = model) -> None:
            output(model, inputs(models.bert_classifier)).square().sum().backward()

        prepare = adapters.preprocess_loraga if library is adapters else peft.tuners.lora.preprocess_loraga
        prepare(model, options, step)
        torch.manual_seed(0)
        made.append(library.get_peft_model(model, options))
    same_products(*made)
    torch.testing.assert_close(run(made[0]), run(models.bert_classifier()), atol=1e-4, rtol=0)


def batches() -> list[dict[str, torch.Tensor]]:
    """Token ids with labels, some of which are ignored."""
    given = inputs(models.llama_untied)
    made = []
    for shift in range(3):
        ids = (given["input_ids"] + shift) % models.VOCAB
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
        made[-1]["labels"][0, :2] = -100
    return made


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva(rho: float, whiten: bool) -> None:
    # q and v have the same input, whose directions peft whitens in place: twice
    targets = ["q_proj", "o_proj"] if whiten else ["q_proj", "v_proj", "o_proj"]
    made = []
    for library in (adapters, peft):
        options = library.EvaConfig(rho=rho, tau=0.9, whiten=whiten)
        model = library.get_peft_model(
            models.llama_untied(),
            library.LoraConfig(r=2, target_modules=targets, init_lora_weights="eva", eva_config=options),
        )
        library.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
        made.append(model)
    ours, theirs = made
    mine, expected = keyed(adapters, ours), keyed(peft, theirs)
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(mine[key], value, atol=1e-4, rtol=1e-4)
    here, there = ours.peft_config["default"], theirs.peft_config["default"]
    assert here.rank_pattern == there.rank_pattern
    assert here.alpha_pattern == there.alpha_pattern
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trains) == len(mine)
    with torch.no_grad():
        same(output(ours, inputs(models.llama_untied)), output(theirs, inputs(models.llama_untied)))


def test_eva_state_of_a_base_model() -> None:
    options = adapters.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config={"tau": 0.9})
    found = adapters.get_eva_state_dict(models.llama_untied(), batches(), options, show_progress_bar=False)
    expected = peft.get_eva_state_dict(
        models.llama_untied(),
        batches(),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.9)),
        show_progress_bar=False,
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lowrank", [False, True])
def test_incremental_pca(lowrank: bool) -> None:
    data = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    made = []
    for cls in (IncrementalPCA, peft.utils.incremental_pca.IncrementalPCA):
        pca = cls(n_components=3, lowrank=lowrank, lowrank_seed=1 if lowrank else None)
        for batch in data.split(30):
            pca.partial_fit(batch)
        made.append(pca)
    for name in ("components_", "singular_values_", "mean_", "var_", "explained_variance_ratio_", "noise_variance_"):
        torch.testing.assert_close(getattr(made[0], name), getattr(made[1], name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "loftq"])
def test_base_comes_back(init: str) -> None:
    """The base model is what it was, to the bit, when the adapter is taken off in whatever way."""
    more = {"loftq_config": adapters.LoftQConfig(loftq_iter=2)} if init == "loftq" else {}
    base = models.bert_classifier()
    before = copy.deepcopy(base.state_dict())
    ours = adapters.get_peft_model(base, config(adapters, init, **more))
    assert far(base.bert.pooler.dense.base_layer.weight, before["bert.pooler.dense.weight"])
    ours.add_adapter("second", adapters.LoraConfig(target_modules=["query"]))
    ours.merge_adapter()
    ours.unmerge_adapter()
    ours.delete_adapter("default")
    ours.unload()
    for key, value in base.state_dict().items():
        exactly(value, before[key])
    adapters.get_peft_model(base, config(adapters, init, **more)).unload()
    for key, value in base.state_dict().items():
        exactly(value, before[key])


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_conversion(init: str, rslora: bool, tmp_path: Path) -> None:
    """A trained adapter is saved as a plain one for the base model as it was; peft reads it as well."""
    ours = adapters.get_peft_model(models.bert_classifier(), config(adapters, init, lora_alpha=6, use_rslora=rslora))
    ours.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    trained = run(ours.eval())
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert ours.peft_config["default"].r == 4
    for library in (adapters, peft):
        loaded = library.PeftModel.from_pretrained(models.bert_classifier(), tmp_path / "plain")
        assert loaded.peft_config["default"].r == 8
        assert loaded.peft_config["default"].init_lora_weights is True
        torch.testing.assert_close(run(loaded), trained, atol=1e-4, rtol=1e-4)


def test_nf4_levels() -> None:
    """The sixteen numbers of the QLoRA paper's appendix E."""
    levels = lora_init.nf4(torch.linspace(-1, 1, 64 * 64).view(64, 64), block=64 * 64).unique()
    expected = torch.tensor(
        [
            *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
        ]
    )
    torch.testing.assert_close(levels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_quantisation(bits: int) -> None:
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(48, 32)
    layer.weight.data = W.clone()
    options = adapters.LoraConfig(
        init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 3}, target_modules=["x"]
    )
    start = lora_init.loftq(layer, 8, 1.0, options)
    quantised = lora_init.nf4(W) if bits == 4 else lora_init.int8(W)
    assert (start.base + start.B @ start.A - W).norm() < 0.9 * (quantised - W).norm()
