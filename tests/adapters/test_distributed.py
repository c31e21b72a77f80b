"""Training and saving an adapter in two processes (gloo, CPU) gives what one process gives."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from workbench.adapters import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from workbench.errors import CheckpointError

from .models import inputs, llama_untied, output

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"),
]

WAYS = ("ddp", "fsdp", "fully_shard")
PROCESSES = 2


def adapted() -> Any:
    """LoRA on linear layers and the embedding, and a trained copy of the head."""
    base = llama_untied()
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj", "embed_tokens"]
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def train(model: nn.Module, rank: int = 0, processes: int = 1) -> None:
    """Three steps, on this process's share of the rows."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = inputs(llama_untied)["input_ids"].chunk(processes)[rank]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, port: int, folder: Path) -> None:
    """What one process does: trains in each way, and saves what it has with the other one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    whole = {"ddp": in_ddp, "fsdp": in_fsdp, "fully_shard": in_fully_shard}
    for way in WAYS:
        model = adapted()
        state_dict = whole[way](model, rank, folder)
        model.save_pretrained(folder / way, is_main_process=rank == 0, state_dict=state_dict)
        dist.barrier()
    dist.destroy_process_group()


def in_ddp(model: Any, rank: int, folder: Path) -> None:
    train(DistributedDataParallel(model), rank, PROCESSES)


def in_fsdp(model: Any, rank: int, folder: Path) -> dict[str, Any]:
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    sharded = FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    train(sharded, rank, PROCESSES)
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
        return sharded.state_dict()


def in_fully_shard(model: Any, rank: int, folder: Path) -> dict[str, Any]:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    train(model, rank, PROCESSES)
    with pytest.raises(CheckpointError, match="not whole in this process"):
        model.save_pretrained(folder / f"refused{rank}")
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    before = [p.to_local().clone() for p in model.parameters()]
    get_peft_model_state_dict(model, state_dict)
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    return state_dict


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved adapters, one for each way."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=PROCESSES)
    return folder


@pytest.fixture(scope="module")
def alone() -> Any:
    model = adapted()
    train(model)
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(way: str, trained: Path, alone: Any) -> None:
    loaded = PeftModel.from_pretrained(llama_untied(), trained / way).eval()
    expected, found = get_peft_model_state_dict(alone), get_peft_model_state_dict(loaded)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)
    given = inputs(llama_untied)
    torch.testing.assert_close(output(loaded, given), output(alone, given), atol=1e-5, rtol=1e-5)
    untrained = get_peft_model_state_dict(adapted())
    assert max((untrained[key] - value).abs().max() for key, value in expected.items()) > 1e-2
