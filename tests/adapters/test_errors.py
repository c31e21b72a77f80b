"""What the adapter core refuses, with which error, and that a refusal leaves the model as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from workbench.adapters import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from workbench.errors import AdapterError, AdapterNameError, CheckpointError, ConfigError, MergeError, TargetError

from . import models
from .models import VOCAB, Factory, inputs, output

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that must survive a refusal: modules, parameters, buffers, their bits and whether they train."""
    modules = {name: type(module) for name, module in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    values = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    adapters = (list(model.peft_config), model.active_adapters) if isinstance(model, PeftModel) else ()
    return modules, trains, values, adapters


@contextmanager
def refused(model: nn.Module, error: type[AdapterError], message: str = "") -> Iterator[None]:
    """What happens inside raises this error and changes nothing in the model."""
    before = snapshot(model)
    with pytest.raises(error, match=message):
        yield
    assert snapshot(model) == before


# --- targets ---


@pytest.mark.parametrize(
    ("base", "make", "message"),
    [
        pytest.param(models.bert_classifier, lambda: LoraConfig(target_modules=["q_proj"]), "query", id="unknown"),
        pytest.param(models.bert_classifier, lambda: LoraConfig(target_modules="query"), "query", id="regex-of-a-part"),
        pytest.param(
            models.bert_classifier,
            lambda: LoraConfig(target_modules=["query"], exclude_modules=["query"]),
            "exclude_modules",
            id="all-excluded",
        ),
        pytest.param(
            models.bert_classifier,
            lambda: LoraConfig(target_modules=["query"], layers_to_transform=[7]),
            "layers_to_transform",
            id="no-such-layer",
        ),
        pytest.param(models.bert_classifier, lambda: LoraConfig(target_modules=["LayerNorm"]), "LayerNorm", id="kind"),
        pytest.param(
            models.mlp, lambda: IA3Config(target_modules=["emb"], feedforward_modules=[]), "Embedding", id="ia3-kind"
        ),
        pytest.param(models.mlp, lambda: LoraConfig(), "target_modules", id="no-default"),
        pytest.param(models.mlp, lambda: IA3Config(feedforward_modules=[]), "target_modules", id="ia3-no-default"),
        pytest.param(
            models.mlp, lambda: TrainableTokensConfig(token_indices=[1]), "target_modules", id="tokens-no-default"
        ),
        pytest.param(
            models.conv_net,
            lambda: TrainableTokensConfig(token_indices=[1], target_modules=["conv1"]),
            "conv1",
            id="tokens-kind",
        ),
        pytest.param(
            models.llama_untied,
            lambda: LoraConfig(trainable_token_indices={"embeddings": [1]}),
            "embeddings",
            id="tokens-of-nothing",
        ),
    ],
)
def test_targets(base: Factory, make: Callable[[], Any], message: str) -> None:
    model = base()
    with refused(model, TargetError, message):
        get_peft_model(model, make())


def test_unknown_target_names_what_there_is() -> None:
    """The message lists modules that could be meant."""
    with pytest.raises(TargetError) as refusal:
        get_peft_model(models.bert_classifier(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name in ("q_proj", "query", "value", "dense", "classifier"):
        assert name in str(refusal.value)


# --- configuration values ---


@pytest.mark.parametrize(
    ("method", "field", "values"),
    [
        (LoraConfig, "r", {"r": 0}),
        (LoraConfig, "r", {"r": -4}),
        (LoraConfig, "r", {"r": 2.5}),
        (LoraConfig, "r", {"r": "8"}),
        (LoraConfig, "r", {"r": True}),
        (LoraConfig, "rank_pattern", {"rank_pattern": {"query": 0}}),
        (LoraConfig, "lora_dropout", {"lora_dropout": 1.0}),
        (LoraConfig, "lora_dropout", {"lora_dropout": -0.1}),
        (LoraConfig, "bias", {"bias": "some"}),
        (LoraConfig, "init_lora_weights", {"init_lora_weights": "spectral"}),
        (LoraConfig, "task_type", {"task_type": "TRANSLATION"}),
        (LoraConfig, "target_modules", {"target_modules": 3}),
        (LoraConfig, "target_modules", {"target_modules": ["query", 3]}),
        (LoraConfig, "target_modules", {"target_modules": "(query"}),
        (LoraConfig, "exclude_modules", {"exclude_modules": "*query"}),
        (LoraConfig, "layers_to_transform", {"target_modules": ".*query", "layers_to_transform": [0]}),
        (LoraConfig, "layers_pattern", {"target_modules": ["query"], "layers_pattern": "layer"}),
        (IA3Config, "feedforward_modules", {"target_modules": ["query"], "feedforward_modules": ["dense"]}),
        (TrainableTokensConfig, "token_indices", {"token_indices": [3, 3]}),
        (TrainableTokensConfig, "token_indices", {"token_indices": [3, -1]}),
        (TrainableTokensConfig, "token_indices", {"token_indices": [3, 1.5]}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_values(method: type, field: str, values: dict[str, Any]) -> None:
    """A configuration refuses a wrong value as it is made, and says which field is to blame."""
    with pytest.raises(ConfigError) as refusal:
        method(**values)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("base", "make"),
    [
        pytest.param(models.mlp, lambda: IA3Config(target_modules=["layers.0"]), id="no-default-feedforward"),
        pytest.param(models.bert_classifier, lambda: TrainableTokensConfig(token_indices=[VOCAB]), id="token-outside"),
        pytest.param(models.bert_classifier, lambda: TrainableTokensConfig(token_indices=[]), id="no-tokens"),
        pytest.param(models.llama_tied, lambda: LoraConfig(trainable_token_indices=[VOCAB]), id="lora-token-outside"),
        pytest.param(models.llama_tied, lambda: LoraConfig(trainable_token_indices=[2, 2]), id="lora-token-doubled"),
        pytest.param(
            models.llama_untied,
            lambda: LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[2]),
            id="embedding-adapted-twice",
        ),
        pytest.param(
            models.bert_classifier,
            lambda: LoraConfig(
                target_modules=["query"], modules_to_save=["classifier"], trainable_token_indices={"": [1]}
            ),
            id="tokens-of-no-name",
        ),
    ],
)
def test_configuration_does_not_fit(base: Factory, make: Callable[[], Any]) -> None:
    model = base()
    with refused(model, ConfigError):
        get_peft_model(model, make())


# --- adapter names ---


def adapted(base: Factory = models.bert_classifier, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(r=2, init_lora_weights=False, **options)).eval()


# the last ones are attributes of the torch modules that hold adapters by name
@pytest.mark.parametrize("name", ["", "a.b", "__base__", "keys", "training", "forward"])
def test_malformed_names(name: str) -> None:
    model = models.bert_classifier()
    with refused(model, AdapterNameError):
        get_peft_model(model, LoraConfig(), adapter_name=name)
    several = adapted()
    with refused(several, AdapterNameError):
        several.add_adapter(name, LoraConfig())


def test_taken_name() -> None:
    model = adapted()
    with refused(model, AdapterNameError, "default"):
        model.add_adapter("default", LoraConfig())


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda model: model.set_adapter("other"), id="set"),
        pytest.param(lambda model: model.base_model.set_adapter(["default", "other"]), id="set-both"),
        pytest.param(lambda model: model.delete_adapter("other"), id="delete"),
        pytest.param(lambda model: model.merge_adapter(adapter_names=["other"]), id="merge"),
        pytest.param(lambda model: model.merge_and_unload(adapter_names=["other"]), id="unload"),
        pytest.param(
            lambda model: model(**inputs(models.bert_classifier), adapter_names=["default"] * 3 + ["other"]), id="rows"
        ),
        pytest.param(
            lambda model: model(**inputs(models.bert_classifier), adapter_names=["default"] * 3), id="too-few-rows"
        ),
    ],
)
def test_unknown_names(use: Callable[[PeftModel], Any]) -> None:
    model = adapted()
    with refused(model, AdapterNameError):
        use(model)
    before = output(adapted(), inputs(models.bert_classifier))
    torch.testing.assert_close(output(model, inputs(models.bert_classifier)), before, atol=0, rtol=0)


def test_unknown_name_to_save(tmp_path: Path) -> None:
    model = adapted()
    with refused(model, AdapterNameError, "other"):
        model.save_pretrained(tmp_path / "folder", selected_adapters=["other"])


# --- several adapters ---


def test_second_adapter_of_another_method() -> None:
    model = adapted()
    with refused(model, AdapterError, "IA3"):
        model.add_adapter("second", IA3Config())


def test_second_adapter_with_biases() -> None:
    model = adapted(bias="lora_only")
    with refused(model, ConfigError, "bias"):
        model.add_adapter("second", LoraConfig(bias="lora_only"))


def test_second_adapter_that_does_not_fit() -> None:
    model = adapted()
    with refused(model, TargetError, "query"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))


