"""Which modules names mean, what is said where they mean none, and what a model says of its adapted layers; peft is the
oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from peft.tuners import tuners_utils
from peft.utils.other import _get_module_names_tied_with_embedding
from torch import nn

from workbench import adapters
from workbench.adapters import matching, status, tying
from workbench.adapters.inject import LONG_LIST
from workbench.errors import ConfigError, LayerKindError, MergeError

from . import models
from .test_conformance import exactly

quiet = pytest.mark.filterwarnings("ignore")


def wrap(base: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
    """The same model with the same LoRA configuration, ours and peft's."""
    return tuple(
        library.get_peft_model(base(), library.LoraConfig(**{"r": 2} | options)) for library in (adapters, peft)
    )


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.lin1 = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)


# --- names ---


@pytest.mark.parametrize(
    "path", ["", "q", "h.1.q", "h.0.q", "a.h.1.q", "a.h.1.e.0.q", "e.0.h.1.q", "h.01.q", "xq", "a.q.b"]
)
def test_matching_as_in_peft(path: str) -> None:
    patterns: list[Any] = [None, "", [], "h", ["e", "h"]]
    layers = [{"layers_to_transform": n, "layers_pattern": p} for n in ([], 1, [0, 1]) for p in patterns]
    limits: list[dict[str, Any]] = [{}]
    limits += [{"exclude_modules": e} for e in (["q"], "h.*", ["h.1.q"], [])]
    limits += [{"modules_to_save": s} for s in (["q"], ["a"], ["h.1"])]
    for names in [], ["q"], ["h.1.q"], ["x", "q"], "q", ".*q", "a.*":
        for limit in limits if isinstance(names, str) else limits + layers:
            config = SimpleNamespace(target_modules=names, **limit)
            assert matching.is_target(config, path) is bool(tuners_utils.check_target_module_exists(config, path))


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        (["a.0.q", "a.1.q"], ["a.0.k"]),
        (["a.0.q", "a.1.q"], ["b.0.q"]),
        (["a.b.c", "d.e.f", "g.h.i"], ["a.b.x", "d.x.f", "x.h.i"]),
        (["a.proj", "a.proj_out", "a.emb_proj"], ["proj_in", "emb_proj.b"]),
        (["q", "a.q"], ["k"]),
    ],
)
def test_short_names_as_in_peft(targets: list[str], others: list[str]) -> None:
    chosen = matching.minimal_names(targets, others)
    assert chosen == tuners_utils._find_minimal_target_modules(targets, others)
    assert all(matching.named(path, chosen) for path in targets)
    assert not any(matching.named(path, chosen) for path in others)


@pytest.mark.parametrize(("targets", "others"), [([], ["a"]), ("a", []), (["", "a"], []), (["a", "b"], ["b"])])
def test_names_that_cannot_be_told_apart(targets: Any, others: list[str]) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        matching.minimal_names(targets, others)


