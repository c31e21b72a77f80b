"""Configurations and their files, beside those of peft."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest

from workbench.adapters import (
    METHODS,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    config,
    get_peft_config,
)
from workbench.errors import ConfigError, NotAnAdapterError

# AdaLoRA: a study knows the steps, and plain values do not
REQUIRED: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}}

every_method = pytest.mark.parametrize("name", METHODS)


def new(name: str, **options: Any) -> PeftConfig:
    return METHODS[name].config(**REQUIRED.get(name, {}), **options)


def theirs(name: str, **options: Any) -> Any:
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(str(METHODS[name].config.peft_type))]
    return cls(**REQUIRED.get(name, {}), **options)


@every_method
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_values_are_those_of_peft(name: str, task_type: str | None) -> None:
    assert new(name, task_type=task_type).to_dict() == theirs(name, task_type=task_type).to_dict()


@every_method
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    mine, other = new(name), theirs(name)
    mine.save_pretrained(tmp_path / "mine")
    other.save_pretrained(tmp_path / "theirs")
    read = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("mine", "theirs")]
    assert json.loads(read[0]) == json.loads(read[1])
    assert PeftConfig.from_pretrained(tmp_path / "theirs") == mine
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "mine")).to_dict() == other.to_dict()


@every_method
def test_the_class_knows_its_method(name: str) -> None:
    made = new(name, peft_type="something else")
    assert isinstance(made.peft_type, PeftType)
    assert made.peft_type.value == METHODS[name].config.peft_type == theirs(name).peft_type.value
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert type(PeftConfig.from_peft_type(peft_type=made.peft_type, **REQUIRED.get(name, {}))) is type(made)
    assert get_peft_config(made.to_dict()) == made


def test_maps_say_what_peft_says() -> None:
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(PEFT_TYPE_TO_PREFIX_MAPPING) == set(PeftType)
    for peft_type, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        assert prefix == peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(peft_type.value)]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="NOVEL"):
        PeftConfig.from_peft_type(peft_type="NOVEL")


def test_options_of_newer_files_are_ignored_aloud(tmp_path: Path) -> None:
    """But those that are off are not worth a word."""
    LoraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"novel": None, "bold": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(r=3)
    path.write_text(json.dumps(values | {"novel": 1, "bold": "very"}))
    with pytest.warns(UserWarning, match=r"\['bold', 'novel'\] for class LoraConfig"):
        assert PeftConfig.from_pretrained(tmp_path) == LoraConfig(r=3)


def test_runtime_options_are_not_read(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert "runtime_config" not in values
    path.write_text(json.dumps(values | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="runtime_config"):
        read = LoraConfig.from_pretrained(tmp_path)
    assert not read.runtime_config.ephemeral_gpu_offload  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"r": 8}'])
def test_other_files_are_no_configurations(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(NotAnAdapterError, match=r"adapter_config\.json") as error:
        PeftConfig.from_pretrained(tmp_path)
    assert isinstance(error.value, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(task_type="TRANSLATION"), "following task types: SEQ_CLS, SEQ_2_SEQ_LM"),
        (lambda: IA3Config(target_modules=["k"], feedforward_modules=["q"]), "^`feedforward_modules` should be a"),
        (lambda: LoraConfig(target_modules="a", layers_pattern="b"), "cannot be used when `target_modules` is a str"),
    ],
)
def test_values_that_do_not_fit_each_other(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_ranks_that_adalora_does_not_use_are_mentioned() -> None:
    with pytest.warns(UserWarning, match="Note that `r` is not used in AdaLora"):
        AdaLoraConfig(r=10, total_step=10)


class TestVersion:
    def test_it_is_that_of_the_format(self) -> None:
        assert LoraConfig().peft_version == peft.__version__
        assert LoraConfig(peft_version="0.9").peft_version == "0.9"

    @pytest.mark.parametrize(("commit", "noted"), [("abc", "abc"), (None, "UNKNOWN")])
    def test_a_development_version_has_its_commit(
        self, commit: str | None, noted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(config, "__version__", "1.0.dev3")
        monkeypatch.setattr(config, "_get_commit_hash", lambda package: commit)
        assert LoraConfig().peft_version == f"1.0.dev3@{noted}"

    def test_the_commit_is_the_one_that_pip_noted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "somewhere-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: somewhere\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert config._get_commit_hash("somewhere") is None
        (folder / "direct_url.json").write_text(json.dumps({"url": "x", "vcs_info": {"commit_id": "abc"}}))
        assert config._get_commit_hash("somewhere") == "abc"
        assert config._get_commit_hash("nowhere-at-all") is None


def test_bookkeeping_comes_first() -> None:
    """In peft's order, so that positional arguments mean the same."""
    assert [f.name for f in fields(PeftConfig)] == [f.name for f in fields(peft.PeftConfig)]