def test_rows_while_merged() -> None:
    model = adapted()
    model.merge_adapter()
    with refused(model, MergeError, "unmerge"):
        model(**inputs(models.bert_classifier), adapter_names=["default"] * models.ROWS)


def test_delete_while_merged() -> None:
    model = adapted()
    model.merge_adapter()
    with refused(model, MergeError, "unmerge"):
        model.delete_adapter("default")


def test_merge_of_non_finite_weights() -> None:
    model = adapted()
    with torch.no_grad():
        list(model.base_model.adapted_layers())[-1][1].lora_B["default"].weight.fill_(float("nan"))
    with refused(model, MergeError):
        model.merge_adapter(safe_merge=True)
    with refused(model, MergeError):
        model.merge_and_unload(safe_merge=True)


# --- files ---


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def last_key(tensors: dict[str, Any]) -> str:
    return max(tensors)


def widen(tensors: dict[str, Any]) -> None:
    tensors[last_key(tensors)] = torch.ones(99, 99)


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[AdapterError], str]] = {
    "no-folder": (shutil.rmtree, CheckpointError, ""),
    "no-config": (lambda folder: (folder / CONFIG).unlink(), CheckpointError, CONFIG),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), CheckpointError, WEIGHTS),
    "pickled": (pickle_instead, CheckpointError, "pickle"),
    "truncated": (truncate, CheckpointError, WEIGHTS),
    "empty-weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), CheckpointError, WEIGHTS),
    "config-not-json": (lambda folder: (folder / CONFIG).write_text("{"), CheckpointError, CONFIG),
    "config-a-list": (lambda folder: (folder / CONFIG).write_text("[]"), CheckpointError, CONFIG),
    "config-not-text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), CheckpointError, CONFIG),
    "no-method": (lambda folder: (folder / CONFIG).write_text("{}"), CheckpointError, CONFIG),
    "unknown-method": (lambda folder: rewrite_config(folder, peft_type="NOVEL"), AdapterError, "NOVEL"),
    "unknown-option": (lambda folder: rewrite_config(folder, megatron_config={"a": 1}), ConfigError, "megatron"),
    "other-rank": (lambda folder: rewrite_config(folder, r=3), CheckpointError, "size mismatch"),
    "other-targets": (lambda folder: rewrite_config(folder, target_modules=["query"]), CheckpointError, "value"),
    "more-targets": (
        lambda folder: rewrite_config(folder, target_modules=["query", "key", "value"]),
        CheckpointError,
        "key",
    ),
    "tensor-missing": (lambda folder: rewrite_weights(folder, lambda t: t.pop(last_key(t))), CheckpointError, ""),
    "tensor-too-many": (
        lambda folder: rewrite_weights(folder, lambda t: t.update(x=torch.ones(1))),
        CheckpointError,
        "x",
    ),
    "tensor-misshapen": (lambda folder: rewrite_weights(folder, widen), CheckpointError, "size mismatch"),
}
damages = pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES)


