"""LoRA's variants and what else is LoRA's own, beyond the conformance table; peft is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer as peft_lorafa
from peft.optimizers import create_loraplus_optimizer as peft_loraplus
from peft.tuners.lora import create_arrow_model as peft_create_arrow_model
from peft.tuners.lora.intruders import reduce_intruder_dimension as peft_reduce_intruder_dimension
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from workbench import adapters
from workbench.adapters.methods.alora import calculate_alora_offsets
from workbench.adapters.methods.qalora import QALora
from workbench.errors import ConfigError, MergeError

from . import models
from .models import TOKENS, inputs, output
from .test_conformance import exactly, far, keyed, same

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(factory: models.Factory, **options: Any) -> tuple[Any, Any]:
    """An adapted model of ours and one of peft's, with the same random values."""
    found = []
    for library in (adapters, peft):
        torch.manual_seed(0)
        found.append(library.get_peft_model(factory(), library.LoraConfig(**copy.deepcopy(options))).eval())
    ours, theirs = found
    draw = torch.Generator().manual_seed(3)
    values = {k: t + 0.2 * torch.randn(t.shape, generator=draw) for k, t in keyed(peft, theirs).items()}
    peft.set_peft_model_state_dict(theirs, values)
    adapters.set_peft_model_state_dict(ours, values)
    return ours, theirs


def run(model: nn.Module, factory: models.Factory = models.bert_classifier, **more: Any) -> Tensor:
    with torch.no_grad():
        return output(model, inputs(factory), **more)


# --- aLoRA ---


