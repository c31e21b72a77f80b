"""`compile: true` trains as without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from .places import config_of, made_settings, make_place, same


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU, here is no g++")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_change_nothing(tmp_path: Path) -> None:
    place = make_place("classifying", tmp_path)
    settings = made_settings(steps=4)
    expected = place.alone(config_of("lora", place.base), settings)
    torch._dynamo.utils.counters.clear()
    actual = place.alone(config_of("lora", place.base), settings.model_copy(update={"compile": True}))
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    same(actual, expected, weights=1e-4)
