"""`PeftConfig`, the base of every method's configuration, and `adapter_config.json`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from workbench.errors import CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"  # the version of the file format that is written


class TaskType(StrEnum):
    """What the adapted model is used for; decides the task head and what `PeftModel` adds to it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every adapter configuration holds.

    Args:
        task_type: one of `TaskType`, or None for a model of one's own.
        base_model_name_or_path: hub id or folder of the base model, filled in when the adapter is saved.
        revision: the base model's revision.
        inference_mode: whether the adapter's parameters are frozen.
        auto_mapping: class and library of a base model that has no task type.
        peft_version: version of the file format.
    """

    peft_type: ClassVar[str | None] = None
    # peft fields that hold a value while switched off, so that files written by peft load without complaint
    inert_fields: ClassVar[frozenset[str]] = frozenset()
    # our own fields, written only when used, so that a file without them is peft's to the letter
    extension_fields: ClassVar[frozenset[str]] = frozenset()
    # the field that holds the number of training steps, where a method must know it
    steps_field: ClassVar[str | None] = None

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:
            known = [t.value for t in TaskType]
            if self.task_type not in known:
                raise ConfigError(
                    f"Invalid task type: '{self.task_type}'. Must be one of: {', '.join(known)}.", "task_type"
                )
            self.task_type = TaskType(self.task_type).value
        self.peft_version = self.peft_version or PEFT_VERSION

    @property
    def tuner_name(self) -> str:
        """What peft calls the class that holds adapters of this kind, e.g. LoraModel."""
        return type(self).__name__.removesuffix("Config") + "Model"

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens instead of changing layers."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, `peft_type` included."""
        unused = {name for name in self.extension_fields if getattr(self, name) is None}
        return {"peft_type": self.peft_type} | {k: v for k, v in asdict(self).items() if k not in unused}

    def converted(self, trained: dict[str, Any], start: dict[str, Any]) -> tuple[dict[str, Any], PeftConfig]:
        """Tensors and configuration of a plain adapter that adds what `trained` adds beyond `start`, both by checkpoint
        key.

        Raises:
            ConfigError: the method has no such form.
        """
        raise ConfigError(
            f"{self.peft_type} adapters cannot be converted with path_initial_model_for_weight_conversion."
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """Read a configuration from a folder or a hub repository; the file's `peft_type` decides the class.

        Raises:
            CheckpointError: no readable `adapter_config.json`, or a method that is not known here.
            ConfigError: the file uses an option that is not implemented here.
        """
        from .checkpoint import locate
        from .registry import by_peft_type

        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **hub)
        try:
            values = json.loads(Path(path).read_text())
            peft_type = values.pop("peft_type")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} is not an adapter configuration: {error!r}") from error
        return by_peft_type(peft_type).config.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """Build from plain values. Options of peft that are off are skipped, those in use must be known here."""
        known = {f.name for f in fields(cls)}
        unknown = {k: v for k, v in values.items() if k not in known and v and k not in cls.inert_fields}
        if unknown:
            raise ConfigError(
                f"The adapter was made with {unknown}, which {cls.__name__} does not implement; loading it without "
                "would give other outputs than it was trained for."
            )
        return cls(**{k: v for k, v in values.items() if k in known})


@dataclass
class TargetConfig(PeftConfig):
    """Which modules of the base model a method adapts.

    Args:
        target_modules: names or suffixes of the modules to adapt, a regular expression for whole names, or
            "all-linear"; by default those usual for the architecture.
        exclude_modules: names, suffixes or a regular expression of modules to leave alone.
        modules_to_save: modules that train as a whole and are saved with the adapter.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers, e.g. "layers" or "h", where it cannot be guessed.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = name_set(self.target_modules, "target_modules")
        self.exclude_modules = name_set(self.exclude_modules, "exclude_modules")
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ConfigError(f"`{name}` cannot be used when `target_modules` is a string.", name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified.", "layers_pattern"
            )


def check_ranks(r: int, rank_pattern: dict[str, int]) -> None:
    """Refuse ranks that are not whole numbers from one up."""
    for name, rank in {"r": r, **rank_pattern}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            where = "r" if name == "r" else "rank_pattern"
            raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {rank!r}.", where)


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's path (`rank_pattern`, `alpha_pattern`)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def name_set(value: Any, field: str) -> Any:
    """Module names as a set, a regular expression as it is; refuses anything else."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{field} {value!r} is not a regular expression: {error}.", field) from error
        return value
    if isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value):
        return set(value)
    raise ConfigError(f"{field} must be a list of module names or one regular expression, not {value!r}.", field)
