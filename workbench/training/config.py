"""The sections of a study file that say what is trained on what. Importing this file does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of a study file: unknown keys are refused, values are not coerced between kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The base model, loaded once and frozen."""

    path: str = Field(description="A Hugging Face hub id, or a folder (relative to the study file).")
    task: Task = Field(description="What the model is used for; decides head, collation and metrics.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer: str | None = Field(
        None, description="Another hub id or folder for the tokenizer; the model's own by default."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the frozen weights.")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: build the model from its configuration alone, seeded by `training.seed`."
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the model's configuration to replace."
    )
    trust_remote_code: bool = Field(False, description="Run code that a hub repository brings. Recorded in every run.")


class DataSection(Section):
    """The data set: a hub id, a folder with train/validation/test files, or single files (CSV, JSONL, Parquet)."""

    path: str | None = Field(None, description="Hub id, or a folder holding train.*, validation.* and test.* files.")
    name: str | None = Field(None, description="Configuration of a hub data set, e.g. `sst2` of `glue`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set.")
    train: str | None = Field(None, description="A file, or the split's name in a hub data set (default `train`).")
    validation: str | None = Field(None, description="A file or a split's name (default `validation`).")
    test: str | None = Field(None, description="A file or a split's name (default `test`, if there is one).")
    text: str | None = Field(None, description="Column of the input text (SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM).")
    text_pair: str | None = Field(None, description="Column of a second text (SEQ_CLS).")
    label: str | None = Field(None, description="Column of the class (SEQ_CLS).")
    tokens: str | None = Field(None, description="Column with the list of words (TOKEN_CLS).")
    tags: str | None = Field(None, description="Column with the list of tags, one a word (TOKEN_CLS).")
    target: str | None = Field(
        None,
        description="Column of the text to produce (SEQ_2_SEQ_LM; in CAUSAL_LM only this part is then scored).",
    )
    max_length: Positive = Field(128, description="Longer inputs are cut, in tokens.")
    max_target_length: Positive = Field(128, description="Longer targets are cut, in tokens (SEQ_2_SEQ_LM).")
    max_rows: dict[Literal["train", "validation", "test"], Positive] = Field(
        default_factory=dict, description="Use only the first rows of a split."
    )


class TrainingSection(Section):
    """How each trial trains. A method may set or search `learning_rate` and the fields marked (per method)."""

    steps: Positive = Field(description="Optimiser steps of a trial.")
    batch_size: Positive = Field(32, description="Rows a step.")
    eval_batch_size: Positive = Field(64, description="Rows at once in evaluation.")
    eval_every: Positive | None = Field(None, description="Steps between evaluations; default: a third of `steps`.")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate (per method).")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay (per method).")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises (per method)."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after the warm-up (per method)."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm (per method).")
    seed: int = Field(0, ge=0, description="Seeds initialisation, dropout and the order of the data.")
    data_order: Literal["shared", "own"] = Field(
        "shared",
        description="shared: every trial sees the same batches; own: each trial draws its order from its number.",
    )
    base_dropout: bool = Field(
        False,
        description="Leave the frozen base's own dropout on while training. Activations can then not be reused.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: frozen weights in half precision; adapters, task head and, on a CPU, attention in single.",
    )
    micro_batch_size: Positive | None = Field(
        None, description="Rows of a batch at once; fewer take less memory and give the same result. Default: all."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute each layer's activations again in the backward pass: less memory, more time."
    )
    compile: bool = Field(False, description="Compile the layers with torch.compile (not with --solo).")
    cache_gib: float = Field(
        4.0,
        ge=0,
        description="Limit on disk for activations of the frozen layers below all that trains, which trials share.",
    )
    track_memory: bool = Field(
        False, description="Count the bytes of all tensors exactly, and predict them beside; steps take a bit longer."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")

    @property
    def eval_steps(self) -> list[int]:
        """The steps after which validation is measured; the last step is always one."""
        every = self.eval_every or max(1, -(-self.steps // 3))
        return sorted({*range(every, self.steps + 1, every), self.steps})


PER_METHOD = ("learning_rate", "weight_decay", "warmup", "schedule", "max_grad_norm")
