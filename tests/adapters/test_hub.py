"""Cards, uploads, base models found by themselves, and files for another version of a class."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from workbench import adapters
from workbench.adapters import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    hub,
)
from workbench.errors import CheckpointError, ConfigError

from . import models
from .models import inputs, output

# --- cards ---


def card(library: Any, folder: Path, before: str | None = None, **options: Any) -> ModelCard:
    folder.mkdir()
    if before is not None:
        (folder / "README.md").write_text(before)
    base: Any = models.opt()
    base.add_model_tags(["small"])
    base.name_or_path = base.config._name_or_path = "someone/small-opt"  # as if it came from the hub
    config = library.LoraConfig(target_modules=["q_proj"], **options)
    library.get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    "before", [None, "---\nlicense: mit\n---\nMine.\n", "# Mine\n\n### Framework versions\n\n- x 1"]
)
def test_cards_say_what_those_of_peft_say(tmp_path: Path, before: str | None, task_type: str | None) -> None:
    mine = card(adapters, tmp_path / "mine", before, task_type=task_type)
    theirs = card(peft, tmp_path / "theirs", before, task_type=task_type)
    assert mine.data.to_dict() == theirs.data.to_dict()
    assert mine.text == theirs.text


def test_own_tags_stay(tmp_path: Path) -> None:
    mine = card(adapters, tmp_path / "mine", "---\ntags: [mine]\n---\nText.\n")
    assert {"mine", "small", "lora"} < set(mine.data.to_dict()["tags"])


def test_a_plain_model_has_no_base(tmp_path: Path) -> None:
    get_peft_model(models.mlp(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.tags, data.library_name) == (None, ["lora"], "peft")


# --- uploads ---


@dataclass
class FakeHub:
    """What `HfApi` does of an upload, on a dict."""

    token: Any = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def __call__(self, token: Any = None) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("repo", options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("branch", options))

    def upload_folder(self, folder_path: str, **options: Any) -> str:
        self.calls.append(("commit", options))
        self.files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")}
        return "done"


def test_pushing_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    model = get_peft_model(models.mlp(), LoraConfig(target_modules="all-linear"))
    model.add_adapter("second", LoraConfig(target_modules="all-linear"))
    assert model.push_to_hub("small", private=True, token="t", revision="dev", commit_message="one") == "done"
    assert fake.token == "t"
    assert [name for name, _ in fake.calls] == ["repo", "branch", "commit"]
    assert fake.calls[0][1]["private"] is True
    assert fake.calls[2][1]["repo_id"] == "me/small"
    assert (fake.calls[2][1]["revision"], fake.calls[2][1]["commit_message"]) == ("dev", "one")
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert fake.files == own | {f"second/{name}" for name in own - {"README.md"}}
    fake.calls.clear()
    model.push_to_hub("small", selected_adapters=["default"], revision="dev", create_pr=True)
    assert [name for name, _ in fake.calls] == ["repo", "commit"]
    assert fake.files == own


def test_pushing_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    LoraConfig().push_to_hub("small")
    assert fake.files == {"adapter_config.json"}


def test_downloads_get_the_arguments_that_they_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever else is passed on for the base model is left out."""
    LoraConfig().save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    PeftConfig.from_pretrained("me/small", revision="dev", subfolder="second", dtype="float16", use_safetensors=True)
    assert asked == {"repo_id": "me/small", "revision": "dev", "subfolder": "second"}


# --- base models found by themselves ---


