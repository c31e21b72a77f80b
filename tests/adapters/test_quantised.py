"""Adapters on layers that bitsandbytes keeps in four or eight bits, with peft as the oracle. A CPU is enough."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench import adapters
from workbench.adapters import base_ops
from workbench.errors import CheckpointError, ConfigError, TargetError

bnb = pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 64  # bitsandbytes quantises blocks of 64
BITS = [4, 8]


class Net(nn.Module):
    """Two quantised layers, one without bias, and a head as it was."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)]
        self.up, self.down = (quantised(layer, bits) for layer in plain)
        self.head = nn.Linear(WIDTH, 3)
        # what transformers says of a model that it loaded so, from which peft takes it
        setattr(self, f"is_loaded_in_{bits}bit", True)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) -> (rows, 3)"""
        return self.head(x + self.down(torch.tanh(self.up(x))))


def quantised(layer: nn.Linear, bits: int) -> nn.Module:
    where = (layer.in_features, layer.out_features, layer.bias is not None)
    if bits == 4:
        made = bnb.nn.Linear4bit(*where, quant_type="nf4", compute_dtype=torch.float32)
    else:
        made = bnb.nn.Linear8bitLt(*where, has_fp16_weights=False, threshold=0.0)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # which quantises


def config(library: Any, method: str = "LoraConfig", **options: Any) -> Any:
    return getattr(library, method)(target_modules=["up", "down"], **options)


def pair(bits: int, method: str = "LoraConfig", **options: Any) -> tuple[Any, Any]:
    """The same adapter with the same random values in workbench and in peft."""
    base = Net(bits)
    ours = adapters.get_peft_model(copy.deepcopy(base), config(adapters, method, **options))
    theirs = peft.get_peft_model(base, config(peft, method, **options))
    values = peft.get_peft_model_state_dict(theirs)
    draw = torch.Generator().manual_seed(1)
    values = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in values.items()}
    peft.set_peft_model_state_dict(theirs, values)
    adapters.set_peft_model_state_dict(ours, values)
    return ours, theirs


def batch() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


METHODS = [("LoraConfig", {}), ("LoraConfig", {"use_dora": True}), ("AdaLoraConfig", {"total_step": 10})]
METHODS += [("IA3Config", {"feedforward_modules": ["down"]})]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_output_and_gradients(bits: int, method: str, options: dict[str, Any]) -> None:
    grads, outputs = [], []
    for library, model in zip((adapters, peft), pair(bits, method, **options), strict=True):
        outputs.append(model(batch()))
        outputs[-1].square().sum().backward()
        by_storage = {p.data_ptr(): p.grad for p in model.parameters()}
        tensors = library.get_peft_model_state_dict(model)
        grads.append({key: by_storage[tensor.data_ptr()] for key, tensor in tensors.items()})
    close(outputs[0], outputs[1])
    assert grads[0].keys() == grads[1].keys()
    for key, expected in grads[1].items():
        close(grads[0][key], expected, 1e-4)
    assert max(grad.abs().max() for grad in grads[1].values()) > 1e-2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}])
def test_merging(bits: int, options: dict[str, Any]) -> None:
    """Merged weights are peft's; unmerging is exact, which peft's is not."""
    options = dict(options)
    targets = options.pop("target_modules", None)
    ours, theirs = pair(bits, **options) if targets is None else pair_on(bits, targets, **options)
    before, apart = {k: v.clone() for k, v in ours.state_dict().items() if isinstance(v, Tensor)}, ours(batch())
    for model in (ours, theirs):
        model.merge_adapter()
    merged = ours(batch())
    close(merged, theirs(batch()), 1e-4)
    close(merged, apart, 0.3)  # as near as so few bits come
    assert (merged - ours.get_base_model()(batch())).abs().max() < 1e-6
    ours.unmerge_adapter()
    close(ours(batch()), apart, 0)
    after = ours.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("bits", BITS)
def test_merging_after_inference(bits: int) -> None:
    """The first forward in eval mode may move or pack what a weight consists of."""
    model = pair(bits)[0].eval()
    with torch.no_grad():
        apart = model(batch())
        model.merge_adapter()
        close(model(batch()), apart, 0.3)
        model.unmerge_adapter()
        close(model(batch()), apart, 0)
        model.unload()
        close(model.get_base_model()(batch()), Net(bits).eval()(batch()), 0)


def pair_on(bits: int, targets: list[str], **options: Any) -> tuple[Any, Any]:
    made = []
    for library in (adapters, peft):
        torch.manual_seed(0)
        choice = library.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        made.append(library.get_peft_model(Net(bits), choice))
    adapters.set_peft_model_state_dict(made[0], peft.get_peft_model_state_dict(made[1]))
    return made[0], made[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "IA3Config"])
def test_methods_that_peft_does_not_merge_here(bits: int, method: str) -> None:
    options = {"feedforward_modules": ["down"]} if method == "IA3Config" else {"init_weights": False, "r": 2}
    model = adapters.get_peft_model(Net(bits), config(adapters, method, **options))
    apart = model(batch())
    with pytest.warns(UserWarning, match="rounding errors"):
        plain = model.merge_and_unload()
    assert type(plain.up) is type(Net(bits).up)
    close(plain(batch()), apart, 0.4)
    assert base_ops.features(plain.up) == (WIDTH, 2 * WIDTH)


@pytest.mark.parametrize("bits", BITS)
def test_what_the_model_says_of_itself(bits: int) -> None:
    ours, theirs = pair(bits)
    mine, expected = ours.get_layer_status(), theirs.get_layer_status()
    assert [status.module_type for status in mine] == [status.module_type for status in expected]
    assert {status.quantization_backend for status in mine} == {f"bnb {bits}bit"}
    assert ours.get_model_status().quantization_backend == f"bnb {bits}bit"
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_a_start_that_reads_the_weight_is_refused(bits: int, start: str) -> None:
    base = Net(bits)
    with pytest.raises(ConfigError, match="floating-point base layer"):
        adapters.get_peft_model(base, config(adapters, init_lora_weights=start))
    assert type(base.up) is type(Net(bits).up)


@pytest.mark.parametrize("bits", BITS)
def test_file(bits: int, tmp_path: Any) -> None:
    """A file of an adapter says nothing of the bits of its base."""
    ours, theirs = (model.eval() for model in pair(bits))
    ours.save_pretrained(tmp_path)
    with torch.no_grad():  # which 4-bit layers compute otherwise without
        expected = theirs(batch())
        for library in (adapters, peft):
            close(library.PeftModel.from_pretrained(Net(bits), tmp_path)(batch()), expected)


def whole_weights(folder: Path) -> Path:
    """The weights of the 4-bit layers as they were, in a safetensors file."""
    torch.manual_seed(0)
    plain = {"up": nn.Linear(WIDTH, 2 * WIDTH), "down": nn.Linear(2 * WIDTH, WIDTH, bias=False)}
    file = folder / "model.safetensors"
    save_file({f"{name}.weight": layer.weight.detach() for name, layer in plain.items()}, file)
    return file


def test_loftq_makes_up_for_what_quantisation_took(tmp_path: Path) -> None:
    """What is left of the error is its smaller singular values. (peft's own needs a GPU.)"""
    ours, _ = pair(4, r=8, lora_alpha=8)
    whole = whole_weights(tmp_path)
    adapters.replace_lora_weights_loftq(ours, tmp_path)
    for name, layer in (("up", ours.base_model.model.up), ("down", ours.base_model.model.down)):
        with safe_open(whole, framework="pt") as tensors:
            lost = tensors.get_tensor(f"{name}.weight") - base_ops.read_weight(layer.base_layer)
        rest = torch.linalg.svdvals(lost)[8:].norm()
        close((lost - layer.get_delta_weight("default")).norm(), rest)
        assert rest < 0.9 * lost.norm()


def test_loftq_takes_back_what_the_callback_refuses(tmp_path: Path) -> None:
    ours, _ = pair(4, r=8, lora_alpha=8)
    whole_weights(tmp_path)
    before = adapters.get_peft_model_state_dict(ours)
    before = {key: value.clone() for key, value in before.items()}
    adapters.replace_lora_weights_loftq(ours, tmp_path, callback=lambda model, path: path == "up")
    after = adapters.get_peft_model_state_dict(ours)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if ".up." in key
    }


def test_loftq_says_what_it_lacks(tmp_path: Path) -> None:
    ours, _ = pair(4, r=8)
    with pytest.raises(CheckpointError, match="safetensors"):
        adapters.replace_lora_weights_loftq(ours, tmp_path)
    eight, _ = pair(8, r=8)
    with pytest.raises(TargetError, match="No bnb LoRA module found"):
        adapters.replace_lora_weights_loftq(eight, tmp_path)