class Blocks(nn.Module):
    """More layers of one kind than a long list has names, and some others whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(LONG_LIST))
        self.more_blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2))


def test_a_long_list_is_shortened() -> None:
    """It means the same modules, and the configuration's file says the same as peft's."""
    for count in (LONG_LIST, LONG_LIST - 1):
        wanted = [f"blocks.{i}.q" for i in range(count)]
        ours, theirs = wrap(Blocks, target_modules=wanted)
        assert ours.targeted_module_names == theirs.targeted_module_names == wanted
        assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    scale = adapters.IA3Config(target_modules=wanted, feedforward_modules=wanted)
    adapters.get_peft_model(Blocks(), scale)
    assert scale.target_modules == set(wanted)


@dataclass
class Settings:
    width: int = 2


@pytest.mark.parametrize("config", [None, {"a": 1}, Settings(), models.gpt2().config], ids=lambda c: type(c).__name__)
def test_configurations_of_models(config: Any) -> None:
    model = nn.Linear(2, 2)
    if config is not None:
        model.config = config
    assert matching.get_model_config(model) == peft.tuners.tuners_utils.BaseTuner.get_model_config(model)


# --- nothing matches ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "Target modules .* not found in the base model"),
        ({"target_modules": ["lin0", "nothing"], "exclude_modules": ["lin0"]}, "No modules were targeted"),
        ({"target_modules": ["nothing"], "modules_to_save": ["lin1"]}, "No modules were targeted"),
        ({"target_modules": ".*", "exclude_modules": ".*"}, "All modules were excluded"),
        (
            {"target_modules": ["lin0"], "trainable_token_indices": {"nothing": [1]}},
            "Target modules {'nothing'} not found",
        ),
    ],
)
def test_no_match(options: dict[str, Any], message: str) -> None:
    for library in (adapters, peft):
        error = library.NoMatchingPeftModuleError if "trainable_token_indices" not in options else ValueError
        with pytest.raises(error, match=message):
            library.get_peft_model(Small(), library.LoraConfig(**options))
    assert issubclass(adapters.NoMatchingPeftModuleError, adapters.PeftError)


def test_an_exclusion_that_excludes_nothing() -> None:
    for library in (adapters, peft):
        with pytest.warns(UserWarning, match="You have passed exclude_modules=.* but no modules were excluded"):
            library.get_peft_model(Small(), library.LoraConfig(target_modules=["lin0"], exclude_modules=["no"]))


@pytest.mark.parametrize("container", [nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList])
def test_containers_do_not_train_as_a_whole(container: type[nn.Module]) -> None:
    model = Small()
    model.held = container()
    with pytest.raises(TypeError, match="cannot be applied to modules of type") as refusal:
        adapters.get_peft_model(model, adapters.LoraConfig(target_modules=["lin0"], modules_to_save=["held"]))
    assert isinstance(refusal.value, LayerKindError)


# --- what a model says of its layers ---


@quiet
def test_what_is_adapted() -> None:
    ours, theirs = wrap(Small, target_modules=["lin1"])
    for library, model in ((adapters, ours), (peft, theirs)):
        model.add_adapter("other", library.LoraConfig(target_modules=["lin0", "lin1"], modules_to_save=["emb"]))
        assert model.targeted_module_names == ["lin1", "lin0"]
        assert model.modules_to_save == {"emb"}
    assert status.inspect_matched_modules(ours, "other")["matched"] == ["lin0", "lin1"]
    ours.delete_adapter("default")
    assert ours.targeted_module_names == ["lin0", "lin1"]
    ours, theirs = wrap(models.llama_untied, target_modules=[], target_parameters=["q_proj.weight"])
    assert ours.targeted_parameter_names == theirs.targeted_parameter_names != []
    assert ours.targeted_module_names == theirs.targeted_module_names == []
    ours, theirs = wrap(models.gpt2)
    matched = status.inspect_matched_modules(ours)
    expected = tuners_utils.inspect_matched_modules(theirs)
    assert matched["matched"] == expected["matched"]
    assert not set(matched["unmatched"]) & set(matched["matched"])


@quiet
@pytest.mark.parametrize("extra", [{"modules_to_save": ["lin1"]}, {"trainable_token_indices": {"emb": [0, 1]}}])
def test_status_of_what_goes_along(extra: dict[str, Any]) -> None:
    """Names and kinds of the layers, and that one of them can be set apart from the others."""
    ours, theirs = wrap(Small, target_modules=["lin0"], **extra)
    for model in (ours, theirs):
        model.add_adapter("other", model.peft_config["default"])
    along = "lin1" if "modules_to_save" in extra else "emb"

    def compare() -> None:
        mine, wanted = ([vars(layer) for layer in model.get_layer_status()] for model in (ours, theirs))
        key = lambda layer: layer["name"]  # noqa: E731
        assert sorted(mine, key=key) == sorted(wanted, key=key)
        assert vars(ours.get_model_status()) == vars(theirs.get_model_status())

    compare()
    for model in (ours, theirs):
        getattr(model, along).set_adapter("other")
    compare()
    assert ours.get_model_status().active_adapters == "irregular"
    for model in (ours, theirs):
        model.set_adapter("other")
        model.lin0._active_adapter = "default"
    compare()


@quiet
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Embedding(5, 4), nn.Conv1d(2, 3, 3), nn.Conv2d(4, 6, 3, groups=2)]
)
def test_sizes_and_attributes_of_a_layer(layer: nn.Module) -> None:
    mine, wanted = (
        m.get_base_model().layer for m in wrap(lambda: nn.ModuleDict({"layer": layer}), target_modules="layer")
    )
    assert (mine.in_features, mine.out_features) == (wanted.in_features, wanted.out_features)
    held = {name for name in wanted.adapter_layer_names if "default" in getattr(wanted, name)}
    assert set(mine.adapter_layer_names) - {"lora_dropout"} == held
    assert "scaling" in mine.other_param_names


# --- tied weights ---


@pytest.mark.parametrize("base", [models.llama_tied, models.llama_untied, models.t5, models.gpt2, Small])
def test_tied_names_as_in_peft(base: Callable[[], nn.Module]) -> None:
    assert tying.tied_names(base()) == _get_module_names_tied_with_embedding(base())


@quiet
@pytest.mark.parametrize(
    ("indices", "ensure", "shared"),
    [
        ([1, 2], False, True),
        ({"embed_tokens": [1, 2], "lm_head": [1, 2]}, False, True),
        ({"embed_tokens": [1, 2], "lm_head": [1, 2]}, True, True),
        ({"embed_tokens": [1, 2], "lm_head": [3]}, False, False),
    ],
)
def test_tokens_of_tied_layers(indices: Any, ensure: bool, shared: bool) -> None:
    ours, theirs = wrap(
        models.llama_tied, target_modules=["q_proj"], trainable_token_indices=indices, ensure_weight_tying=ensure
    )
    for model in (ours, theirs):
        embedding = model.get_base_model().model.embed_tokens.token_adapter
        head = model.get_base_model().lm_head.token_adapter
        assert (embedding.trainable_tokens_delta is head.trainable_tokens_delta) is shared
        assert head.token_indices["default"] == ([1, 2] if shared else [3])
    mine, wanted = adapters.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == wanted.keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_tokens_that_cannot_be_tied() -> None:
    different = {"embed_tokens": [1, 2], "lm_head": [3]}
    for library in (adapters, peft):
        config = library.LoraConfig(trainable_token_indices=different, ensure_weight_tying=True)
        with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices are specified"):
            library.get_peft_model(models.llama_tied(), config)
        with pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"):
            library.get_peft_model(models.llama_untied(), config)


@quiet
def test_overlapping_tokens_are_not_merged_together() -> None:
    """Only one of them can act at a time, so there is no output that the merged weights could give."""
    ours, _ = wrap(models.llama_tied, trainable_token_indices=[1, 2])
    ours.add_adapter("other", adapters.LoraConfig(r=2, trainable_token_indices=[2, 3]))
    ours.add_adapter("apart", adapters.LoraConfig(r=2, trainable_token_indices=[4]))
    before = ours.get_base_model().model.embed_tokens.base_layer.weight.clone()
    with pytest.raises(MergeError, match=r"Token indices \[2\] .*undefined"):
        ours.merge_adapter(["default", "other"])
    exactly(ours.get_base_model().model.embed_tokens.base_layer.weight, before)
    ours.merge_adapter(["default"])
    ours.merge_adapter(["apart"])
    with pytest.raises(MergeError, match="'other'"):
        ours.merge_adapter(["other"])


@pytest.mark.parametrize(("options", "warns"), [({}, True), ({"ensure_weight_tying": True}, False)])
def test_merging_into_a_tied_weight(options: dict[str, Any], warns: bool, recwarn: pytest.WarningsRecorder) -> None:
    model = adapters.get_peft_model(models.llama_tied(), adapters.LoraConfig(target_modules=["lm_head"], **options))
    model.merge_and_unload()
    assert any("untie the weights" in str(warning.message) for warning in recwarn) is warns


@quiet
def test_an_adapter_on_no_layer_trains_the_head_alone() -> None:
    options = {"target_modules": "dummy-target-modules", "task_type": "SEQ_CLS"}
    ours, theirs = wrap(models.bert_classifier, **options)
    trained = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trained[0] == trained[1]
    assert trained[0]
    assert all("classifier" in name for name in trained[0])
    saved = [library.get_peft_model_state_dict(model) for library, model in ((adapters, ours), (peft, theirs))]
    assert sorted(saved[0]) == sorted(saved[1])
