"""Adapters of other methods, converted to LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from workbench import adapters
from workbench.adapters.convert import convert_to_lora, save_as_lora
from workbench.errors import ConfigError, TargetError

from . import models
from .cases import CASES, Case
from .test_conformance import build, far, forward, pair, same

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = [c for c in CASES if c.method in ("loha", "lokr", "lora") and c.base is models.bert_classifier]
LINEAR = [c for c in LINEAR if c.options.get("bias", "none") == "none" and not c.options.get("lora_bias")]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_full_rank_is_exact(case: Case, tmp_path: Path) -> None:
    """All singular values give the same output, and so in peft; a converted file is a LoRA file like any other."""
    ours, _ = pair(case)
    expected = forward(ours, case)
    save_as_lora(tmp_path, ours, rank=1.0)
    same(forward(ours, case), expected)
    for library in (adapters, peft):
        loaded: Any = library.PeftModel.from_pretrained(case.base(), str(tmp_path)).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        same(forward(loaded, case), expected)


def test_rank() -> None:
    """A number is the rank of all; a share gives each layer the smallest rank that reaches it."""
    case = next(c for c in CASES if c.id == "lokr-bert-whole-lycoris")
    ours, _ = pair(case)
    config, tensors = convert_to_lora(ours, rank=5)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (5, 5, {})
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {5}
    for rank in (0.5, 0.9, 1.0):
        config, tensors = convert_to_lora(ours, rank=rank)
        assert config.alpha_pattern == config.rank_pattern
        for path, chosen in config.rank_pattern.items():
            lora_A, lora_B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            assert lora_A.shape[0] == lora_B.shape[1] == chosen
            energy = torch.linalg.svdvals(ours.get_submodule(f"base_model.model.{path}").adapters["default"].delta())
            reached = energy.square().cumsum(0) / energy.square().sum()
            assert reached[chosen - 1] >= rank - 1e-6
            assert chosen == 1 or rank == 1.0 or reached[chosen - 2] < rank


@pytest.mark.parametrize(("rank", "message"), [(0, "rank of 0"), (1.5, "between 0 and 1"), (17, "larger than")])
def test_refused_ranks(rank: float, message: str) -> None:
    case = next(c for c in CASES if c.id == "lokr-bert-no-task")
    with pytest.raises(ConfigError, match=message):
        convert_to_lora(build(adapters, case), rank)


@pytest.mark.parametrize("id", ["ia3-bert-no-task", "lokr-conv", "lora-bert-lora-bias", "tokens-bert"])
def test_what_is_no_update_of_a_linear_layer_is_refused(id: str) -> None:
    case = next(c for c in CASES if c.id == id)
    with pytest.raises(TargetError, match="do not support LoRA conversion"):
        convert_to_lora(pair(case)[0], 2)


def test_transposed_layers() -> None:
    case = next(c for c in CASES if c.id == "lora-gpt2")
    ours, _ = pair(case)
    config, tensors = convert_to_lora(ours, rank=case.options["r"])
    assert {key: t.shape for key, t in tensors.items()} == {
        key: t.shape for key, t in adapters.get_peft_model_state_dict(ours).items()
    }
    lora = adapters.get_peft_model(case.base(), config).eval()
    adapters.set_peft_model_state_dict(lora, tensors)
    assert far(forward(case.base(), case), forward(ours, case))
    same(forward(lora, case), forward(ours, case))
    assert torch.isfinite(forward(lora, case)).all()