@pytest.fixture
def base(tmp_path: Path) -> Any:
    models.opt().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_finds_its_base(base: Any, task_type: str | None, tmp_path: Path) -> None:
    model = get_peft_model(base, LoraConfig(task_type=task_type, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM if task_type else AutoPeftModel
    found = auto.from_pretrained(tmp_path / "adapter")
    assert isinstance(found, auto._target_peft_class)
    given = inputs(models.opt)
    assert torch.equal(output(found, given), output(model, given))
    half = auto.from_pretrained(tmp_path / "adapter", "other", True, dtype=torch.bfloat16)
    assert half.get_base_model().dtype == torch.bfloat16
    assert half.peft_config["other"].inference_mode is False


def test_a_larger_tokenizer_makes_room_first(base: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    rows = models.VOCAB + 3
    base.resize_token_embeddings(rows)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="size mismatch"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokenizer = Tokenizer(WordLevel({str(n): n for n in range(rows)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(found.get_base_model().get_input_embeddings().weight) == rows  # type: ignore[operator]


def test_the_class_must_be_that_of_the_task(base: Any, tmp_path: Path) -> None:
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    for auto in (AutoPeftModel, AutoPeftModelForSequenceClassification):
        with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModel(base)


def test_files_name_no_package_to_import(base: Any, tmp_path: Path) -> None:
    config = LoraConfig(auto_mapping={"parent_library": "os", "base_model_class": "system"})
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'os' which is not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path)
    with pytest.raises(AttributeError):  # a function and no class, but imported
        AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["os"])
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="neither a task type nor"):
        AutoPeftModel.from_pretrained(tmp_path)


# --- what `get_peft_model` mentions ---


def test_names_of_bases_are_the_models(base: Any) -> None:
    with pytest.warns(UserWarning, match=r"renamed from 'mine' to '.*base'"):
        model = get_peft_model(base, LoraConfig(base_model_name_or_path="mine"))
    assert model.peft_config["default"].base_model_name_or_path == base.name_or_path
    with pytest.warns(UserWarning, match="second time"):
        get_peft_model(base, LoraConfig(target_modules=["k_proj"]))


def test_revisions_overwrite() -> None:
    with pytest.warns(UserWarning, match="already set base model revision to a, overwriting with revision b"):
        model = get_peft_model(models.opt(), LoraConfig(revision="a"), revision="b")
    assert model.peft_config["default"].revision == "b"


@pytest.mark.parametrize(("name", "warns"), [("lora", True), ("ora_", True), ("adapter", False)])
def test_names_that_peft_confuses(name: str, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        get_peft_model(models.opt(), LoraConfig(), adapter_name=name)
        get_peft_model(models.opt(), LoraConfig()).add_adapter(name, LoraConfig())
    assert sum(f"Adapter name '{name}' should not be" in str(w.message) for w in seen) == (2 if warns else 0)


# --- loading ---


class Before(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.model = nn.Linear(4, 4), nn.ModuleDict({"layers": nn.Linear(4, 4)})


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = {"visual": nn.Linear(4, 4), "language_model": nn.ModuleDict({"layers": nn.Linear(4, 4)})}
        self.model = nn.ModuleDict(inner)


RENAMED = {"^visual": "model.visual", "^model(?!\\.(language_model|visual))": "model.language_model"}


@pytest.mark.parametrize("said_by", ["class", "argument"])
def test_files_of_an_older_class(said_by: str, tmp_path: Path) -> None:
    old = get_peft_model(Before(), LoraConfig(target_modules=["visual", "layers"], init_lora_weights=False))
    old.save_pretrained(tmp_path)
    base = After()
    if said_by == "class":
        base._checkpoint_conversion_mapping = RENAMED  # type: ignore[assignment]
    new = PeftModel.from_pretrained(base, tmp_path, key_mapping=RENAMED if said_by == "argument" else None)
    assert torch.equal(new.model.model.visual.lora_A.default.weight, old.model.visual.lora_A.default.weight)
    new.load_adapter(tmp_path, "second", key_mapping=RENAMED)
    layers = new.model.model.language_model.layers
    assert torch.equal(layers.lora_B.second.weight, old.model.model.layers.lora_B.default.weight)
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(After(), tmp_path)


def test_a_loaded_adapter_trains_if_asked(tmp_path: Path) -> None:
    get_peft_model(models.mlp(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(models.mlp(), tmp_path, is_trainable=True).train()
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert model.training
    model.load_adapter(tmp_path, "frozen", torch_device="cpu", low_cpu_mem_usage=True)
    assert not model.training
    trains = {name for name in ("default", "trained", "frozen") for p in own(model, name) if p.requires_grad}
    assert trains == {"default", "trained"}


def own(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f".{adapter}." in name]


def test_offloading_is_for_methods_that_know_it(tmp_path: Path) -> None:
    get_peft_model(models.opt(), LoraConfig()).save_pretrained(tmp_path / "lora")
    model = PeftModel.from_pretrained(models.opt(), tmp_path / "lora", ephemeral_gpu_offload=True)
    model.load_adapter(tmp_path / "lora", "second", ephemeral_gpu_offload=True)
    configs: list[Any] = list(model.peft_config.values())
    assert [config.runtime_config.ephemeral_gpu_offload for config in configs] == [True, True]
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(models.opt(), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.warns(UserWarning, match="not supported for this model"):
        PeftModel.from_pretrained(models.opt(), tmp_path / "prefix", ephemeral_gpu_offload=True)


def test_only_a_configuration_will_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(models.mlp(), tmp_path, config={"r": 8})  # type: ignore[arg-type]
