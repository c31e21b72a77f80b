"""AdaLoRA in a study: it learns the number of steps from the study, and its triplets are dropped in training."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from workbench.adapters import PeftModel

METHODS = """
adalora:
  init_r: 4
  target_r: {values: [1, 2]}
  tinit: 1
  tfinal: 3
  target_modules: [query, value]
  learning_rate: 1e-2
"""


def test_a_sweep(lab: Any) -> None:
    """Both trials end with their budget: 4 layers with `target_r` triplets on average."""
    done = lab.write(METHODS, budget="{trials: 2}", more="search: {sampler: grid, pruner: none}\n").sweep()
    assert done.code == 0, done.err
    kept = []
    for run in lab.trials:
        folder = lab.adapter(run)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["total_step"] == 10
        values = load_file(folder / "adapter_model.safetensors")
        kept.append(sum(len(value) for key, value in values.items() if key.endswith("lora_E")))
        assert kept[-1] == sum(map(sum, config["rank_pattern"].values())) == 4 * config["target_r"]
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(lab.model), folder)
    assert sorted(kept) == [4, 8]


def test_a_schedule_that_is_too_long_is_found_in_the_file(lab: Any) -> None:
    done = lab.write(METHODS.replace("tfinal: 3", "tfinal: {values: [3, 9]}")).sweep()
    assert done.code == 2
    assert "don't allow for a budgeting phase" in done.err
    assert f"study.yaml:{1 + lab.file.read_text().splitlines().index('    tfinal: {values: [3, 9]}')}:" in done.err
