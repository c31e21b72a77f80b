"""Every property of the adapter core, for every case of the table, with peft as the oracle.

Parameters are compared by their checkpoint keys, which every method has in common with peft.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench import adapters
from workbench.adapters.registry import METHODS
from workbench.adapters.tuner_layer import TunerLayer

from . import models
from .cases import CASES, Case
from .models import inputs, output

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of much that these cases do on purpose

TOLERANCE = 1e-5
PLAIN_MODELS = (*models.CONV_NETS, models.mlp, models.parts)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_layer_case = pytest.mark.parametrize(
    "case", [c for c in CASES if METHODS[c.method].kinds], ids=lambda case: case.id
)
every_merging_case = pytest.mark.parametrize(
    "case", [c for c in CASES if METHODS[c.method].kinds and c.merges], ids=lambda case: case.id
)
every_pair = pytest.mark.parametrize("case", [c for c in CASES if c.other is not None], ids=lambda case: case.id)


# --- helpers: the same adapter in both libraries ---


def config_of(library: Any, case: Case, **changes: Any) -> Any:
    """The case's configuration, of workbench or of peft."""
    ours = METHODS[case.method].config
    config = ours if library is adapters else peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(ours.peft_type)]
    return config(**copy.deepcopy(case.options | changes))


def build(library: Any, case: Case, second: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The case's base model with its adapter "default" and, where asked, a `second` that is not active."""
    torch.default_generator.manual_seed(0)  # for methods that draw their initial values
    model = library.get_peft_model(case.base().to(dtype), config_of(library, case))
    if second:
        model.add_adapter("second", config_of(library, case, **(case.other or {})))
    return model.eval()


def keyed(library: Any, model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """What a checkpoint of the adapter holds, by its key there."""
    return library.get_peft_model_state_dict(model, adapter_name=adapter)


def parameters_by_key(library: Any, model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by checkpoint key, found by their storage."""
    by_storage = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    tensors = keyed(library, model, adapter)
    encoder = model.prompt_encoder[adapter] if hasattr(model, "prompt_encoder") else None
    if encoder is not None:  # of a prompt a checkpoint holds what is made of the parameters
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("base_model.")}
        tensors |= {f"prompt_encoder.{name}": parameter.data for name, parameter in encoder.named_parameters()}
    return {key: by_storage[tensor.data_ptr()] for key, tensor in tensors.items() if tensor.data_ptr() in by_storage}


def random_values(theirs: Any, seed: int = 3) -> dict[str, Tensor]:
    """Random values for the adapter of a peft model, by checkpoint key."""
    draw = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}  # by storage, since tied layers list one parameter under several keys
    values = {}
    for key, tensor in keyed(peft, theirs).items():
        if key.endswith(".base_layer.weight"):  # a copy of the base model's embedding, frozen
            values[key] = tensor
        else:
            values[key] = drawn.setdefault(tensor.data_ptr(), tensor + 0.2 * torch.randn(tensor.shape, generator=draw))
    return values


def fill(ours: Any, theirs: Any, case: Case, adapter: str = "default", seed: int = 3) -> None:
    """Give an adapter of our model and the adapter of peft's the same random values."""
    if case.reparameterised:  # a checkpoint does not hold the network
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in theirs.prompt_encoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
        ours.prompt_encoder[adapter].load_state_dict(theirs.prompt_encoder["default"].state_dict())
        return
    values = random_values(theirs, seed)
    peft.set_peft_model_state_dict(theirs, values)
    adapters.set_peft_model_state_dict(ours, values, adapter_name=adapter)


def pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The case in workbench and in peft, with the same random values in both."""
    ours, theirs = build(adapters, case, dtype=dtype), build(peft, case, dtype=dtype)
    fill(ours, theirs, case)
    return ours, theirs


def second_of(case: Case) -> Case:
    """The case whose only adapter is the second one of a case with two."""
    return replace(case, options=case.options | (case.other or {}))


def trio(case: Case) -> tuple[Any, dict[str, Any]]:
    """Our model with two filled adapters, the second not active, and by its name each adapter alone in a peft model."""
    ours = build(adapters, case, second=True)
    alone = {"default": build(peft, case), "second": build(peft, second_of(case))}
    for seed, (name, theirs) in enumerate(alone.items()):
        fill(ours, theirs, case, name, seed)
    return ours, alone


def given(model: nn.Module, case: Case) -> dict[str, Any]:
    """Arguments of one forward call; those of the method's own for a model with an adapter."""
    own = case.arguments if isinstance(model, (adapters.PeftModel, peft.PeftModel)) else {}
    return inputs(case.base) | {name: torch.tensor(value) for name, value in own.items()}


def forward(model: nn.Module, case: Case, **more: Any) -> Tensor:
    with torch.no_grad():
        return output(model, given(model, case), **more)


def loss(model: nn.Module, case: Case) -> Tensor:
    """A scalar whose gradient with respect to every logit differs and is about 1."""
    logits = output(model, given(model, case)).float()
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum()


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def same_gradient(actual: Tensor | None, expected: Tensor, key: str) -> None:
    """Equal to 1e-5 of the largest entry, since every entry is a sum of terms about that large."""
    assert actual is not None, key
    assert (actual - expected).abs().max().item() <= TOLERANCE * max(1, expected.abs().max().item()), key


def far(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than rounding, so that a comparison of them means something."""
    if one.shape != other.shape:  # there are outputs of virtual tokens too
        length = min(one.shape[1], other.shape[1])
        one, other = one[:, -length:], other[:, -length:]
    return (one - other).abs().max().item() > 1e-3


def tokens_of(case: Case) -> list[int]:
    return case.options["token_indices"]


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TunerLayer)}


# --- the table itself ---


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(METHODS)


def test_case_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)


# --- start, forward, backward, training ---


@every_case
def test_start(case: Case) -> None:
    """A new adapter leaves the base model's output as it is, or changes it where the case says so."""
    before = forward(case.base(), case)
    after = forward(build(adapters, case), case)
    assert after.dtype == before.dtype
    if case.starts_as_base:
        torch.testing.assert_close(after, before, atol=2e-6, rtol=0)  # rounding, where trained rows are computed apart
    else:
        assert far(after, before)


@every_case
def test_initial_values(case: Case) -> None:
    """Values that peft sets are equal, values that it draws have its spread and depend on torch's seed alone."""

    def initial(library: Any, seed: int) -> dict[str, Tensor]:
        base = case.base()
        torch.manual_seed(seed)
        return keyed(library, library.get_peft_model(base, config_of(library, case)))

    ours, again, theirs, others = initial(adapters, 0), initial(adapters, 0), initial(peft, 0), initial(peft, 1)
    drawn_ours, drawn_theirs = [], []
    for key, value in theirs.items():
        exactly(ours[key], again[key])
        if torch.equal(value, others[key]):
            exactly(ours[key], value)
        else:
            assert not torch.equal(ours[key], value.mean().expand_as(value)), f"{key} is constant"
            drawn_ours.append(ours[key] / value.std())
            drawn_theirs.append(value / value.std())
    if drawn_theirs:
        spread = (
            torch.cat([d.flatten() for d in drawn_ours]).std() / torch.cat([d.flatten() for d in drawn_theirs]).std()
        )
        count = sum(d.numel() for d in drawn_theirs)
        assert abs(spread - 1) < 6 / math.sqrt(count)  # over four standard errors of a ratio of two spreads


@every_case
def test_same_output(case: Case) -> None:
    ours, theirs = pair(case)
    expected = forward(theirs, case)
    same(forward(ours, case), expected)
    assert far(expected, forward(case.base(), case))


@every_case
def test_same_gradients(case: Case) -> None:
    ours, theirs = pair(case)
    for model in (ours, theirs):
        loss(model, case).backward()
    mine, expected = parameters_by_key(adapters, ours), parameters_by_key(peft, theirs)
    assert mine.keys() == expected.keys()
    for key, parameter in expected.items():
        assert mine[key].requires_grad == parameter.requires_grad, key
        assert (mine[key].grad is None) == (parameter.grad is None), key
        if parameter.grad is not None and not key.endswith(case.wrong_in_peft):
            same_gradient(mine[key].grad, parameter.grad, key)
    assert max(p.grad.abs().max() for p in expected.values() if p.grad is not None) > 1e-2
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


@pytest.mark.parametrize("case", [c for c in CASES if not c.wrong_in_peft], ids=lambda case: case.id)
def test_same_training(case: Case) -> None:
    """Five steps of AdamW from the same start end at the same weights."""
    ends = []
    ours, theirs = pair(case)
    for library, model in ((adapters, ours), (peft, theirs)):
        # a large epsilon, as Adam's division blows rounding up where a gradient is next to nothing
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)
        for _ in range(5):
            loss(model, case).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(keyed(library, model))
    for key, expected in ends[1].items():
        same(ends[0][key], expected)


@pytest.mark.parametrize(
    "case", [c for c in CASES if any(o.endswith("_dropout") for o in c.options)], ids=lambda case: case.id
)
def test_dropout(case: Case) -> None:
    """In train mode the adapter's input is dropped as in peft; in eval mode nothing is."""
    ours, theirs = pair(case)
    calm = forward(ours, case)
    drawn = []
    for model in (ours, theirs):
        torch.manual_seed(6)
        drawn.append(forward(model.train(), case))
    same(drawn[0], drawn[1])
    assert far(drawn[0], calm)
    exactly(forward(ours.eval(), case), calm)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.base not in PLAIN_MODELS and not getattr(METHODS[c.method].encoder, "in_cache", False)],
    ids=lambda case: case.id,
)
def test_gradient_checkpointing(case: Case) -> None:
    """Computing activations again in the backward pass gives the same gradients."""
    ours, _ = pair(case)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        torch.manual_seed(7)
        loss(ours.train(), case).backward()
        found = {key: p.grad for key, p in parameters_by_key(adapters, ours).items() if p.grad is not None}
        gradients.append({key: grad.clone() for key, grad in found.items()})
        ours.zero_grad()
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        same_gradient(gradients[1][key], expected, key)


LANGUAGE_MODELS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.options.get("task_type") in LANGUAGE_MODELS], ids=lambda case: case.id
)
def test_generate(case: Case) -> None:
    """Greedy decoding through the adapted model, cache and all, gives peft's tokens."""
    made = []
    for model in pair(case):
        named = given(model, case)
        named.pop("decoder_input_ids", None)
        made.append(model.generate(**named, max_new_tokens=4, do_sample=False))
    exactly(made[0], made[1])