@damages
def test_damaged_files(damage: Callable[[Path], Any], error: type[AdapterError], message: str, tmp_path: Path) -> None:
    """Neither a plain base model nor one with an adapter is changed by a file that cannot be used."""
    folder = tmp_path / "adapter"
    adapted(bias="lora_only", modules_to_save=["classifier"]).save_pretrained(folder)
    damage(folder)
    base = models.bert_classifier()
    with refused(base, error, message):
        PeftModel.from_pretrained(base, folder)
    model = adapted()
    with refused(model, error, message):
        model.load_adapter(folder, "second")


@pytest.mark.parametrize("base", [models.bert_tagger, models.opt, models.mlp], ids=["head", "names", "plain"])
def test_files_of_another_base(base: Factory, tmp_path: Path) -> None:
    adapted(modules_to_save=["classifier"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    if base is models.bert_tagger:  # the same modules, but a head for as many classes as there were rows before
        rewrite_weights(
            tmp_path, lambda t: t.update({"base_model.model.classifier.weight": torch.ones(5, models.HIDDEN)})
        )
    model = base()
    with refused(model, AdapterError):
        PeftModel.from_pretrained(model, tmp_path)


def test_loading_over_a_filled_adapter(tmp_path: Path) -> None:
    """A file that does not fit leaves an adapter of the same name with the values it had."""
    adapted(modules_to_save=["classifier"]).save_pretrained(tmp_path)
    rewrite_weights(tmp_path, widen)
    model = adapted(modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with refused(model, CheckpointError, "size mismatch"):
        model.load_adapter(tmp_path, "default")


def test_no_pickles_are_written(tmp_path: Path) -> None:
    model = adapted()
    with refused(model, CheckpointError, "pickle"):
        model.save_pretrained(tmp_path / "folder", safe_serialization=False)
    assert not (tmp_path / "folder").exists()


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = adapted()
    with refused(model, CheckpointError, "file"):
        model.save_pretrained(tmp_path / "file")
