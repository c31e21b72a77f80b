"""Result files of peft's method_comparison, read and told in our words.

They are those of `method_comparison/<suite>/results` in huggingface/peft, one a run. What their fields mean is read
from the programs there that write them, `run.py` and `utils.py` of the suites MetaMathQA and image-gen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AwareDatetime, BaseModel, Field, ValidationError

from workbench.errors import DataError

from .runs import Outcome

GOALS = {"accuracy": "maximize", "dino_similarity": "maximize"}  # what the suites measure, and what is better
MIB = 2**20
UNSAVED = 99999999  # the size that they note where the adapter could not be saved
MANUALLY = "manually canceled"  # their message after Ctrl-C

SPLITS = {"valid ": "validation.", "test ": "test."}  # how their names of metrics begin, and ours
FURTHER = {
    "train loss": "train.loss",
    "train total tokens": "tokens_seen",
    "forgetting": "forgetting",
    "drift": "drift",
}
TRAINING = {  # their names of training settings, and ours
    "optimizer_type": "optimizer",
    "lr_scheduler": "schedule",
    "batch_size": "batch_size",
    "max_steps": "steps",
    "grad_norm_clip": "max_grad_norm",
    "dtype": "dtype",
}
OPTIMIZER = {"lr": "learning_rate"}
NO_HYPERPARAMETERS = {  # fields of an adapter's configuration that say what it is for, not what it is
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_config", "megatron_core"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),  # of the base model
}
FOUND = {"adalora": {"rank_pattern"}}  # what training found, though it stands among a method's settings

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what stores have room for


class TrainConfig(BaseModel, extra="allow"):
    """How they trained; the same for all methods but for what an experiment sets."""

    model_id: str
    seed: int
    optimizer_kwargs: dict[str, Any] = {}


class AdapterConfig(BaseModel, extra="allow"):
    """An adapter's configuration as peft writes it."""

    peft_type: str


class RunInfo(BaseModel):
    """Which experiment, when, with which settings. Without a `peft_config` the whole model was trained."""

    created_at: AwareDatetime
    total_time: float
    experiment_name: str = Field(min_length=1)
    train_config: TrainConfig
    peft_config: AdapterConfig | None
    error_msg: str = ""


class Evaluation(BaseModel, extra="allow"):
    """Values at a step, by names such as `valid accuracy`."""

    step: Whole


class TrainInfo(BaseModel):
    """What came of it. Bytes and seconds; older files name memory after CUDA and count no parameters."""

    status: Literal["success", "failed", "canceled", "cancelled"]
    metrics: list[Evaluation]
    train_time: float | None = None
    file_size: Whole | None = None
    num_trainable_params: Whole | None = None
    num_total_params: Whole | None = None
    memory_max: Whole | None = Field(None, validation_alias=AliasChoices("accelerator_memory_max", "cuda_memory_max"))
    error: str = ""


class Result(BaseModel):
    """One result file."""

    run_info: RunInfo
    train_info: TrainInfo

    @property
    def key(self) -> str:
        """What tells this run from others, a retry of the same experiment too."""
        return f"{self.run_info.experiment_name} {self.run_info.created_at.isoformat()}"

    @property
    def model(self) -> str:
        """The base model."""
        return self.run_info.train_config.model_id

    @property
    def method(self) -> str:
        """As in `workbench methods`, or `full`."""
        config = self.run_info.peft_config
        return config.peft_type.lower() if config else "full"

    @property
    def message(self) -> str:
        """Why a run did not end well, or ""."""
        return self.run_info.error_msg or self.train_info.error

    @property
    def outcome(self) -> Outcome:
        """Ours for their status; they call everything canceled that an exception ended."""
        if self.train_info.status == "success":
            return "complete"
        if "out of memory" in self.message.lower():
            return "out_of_memory"
        return "interrupted" if self.message == MANUALLY else "crashed"

    def tested(self) -> set[str]:
        """Names of the metrics of the test split."""
        names = {name for metrics in self.history().values() for name in metrics}
        return {name.removeprefix("test.") for name in names if name.startswith("test.")}

    def hyperparameters(self) -> dict[str, Any]:
        """Settings of adapter and training by our names, without those that are not set."""
        training, adapter = self.run_info.train_config, self.run_info.peft_config
        given = training.model_extra or {}
        values = {name: given[key] for key, name in TRAINING.items() if key in given}
        if "schedule" in values:
            values["schedule"] = values["schedule"] or "constant"
        values |= {OPTIMIZER.get(key, key): value for key, value in training.optimizer_kwargs.items()}
        left_out = NO_HYPERPARAMETERS | FOUND.get(self.method, set())
        fields = (adapter.model_extra or {}) if adapter else {}
        values |= {key: value for key, value in fields.items() if key not in left_out}
        return {key: _readable(value) for key, value in values.items() if value not in (None, {}, [], "")}

    def history(self) -> dict[int, dict[str, float]]:
        """Metrics by step, under our names."""
        found: dict[int, dict[str, float]] = {}
        for entry in self.train_info.metrics:
            for key, value in _numbers(entry).items():
                split = next((ours for theirs, ours in SPLITS.items() if key.startswith(theirs)), None)
                name = f"{split}{key.partition(' ')[2]}" if split else FURTHER.get(key)
                if name:
                    found.setdefault(entry.step, {})[name] = value
        return found

    def summary(self) -> dict[str, float]:
        """What the whole run took and gave."""
        info = self.train_info
        steps = [numbers["train time"] for entry in info.metrics if "train time" in (numbers := _numbers(entry))]
        share = None
        if info.num_trainable_params is not None and info.num_total_params:
            share = 100 * info.num_trainable_params / info.num_total_params
        values = {
            "trainable_params": info.num_trainable_params,
            "all_params": info.num_total_params,
            "trainable_percent": share,
            "adapter_bytes": None if info.file_size == UNSAVED else info.file_size,
            "peft_memory_max_mib/published": None if info.memory_max is None else info.memory_max / MIB,
            "seconds/steps": sum(steps) if steps else None,
            "seconds/train": info.train_time,
            "seconds/total": self.run_info.total_time,
        }
        return {key: value for key, value in values.items() if value is not None}


def read(files: Iterable[Path]) -> dict[Path, Result]:
    """The result that each file holds.

    Raises:
        DataError: some files hold none; it names each of them.
    """
    results, faults = {}, []
    for file in files:
        try:
            results[file] = result = Result.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"{file}: cannot be read: {error}")
        except ValidationError as error:
            faults.append(f"{file}: " + "; ".join(map(_fault, error.errors())))
        else:
            if result.outcome == "complete" and not result.tested() & GOALS.keys():
                known = " or ".join(f"'test {metric}'" for metric in GOALS)
                faults.append(f"{file}: train_info.metrics has no {known}, though the run is a success")
    if faults:
        raise DataError("Not a result of peft's method_comparison, nothing was imported:\n" + "\n".join(faults))
    return results


def _fault(error: Mapping[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _numbers(entry: Evaluation) -> dict[str, float]:
    """The values of an evaluation that are numbers, as stores have them."""
    found = (entry.model_extra or {}).items()
    return {key: value for key, value in found if type(value) is float or (type(value) is int and abs(value) < 2**63)}


def _readable(value: Any) -> Any:
    """A hyperparameter as a param of MLflow. Lists of names are sorted: peft keeps them as sets."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(sorted(value))
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