# --- what the model says of itself ---


@every_case
def test_trainable_parameters(case: Case) -> None:
    assert build(adapters, case).get_nb_trainable_parameters() == build(peft, case).get_nb_trainable_parameters()


# where peft wraps wrappers (attention, several parameters of one module), or names its only adapter's parameters bare
NAMED_OTHERWISE = {"lora-attention", "lora-attention-too", "lora-experts-both"}


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if METHODS[c.method].kinds and c.method != "adaption_prompt" and c.id not in NAMED_OTHERWISE],
    ids=lambda case: case.id,
)
def test_names_in_memory(case: Case) -> None:
    ours, theirs = build(adapters, case), build(peft, case)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    held = theirs.state_dict()
    again = held.keys() - ours.state_dict().keys()  # of tied layers peft lists the trained tokens twice
    assert {held[name].data_ptr() for name in again} <= {held[name].data_ptr() for name in held.keys() - again}
    ours.load_state_dict({name: tensor for name, tensor in held.items() if name not in again})
    assert all(torch.equal(tensor, held[name]) for name, tensor in ours.state_dict().items())


@every_layer_case
def test_layer_views(case: Case) -> None:
    """Code written for peft finds on a layer what it looks for: parameters by adapter name, scaling, base layer."""
    ours, theirs = pair(case)
    assert type(ours.get_base_model()) is case.base().__class__
    assert list(ours.peft_config) == ["default"]
    assert ours.active_adapters == theirs.active_adapters
    mine = dict(ours.named_modules())
    for name, layer in theirs.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper) and hasattr(layer, "modules_to_save"):
            assert type(mine[name].modules_to_save["default"]) is type(layer.modules_to_save["default"])
        if not isinstance(layer, BaseTunerLayer) or name.endswith(".token_adapter"):
            continue
        if not case.same_layers and not isinstance(mine[name], TunerLayer):
            continue
        for view in ("lora_A", "lora_B", "lora_E", "ranknum", "ia3_l", "lora_embedding_A", "lora_embedding_B"):
            if len(getattr(layer, view, ())):
                held, expected = getattr(mine[name], view)["default"], getattr(layer, view)["default"]
                exactly(getattr(held, "weight", held), getattr(expected, "weight", expected))
        if hasattr(layer, "scaling"):
            assert mine[name].scaling["default"] == pytest.approx(layer.scaling["default"])
        assert type(mine[name].get_base_layer()) is type(layer.get_base_layer())
        assert mine[name].active_adapters == layer.active_adapters
        assert mine[name].merged_adapters == []
    assert tuner_layers(ours)


