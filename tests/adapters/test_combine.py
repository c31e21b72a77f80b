"""add_weighted_adapter gives the adapter that peft gives, and the status functions say what peft says."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import workbench.adapters as ours
from workbench.errors import AdapterError

LORA: dict[str, Any] = {"target_modules": ["lin0", "emb", "conv"], "lora_alpha": 6}
SETTINGS = [
    {"combination_type": "linear"},
    {"combination_type": "cat"},
    {"combination_type": "svd"},
    {"combination_type": "svd", "svd_rank": 2, "svd_clamp": 0.9},
    {"combination_type": "ties", "density": 0.5},
    {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
    {"combination_type": "ties_svd", "density": 0.5},
    {"combination_type": "dare_linear", "density": 0.5},
    {"combination_type": "dare_ties", "density": 0.5},
    {"combination_type": "dare_linear_svd", "density": 0.7},
    {"combination_type": "magnitude_prune", "density": 0.5},
    {"combination_type": "magnitude_prune_svd", "density": 0.5},
]


class Net(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(1, 4, 3)
        self.lin0 = nn.Linear(4 * 2 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv(self.emb(x)[:, None]).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def both(config: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, Any]:
    """Our model and peft's with the same two adapters of random weights."""
    models: list[Any] = []
    for library in (ours, peft):
        cls = getattr(library, config)
        model = library.get_peft_model(net(), cls(**first))
        model.add_adapter("second", cls(**second))
        for i, name in enumerate(("default", "second")):
            generator = torch.Generator().manual_seed(i)
            state = library.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            values = {key: torch.randn(value.shape, generator=generator) for key, value in sorted(state.items())}
            library.set_peft_model_state_dict(model, values, name)
        models.append(model)
    return models[0], models[1]


def same(mine: Any, theirs: Any, name: str) -> None:
    """Both models give the same output with this adapter."""
    x = torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(9))
    for model in (mine, theirs):
        model.set_adapter(name)
        model.eval()
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.7, -0.3]], ids=["positive", "negative"])
@pytest.mark.parametrize("how", SETTINGS, ids=lambda how: "-".join(map(str, how.values())))
def test_lora_adapters_combine_as_in_peft(how: dict[str, Any], weights: list[float]):
    # peft draws dare's mask for the transpose of an embedding's update
    targets = ["lin0", "conv"] if how["combination_type"].startswith("dare") else LORA["target_modules"]
    config = LORA | {"target_modules": targets, "r": 3}
    mine, theirs = both("LoraConfig", config, config | {"lora_alpha": 2})
    for model in (mine, theirs):
        torch.manual_seed(5)  # dare draws at random
        model.add_weighted_adapter(["default", "second"], weights, "new", **how)
    assert mine.peft_config["new"].r == theirs.peft_config["new"].r
    same(mine, theirs, "new")


def test_other_ranks_and_other_modules():
    mine, theirs = both("LoraConfig", {"r": 3, **LORA}, {"r": 4, "target_modules": ["lin0"]})
    for model in (mine, theirs):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "cat", combination_type="cat")
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "svd", combination_type="svd")
    assert mine.peft_config["cat"].r == 7
    same(mine, theirs, "cat")
    same(mine, theirs, "svd")


def test_ia3_adapters_are_summed():
    config = {"target_modules": ["lin0", "conv"], "feedforward_modules": ["lin0"]}
    mine, theirs = both("IA3Config", config, config)
    for model in (mine, theirs):
        model.add_weighted_adapter(["default", "second"], [0.4, 0.6], "new")
    same(mine, theirs, "new")


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "how"),
    [
        (["default", "missing"], [1.0, 1.0], "new", {}),
        (["default", "second"], [1.0], "new", {}),
        (["default", "second"], [1.0, 1.0], "second", {}),
        (["default", "second"], [1.0, 1.0], "new", {"combination_type": "linear"}),
        (["default", "second"], [1.0, 1.0], "new", {"combination_type": "unheard-of"}),
        (["default", "second"], [1.0, 1.0], "new", {"combination_type": "ties_svd"}),
    ],
    ids=["unknown", "weights", "taken", "ranks", "kind", "density"],
)
def test_what_cannot_be_combined_is_refused(adapters: list[str], weights: list[float], name: str, how: dict[str, Any]):
    mine, _ = both("LoraConfig", {"r": 3, **LORA}, {"r": 4, **LORA})
    with pytest.raises(AdapterError):
        mine.add_weighted_adapter(adapters, weights, name, **how)
    assert list(mine.peft_config) == ["default", "second"]


def test_the_status_is_that_of_peft():
    mine, theirs = both("LoraConfig", {"r": 3, **LORA}, {"r": 3, "target_modules": ["lin0"]})
    fields = ("name", "enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices")
    for change in (
        lambda model: None,
        lambda model: model.set_adapter("second"),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
    ):
        for model in (mine, theirs):
            change(model)
        for a, b in zip(mine.get_layer_status(), theirs.get_layer_status(), strict=True):
            assert {f: getattr(a, f) for f in fields} == {f: getattr(b, f) for f in fields}
        a, b = vars(mine.get_model_status()), vars(theirs.get_model_status())
        assert a == b
    mine.base_model.disable_adapter_layers()
    assert mine.get_model_status().enabled is False


def test_a_model_without_adapters_has_no_status():
    with pytest.raises(AdapterError):
        ours.get_layer_status(net())