def test_alora_acts_from_the_invocation_on() -> None:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": TOKENS[:1]}
    ours, theirs = pair(models.llama_untied, **options)
    ids = inputs(models.llama_untied)["input_ids"]
    offsets = calculate_alora_offsets(ours.peft_config, "default", ids)
    assert None in offsets
    assert max(filter(None, offsets)) > 1
    answer, base = run(ours, models.llama_untied), run(models.llama_untied(), models.llama_untied)
    for row, offset in enumerate(offsets):
        start = ids.shape[1] - (offset or 0)
        exactly(answer[row, :start], base[row, :start])
        assert offset is None or far(answer[row, start:], base[row, start:])
    given = [1, None, 4, 2]
    same(run(ours, models.llama_untied, alora_offsets=given), run(theirs, models.llama_untied, alora_offsets=given))
    with pytest.raises(ConfigError, match="Beam search"):
        ours.generate(input_ids=ids, num_beams=2, max_new_tokens=2)
    with torch.no_grad():  # from a cache as without one
        made = [ours.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(made[0], theirs.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert made[0].shape == made[1].shape


def test_alora_with_checkpointing_wants_a_backward_pass_for_each_forward_pass() -> None:
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "alora_invocation_tokens": TOKENS[:1]}
    ours, _ = pair(models.llama_untied, **options)
    ours.gradient_checkpointing_enable()
    ours.train()
    for _ in range(2):
        output(ours, inputs(models.llama_untied)).sum().backward()
    output(ours, inputs(models.llama_untied))
    with pytest.raises(ConfigError, match="once per backward"):
        output(ours, inputs(models.llama_untied))


# --- the others ---


def test_variants_exclude_each_other_and_are_for_linear_layers() -> None:
    with pytest.raises(ConfigError, match="variant combination"):
        adapters.LoraConfig(use_dora=True, kasa_config={})
    with pytest.raises(ConfigError, match="does not work on conv1"):
        adapters.get_peft_model(models.conv_net(), adapters.LoraConfig(target_modules=["conv1"], velora_config={}))
    with pytest.raises(ConfigError, match="divisible"):
        adapters.get_peft_model(
            models.mlp(), adapters.LoraConfig(target_modules=["layers.0"], use_qalora=True, qalora_group_size=3)
        )


def test_qalora() -> None:
    """What peft computes on a quantised layer, and merged the same."""
    options = {"target_modules": ["query"], "r": 4, "use_qalora": True, "qalora_group_size": 4}
    ours = adapters.get_peft_model(models.bert_classifier(), adapters.LoraConfig(**options)).eval()
    layer = ours.base_model.model.bert.encoder.layer[0].attention.self.query
    adapter = layer.adapters["default"]
    assert isinstance(adapter, QALora)
    nn.init.normal_(adapter.lora_B.weight)
    x, y = torch.randn(2, 3, models.HIDDEN), torch.randn(2, 3, models.HIDDEN)

    class Quantised:  # what peft's variant reads of a layer
        lora_A, lora_B = {"a": adapter.lora_A}, {"a": adapter.lora_B}
        lora_dropout, scaling, qalora_group_size = {"a": nn.Identity()}, {"a": adapter.scaling}, {"a": 4}
        training, in_features = False, models.HIDDEN

    same(adapter.post(x, y), QALoraLinearVariant.forward(Quantised, "a", x, y))  # type: ignore[arg-type]
    before = run(ours)
    ours.merge_adapter()
    same(run(ours), before)


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config"])
def test_regularisation(name: str) -> None:
    """The term that the user adds to the loss is peft's, and has gradients."""
    ours, theirs = pair(models.bert_classifier, r=4, target_modules=["query", "value"], **{name: {}})
    mine, expected = ours.train().base_model.regularisation(), theirs.train()._get_kasa_loss()
    if name == "monteclora_config":
        expected = theirs._get_monteclora_loss()
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    mine.backward()
    assert any(p.grad is not None and p.grad.any() for p in ours.parameters())
    plain, _ = pair(models.bert_classifier, target_modules=["query"])
    assert plain._get_kasa_loss() == 0.0


def test_kasa_gives_the_base_weights_back() -> None:
    ours, _ = pair(models.bert_classifier, r=4, target_modules=["query"], kasa_config={})
    weight = ours.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight
    assert torch.linalg.matrix_rank(weight) == models.HIDDEN - 4
    with pytest.raises(ConfigError, match="KaSA cannot be combined"):
        ours.add_adapter("plain", adapters.LoraConfig(target_modules=["query"]))
    exactly(run(ours.unload()), run(models.bert_classifier()))


def test_monteclora_draws_in_training_only() -> None:
    """The update is noise around LoRA's, of the size that peft's noise has."""
    options = {"r": 4, "target_modules": ["query"], "monteclora_config": {"sample_scaler": 0.1, "num_samples": 3}}
    ours, theirs = pair(models.bert_classifier, **options)
    same(run(ours), run(theirs))
    exactly(run(ours), run(ours))
    spreads = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        drawn = torch.stack([run(model) for _ in range(200)])
        assert far(drawn[0], drawn[1])
        spreads.append(drawn.std(0).mean())
    assert 0.8 < spreads[0] / spreads[1] < 1.25


@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once"])
def test_velora_takes_its_direction_from_batches(init_type: str) -> None:
    options = {"target_modules": ["layers.0"], "velora_config": {"num_groups": 5, "init_type": init_type}}
    models_ = pair(models.mlp, **options)
    for model, library in zip(models_, (adapters, peft), strict=True):
        values = {k: torch.zeros_like(t) if "velora" in k else t for k, t in keyed(library, model).items()}
        library.set_peft_model_state_dict(model, values)
        model.train()
        for ids in (inputs(models.mlp)["x"], inputs(models.mlp)["x"].flip(1) // 2):
            model(ids).square().sum().backward()
    mine, expected = (keyed(library, model) for library, model in zip((adapters, peft), models_, strict=True))
    assert mine.keys() == expected.keys()
    for key in expected:
        same(mine[key], expected[key])
    layers = [model.base_model.model.layers[0] for model in models_]
    same(layers[0].lora_A["default"].weight.grad, layers[1].lora_A["default"].weight.grad)


# --- Arrow ---


def experts(folder: Path, names: list[str], strength: float = 20.0) -> list[str]:
    """Saved adapters with one strong direction each, which peft's iteration finds."""
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = peft.get_peft_model(models.gpt2(), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
        for key, p in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(p, std=0.3)
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A["default"].weight.data[0] *= strength
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("general", [False, True])
def test_arrow(tmp_path: Path, general: bool) -> None:
    tasks, shared = experts(tmp_path, ["a", "b", "c"]), experts(tmp_path, ["x", "y", "z", "g"], 0.5)[-1:]
    found = []
    for library, create in ((adapters, adapters.create_arrow_model), (peft, peft_create_arrow_model)):
        config = library.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=1)
        found.append(create(models.gpt2(), tasks, config, shared if general else None).eval())
    ours, theirs = found
    same(run(ours, models.gpt2), run(theirs, models.gpt2))
    with pytest.raises(MergeError, match="Cannot merge an active Arrow router"):
        ours.merge_adapter()
    before = run(ours, models.gpt2)
    ours.load_adapter(experts(tmp_path, ["x", "y", "z", "d"])[-1], "another")
    assert far(run(ours, models.gpt2), before)  # it is an expert as well
    ours.set_adapter("task_0")
    alone = adapters.PeftModel.from_pretrained(models.gpt2(), tasks[0])
    same(run(ours, models.gpt2), run(alone, models.gpt2))


def test_arrow_wants_adapters_of_one_shape(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        adapters.create_arrow_model(models.gpt2(), [], adapters.ArrowConfig())
    tasks = experts(tmp_path, ["a"])
    other = peft.get_peft_model(models.gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="rank mismatch"):
        adapters.create_arrow_model(models.gpt2(), [*tasks, str(tmp_path / "other")], adapters.ArrowConfig(top_k=1))


# --- layers that occur several times ---


def test_layer_replication(tmp_path: Path) -> None:
    options = {"target_modules": ["up_proj", "q_proj"], "layer_replication": [[0, 1], [0, 2], [1, 2]], "r": 2}
    ours, theirs = pair(models.llama_untied, task_type="CAUSAL_LM", **options)
    assert len(ours.base_model.model.model.layers) == 4
    same(run(ours, models.llama_untied), run(theirs, models.llama_untied))
    ids = inputs(models.llama_untied)["input_ids"]
    made = [m.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(made[0], made[1])
    ours.save_pretrained(tmp_path)
    again = adapters.PeftModel.from_pretrained(models.llama_untied(), tmp_path)
    exactly(run(again, models.llama_untied), run(ours, models.llama_untied))
    with pytest.raises(MergeError, match="replicated"):
        ours.merge_adapter()


def test_a_refused_replication_leaves_the_layers_as_they_were() -> None:
    base = models.llama_untied()
    config = adapters.LoraConfig(target_modules=["nothing"], layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(ConfigError, match="not found"):
        adapters.get_peft_model(base, config)
    assert len(base.model.layers) == 2
    exactly(run(base, models.llama_untied), run(models.llama_untied(), models.llama_untied))


# --- optimisers, and after training ---


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        output(model, inputs(models.mlp)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bias", ["none", "all"])
def test_loraplus(bias: str) -> None:
    ours, theirs = pair(models.mlp, target_modules=["layers.0", "layers.1", "emb"], bias=bias, r=4)
    how: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "eps": 1e-3}
    how["loraplus_lr_embedding"] = 1e-2
    train(ours, adapters.create_loraplus_optimizer(ours, torch.optim.AdamW, **how))
    train(theirs, peft_loraplus(theirs, torch.optim.AdamW, **how))
    mine, expected = keyed(adapters, ours), keyed(peft, theirs)
    for key in expected:
        same(mine[key], expected[key])


def test_lorafa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    options = {"target_modules": ["layers.0", "layers.1"], "bias": "all", "rank_pattern": {"layers.0": 2}, "r": 4}
    ours, theirs = pair(models.mlp, **options)
    before = {key: t.clone() for key, t in keyed(adapters, ours).items()}
    how: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "weight_decay": 0.1}
    train(ours, adapters.create_lorafa_optimizer(ours, **how))
    train(theirs, peft_lorafa(theirs, **how))
    mine, expected = keyed(adapters, ours), keyed(peft, theirs)
    for key in expected:
        torch.testing.assert_close(mine[key], expected[key], atol=1e-4, rtol=1e-3)
        assert torch.equal(mine[key], before[key]) == ("lora_A" in key)
    with pytest.raises(ConfigError, match="use_rslora=True"):
        adapters.create_lorafa_optimizer(ours, **how, use_rslora=True)


def test_intruders() -> None:
    ours, theirs = pair(models.bert_classifier, target_modules=["query", "dense"], r=4)
    said: list[list[str]] = [[], []]
    adapters.reduce_intruder_dimension(ours, threshold_epsilon=0.7, logging_sink=said[0].append)
    peft_reduce_intruder_dimension(theirs, threshold_epsilon=0.7, logging_sink=said[1].append)
    assert [line.rpartition(".")[2] for line in said[0]] == [line.rpartition(".")[2] for line in said[1]]
    assert any("Intruders: " in line for line in said[0])
    assert ours.active_adapters == ["intruder_reduced"]
    same(run(ours), run(theirs))
    ours.set_adapter("default")
    theirs.set_adapter("default")
    same(run(ours), run(theirs))