# --- files and state dicts ---


@every_case
def test_same_files(case: Case, tmp_path: Path) -> None:
    """Tensors have peft's names, shapes and types; every configuration field has peft's value."""
    ours, theirs = pair(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    tensors, expected = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        exactly(tensors[key], tensor)
    written, wanted = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    order_free = {"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"}
    for field, value in written.items():
        assert field in wanted
        if field in order_free and isinstance(value, list):
            assert sorted(value) == sorted(set(wanted[field])), field  # peft names heads twice
        else:
            assert value == wanted[field], field
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of fields it does not know
        peft.PeftConfig.from_pretrained(str(tmp_path / "ours"))


@every_case
def test_files_cross_over(case: Case, tmp_path: Path) -> None:
    """A file of either library gives the same output in the other, and in its own."""
    ours, theirs = pair(case)
    expected = forward(theirs, case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for who in ("ours", "theirs"):
        loaded = adapters.PeftModel.from_pretrained(case.base(), tmp_path / who)
        assert not any(p.requires_grad for p in loaded.parameters()), "loaded for inference"
        same(forward(loaded.eval(), case), expected)
    same(forward(peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours").eval(), case), expected)


@pytest.mark.parametrize("case", [c for c in CASES if not c.reparameterised], ids=lambda case: case.id)
def test_loads_for_training(case: Case, tmp_path: Path) -> None:
    ours, theirs = pair(case)
    theirs.save_pretrained(tmp_path)
    loaded = adapters.PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert loaded.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


@every_case
def test_low_cpu_mem_usage(case: Case, tmp_path: Path) -> None:
    """An adapter that waited without memory for its file is the one that was saved."""
    ours, _ = pair(case)
    ours.save_pretrained(tmp_path)
    loaded = adapters.PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    same(forward(loaded.eval(), case), forward(ours, case))


@every_pair
def test_adapters_from_files(case: Case, tmp_path: Path) -> None:
    """A second adapter is saved in a folder of its own name and loaded beside the first."""
    ours, alone = trio(case)
    ours.save_pretrained(tmp_path)
    loaded = adapters.PeftModel.from_pretrained(case.base(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert loaded.active_adapters == ["default"]
    same(forward(loaded.eval(), case), forward(alone["default"], case))
    loaded.set_adapter("second")
    expected = forward(alone["second"], case)
    same(forward(loaded, case), expected)
    same(forward(peft.PeftModel.from_pretrained(case.base(), tmp_path / "second").eval(), case), expected)


@pytest.mark.parametrize("case", [c for c in CASES if not c.reparameterised], ids=lambda case: case.id)
def test_set_and_get(case: Case) -> None:
    """What is set is what one gets, and it is all there is: no key missing, none left over."""
    ours, _ = pair(case)
    values = {key: value.clone() for key, value in keyed(adapters, ours).items()}
    fresh = build(adapters, case)
    result = adapters.set_peft_model_state_dict(fresh, values)
    assert not result.unexpected_keys
    for key, value in keyed(adapters, fresh).items():
        exactly(value, values[key])
    exactly(forward(fresh, case), forward(ours, case))


@every_case
def test_state_dict_round_trip(case: Case) -> None:
    """torch's own state dict restores the adapted model."""
    ours, _ = pair(case)
    fresh = build(adapters, case)
    fresh.load_state_dict(copy.deepcopy(ours.state_dict()), strict=True)
    exactly(forward(fresh, case), forward(ours, case))


@every_case
def test_deepcopy(case: Case) -> None:
    """A copy behaves alike and shares nothing."""
    ours, _ = pair(case)
    before = forward(ours, case)
    twin = copy.deepcopy(ours)
    exactly(forward(twin, case), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    exactly(forward(ours, case), before)
    with twin.disable_adapter():
        exactly(forward(ours, case), before)


# --- merging ---


@every_merging_case
def test_merge_and_unmerge(case: Case) -> None:
    """Merged, the model answers alike; unmerged, every weight has its bits back."""
    ours, theirs = pair(case)
    weights = copy.deepcopy(ours.state_dict())
    unmerged = forward(ours, case)
    ours.merge_adapter()
    theirs.merge_adapter()
    same(forward(ours, case), unmerged)
    same(forward(ours, case), forward(theirs, case))
    merged = [layer.merged_adapters for layer in tuner_layers(ours).values()]
    assert ["default"] in merged
    ours.unmerge_adapter()
    assert ours.state_dict().keys() == weights.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, weights[key]), key
    exactly(forward(ours, case), unmerged)
    assert not any(layer.merged_adapters for layer in tuner_layers(ours).values())


@pytest.mark.parametrize("case", [c for c in CASES if c.other is not None and c.together], ids=lambda case: case.id)
def test_merge_in_turns(case: Case) -> None:
    """Adapters merged one after the other are as both active, and come out together, bit by bit."""
    ours, _ = trio(case)
    ours.base_model.set_adapter(["default", "second"])
    weights, both = copy.deepcopy(ours.state_dict()), forward(ours, case)
    for name in ("default", "second"):
        ours.merge_adapter(adapter_names=[name])
    same(forward(ours, case), both)
    ours.unmerge_adapter()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, weights[key]), key


@every_merging_case
def test_merge_and_unload(case: Case) -> None:
    """What comes out is the plain base model again, tied weights still tied, with the adapter in its weights."""
    ours, _ = pair(case)
    expected = forward(ours, case)
    base = case.base()
    merged = ours.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert not tuner_layers(merged)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    same(forward(merged, case), expected)


@pytest.mark.parametrize("case", [c for c in CASES if "bias" not in c.options], ids=lambda case: case.id)
def test_unload(case: Case) -> None:
    """Without merging, the plain base model comes back as it was (peft leaves its trained modules_to_save in it)."""
    ours = pair(case)[0]
    bare = ours.get_base_model()
    if METHODS[case.method].kinds:
        assert ours.unload() is bare
    else:  # a prompt is not in the layers
        ours.delete_adapter("default")
    base = case.base()
    assert not tuner_layers(bare)
    assert bare.state_dict().keys() == base.state_dict().keys()
    exactly(forward(bare, case), forward(base, case))


@every_merging_case
def test_safe_merge_refuses_non_finite_weights(case: Case) -> None:
    """One broken layer is enough, and no layer is changed then."""
    ours, _ = pair(case)
    own = [
        p
        for key, p in parameters_by_key(adapters, ours).items()
        if any(part in key for part in ("lora_", "ia3_", "tokens_", "hada_", "lokr_"))
    ]
    with torch.no_grad():
        own[-1].fill_(math.inf)
    weights = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"(?i)finite|nan"):
        ours.merge_adapter(safe_merge=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not any(layer.merged_adapters for layer in tuner_layers(ours).values())


@pytest.mark.parametrize("case", [c for c in CASES if not c.merges], ids=lambda case: case.id)
def test_refuses_to_merge(case: Case) -> None:
    ours, _ = pair(case)
    before = forward(ours, case)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    exactly(forward(ours, case), before)


# --- several adapters, none, and one for each row ---


@every_case
def test_disable(case: Case) -> None:
    """Inside the context the base model answers, merged or not; trained biases of the base stay, as in peft."""
    ours, theirs = pair(case)
    expected = forward(case.base(), case)
    if METHODS[case.method].kinds:  # of a prompt peft disables only models that can generate
        with theirs.disable_adapter():
            expected = forward(theirs, case)
    enabled = forward(ours, case)
    with ours.disable_adapter():
        disabled = forward(ours, case)
    same(disabled, expected)
    if case.options.get("bias", "none") == "none" and case.keeps_base:
        exactly(disabled, forward(case.base(), case))
    exactly(forward(ours, case), enabled)
    if not (METHODS[case.method].kinds and case.merges):
        return
    ours.merge_adapter()
    with ours.disable_adapter():
        exactly(forward(ours, case), disabled)
    same(forward(ours, case), enabled)


@every_pair
def test_switch(case: Case) -> None:
    """`set_adapter` decides which adapter answers and which one trains."""
    ours, alone = trio(case)
    for active, idle in (("default", "second"), ("second", "default"), ("default", "second")):
        ours.set_adapter(active)
        assert ours.active_adapters == [active]
        same(forward(ours, case), forward(alone[active], case))
        trains = {key: p.requires_grad for key, p in parameters_by_key(adapters, ours, active).items()}
        assert trains == {key: p.requires_grad for key, p in parameters_by_key(peft, alone[active]).items()}
        assert not any(p.requires_grad for p in parameters_by_key(adapters, ours, idle).values())
    assert far(forward(alone["default"], case), forward(alone["second"], case))


@every_pair
def test_new_adapter_waits(case: Case) -> None:
    """An added adapter changes nothing, and trains nothing, before it is made active."""
    ours, _ = pair(case)
    before, trainable = forward(ours, case), ours.get_nb_trainable_parameters()[0]
    ours.add_adapter("second", config_of(adapters, case, **(case.other or {})))
    exactly(forward(ours.eval(), case), before)
    assert ours.get_nb_trainable_parameters()[0] == trainable


@pytest.mark.parametrize("case", [c for c in CASES if c.other is not None and c.together], ids=lambda case: case.id)
def test_both_active(case: Case) -> None:
    """Two adapters at once answer as in peft, and merge to the same."""
    ours, alone = trio(case)
    if case.method == "trainable_tokens":  # peft fails on tied embeddings: one adapter with the tokens of both, then
        both = replace(case, options=case.options | {"token_indices": [*tokens_of(case), *tokens_of(second_of(case))]})
        theirs = build(peft, both)
        values = [keyed(peft, model) for model in alone.values()]
        peft.set_peft_model_state_dict(theirs, {key: torch.cat([v[key] for v in values]) for key in values[0]})
    else:
        theirs = build(peft, case, second=True)
        for name, model in alone.items():
            peft.set_peft_model_state_dict(theirs, keyed(peft, model), adapter_name=name)
        theirs.base_model.set_adapter(["default", "second"])
    ours.base_model.set_adapter(["default", "second"])
    assert ours.active_adapters == ["default", "second"]
    expected = forward(theirs, case)
    same(forward(ours, case), expected)
    ours.merge_adapter()
    same(forward(ours, case), expected)


@every_pair
def test_delete(case: Case) -> None:
    """A deleted adapter leaves nothing behind; where it was the active one, the other takes its place."""
    ours, alone = trio(case)
    ours.delete_adapter("default")
    assert ours.active_adapters == ["second"]
    assert list(ours.peft_config) == ["second"]
    assert not [key for key in ours.state_dict() if "default" in key.split(".")]
    same(forward(ours, case), forward(alone["second"], case))
    ours.delete_adapter("second")
    exactly(forward(ours, case), forward(case.base(), case))


@pytest.mark.parametrize("case", [c for c in CASES if not c.by_row], ids=lambda case: case.id)
def test_refuses_rows(case: Case) -> None:
    ours, _ = pair(case)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        forward(ours, case, adapter_names=["__base__", "default", "__base__", "default"])


@pytest.mark.parametrize("case", [c for c in CASES if c.by_row and METHODS[c.method].kinds], ids=lambda case: case.id)
def test_adapter_names_by_row(case: Case) -> None:
    """Each row of a batch is answered by the adapter it names, as if that adapter ran alone."""
    ours = trio(case)[0] if case.other is not None else pair(case)[0]
    names = ["__base__", "default", list(ours.peft_config)[-1], "default"]
    with ours.disable_adapter():
        alone = {"__base__": forward(ours, case)}
    for name in ours.peft_config:
        ours.set_adapter(name)
        alone[name] = forward(ours, case)
    ours.set_adapter("default")
    same(forward(ours, case, adapter_names=names), torch.stack([alone[name][row] for row, name in enumerate(names)]))
    exactly(forward(ours, case), alone["default"])


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.other is not None and c.by_row and METHODS[c.method].kinds],
    ids=lambda case: case.id,
)
def test_gradients_by_row(case: Case) -> None:
    """Each adapter's gradient comes from the rows that name it, as if the loss were of those rows alone."""
    ours, alone = trio(case)
    names = ["second", "default", "__base__", "second"]
    for name in ours.peft_config:
        ours.base_model.set_requires_grad(name, True)
    weights = torch.randn(models.ROWS, generator=torch.Generator().manual_seed(5))

    def weighted(logits: Tensor, rows: list[bool]) -> Tensor:
        per_row = logits.flatten(1).square().sum(1)
        return (per_row * weights * torch.tensor(rows)).sum()

    weighted(output(ours, inputs(case.base), adapter_names=names), [True] * models.ROWS).backward()
    for name, theirs in alone.items():
        weighted(output(theirs, inputs(case.base)), [row == name for row in names]).backward()
        mine = parameters_by_key(adapters, ours, name)
        for key, parameter in parameters_by_key(peft, theirs).items():
            if parameter.grad is not None and not key.endswith(case.wrong_in_peft):
                same_gradient(mine[key].grad, parameter.grad, key)


def test_one_name_within_another() -> None:
    """An adapter's checkpoint holds its own tensors only, also where its name is part of another's."""
    case = next(c for c in CASES if c.id == "lora-bert-seq-cls")
    model = adapters.get_peft_model(case.base(), config_of(adapters, case), adapter_name="a")
    for name in ("a_b", "lora_A", "query"):
        model.add_adapter(name, config_of(adapters, case))
    expected = keyed(peft, build(peft, case)).keys()
    for name in ("a", "a_b", "lora_A", "query"):
        assert keyed(adapters, model, name).keys() == expected


def test_ia3_second_adapter_keeps_its_own_feedforward_modules() -> None:
    """peft decides by the first adapter of a layer whether input or output is scaled; here each adapter does."""
    first = {"target_modules": ["layers.0", "layers.1"], "feedforward_modules": ["layers.1"]}
    case = Case("ia3-feedforward", "ia3", models.mlp, first, other={"feedforward_modules": ["layers.0"]})
    ours, alone = trio(case)
    ours.set_adapter("second")
    same(forward(ours, case), forward(alone["second"], case))


def test_loha_gradients_with_a_core() -> None:
    """Those of `hada_w1_a` and `hada_w2_a` are wrong in peft: here all are checked against finite differences."""
    case = next(c for c in CASES if c.id == "loha-conv-effective")
    model = pair(case)[0].double()
    layer = tuner_layers(model)["base_model.model.conv1"]
    own = dict(layer.adapters["default"].named_parameters())
    assert set(case.wrong_in_peft) < set(own)
    x = inputs(case.base)["x"][:1].double()

    def answer(*values: Tensor) -> Tensor:
        named = {f"adapters.default.{name}": value for name, value in zip(own, values, strict=True)}
        return torch.func.functional_call(layer, named, (x,)).square().sum()

    assert torch.autograd.gradcheck(answer, tuple(own.values()))


# --- number formats ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_case
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """On a base in half precision the adapter is kept in fp32, and the output has peft's type and nearly its values."""
    ours, theirs = pair(case, dtype)
    mine, expected = keyed(adapters, ours), keyed(peft, theirs)
    assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in expected.items()}
    cast = {n: value.to(dtype) if value.is_floating_point() else value for n, value in given(ours, case).items()}
    with torch.no_grad():
        answer, wanted = output(ours, cast), output(theirs, cast)
    assert answer.dtype == wanted.dtype
    step = torch.finfo(dtype).eps * wanted.abs().max().item()  # of the largest logit
    torch.testing.assert_close(answer, wanted, atol=8 * step, rtol=0)


@every_case
def test_adapter_in_the_bases_precision(case: Case) -> None:
    """`autocast_adapter_dtype=False` keeps the adapter in the base model's own type."""
    types = []
    for library in (adapters, peft):
        base = case.base().to(torch.bfloat16)
        model = library.get_peft_model(base, config_of(library, case), autocast_adapter_dtype=False)
        types.append({key: value.dtype for key, value in keyed(library, model).items()})
    assert types[0] == types[1]
