"""Multitask prompt tuning: a prompt shared by all tasks, times a low-rank matrix for each task (Wang et al. 2023,
arXiv:2303.02861, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import AdapterError, CheckpointError, ConfigError

from .prompt_tuning import PromptEmbedding, PromptTuningConfig


class MultitaskPromptTuningInit(StrEnum):
    """What the prompt starts as: a text, noise, or what source tasks were trained to."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of multitask prompt tuning, beside that of prompt tuning.

    Args:
        prompt_tuning_init: what the prompt starts as: RANDOM, TEXT, or out of a source adapter: AVERAGE_SOURCE_TASKS
            (all of it, the tasks averaged), EXACT_SOURCE_TASK (all of it, one task) or ONLY_SOURCE_SHARED (the shared
            prompt).
        prompt_tuning_init_state_dict_path: the source adapter's .safetensors file.
        prompt_tuning_init_task: the source task for EXACT_SOURCE_TASK.
        num_ranks: rank of a task's matrix.
        num_tasks: number of tasks; `task_ids` in a batch count from 0, and may be left out for a single task.
    """

    peft_type: str | None = "MULTITASK_PROMPT_TUNING"
    inits: ClassVar[type[StrEnum]] = MultitaskPromptTuningInit

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1


class MultitaskPromptEmbedding(PromptEmbedding):
    """`embedding`: (tokens, width); `prefix_task_cols`: (tasks, tokens, ranks); `prefix_task_rows`: (tasks, ranks,
    width)."""

    before_decoder = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module):
        super().__init__(config, word_embeddings)
        tokens, width = self.embedding.weight.shape
        tasks, ranks = config.num_tasks or 1, config.num_ranks or 1
        self.prefix_task_cols = nn.Parameter(torch.normal(0, 0.02, (tasks, tokens, ranks)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0, 0.02, (tasks, ranks, width)))
        if config.prompt_tuning_init in FROM_SOURCE and not config.inference_mode:
            self.start_from(config)

    @torch.no_grad()
    def start_from(self, config: MultitaskPromptTuningConfig) -> None:
        """Take over what a source adapter was trained to."""
        from ..checkpoint import read_file

        path, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
        if path is None:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path needs to be specified with {init} init method.",
                "prompt_tuning_init_state_dict_path",
            )
        source = read_file(Path(path))
        for name, (owner, leaf) in self.slots().items():
            shared = name == "prompt_embeddings"
            if not shared and init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
                continue
            tensor = source.get(name)
            if tensor is not None and not shared:
                averaged = init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
                tensor = tensor.mean(0, keepdim=True) if averaged else tensor[config.prompt_tuning_init_task, None]
            here = getattr(owner, leaf)
            if tensor is None or tensor.shape != here.shape:
                there = "is missing" if tensor is None else f"gives {tuple(tensor.shape)}"
                raise CheckpointError(f"{path} does not fit: {name} {there}, but {tuple(here.shape)} is needed.")
            here.copy_(tensor)

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            if len(self.prefix_task_cols) > 1:
                raise AdapterError("task_ids cannot be None: multitask prompt tuning needs the task of every row.")
            task_ids = torch.zeros(1, dtype=torch.long)
        task_ids = task_ids.to(self.embedding.weight.device)
        return super().prompt() * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])
