"""`PeftConfig`, the base of every method's configuration, and `adapter_config.json`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import reprlib
import warnings
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from workbench.errors import ConfigError, ConfigTypeError, NotAnAdapterError

from .hub import PushToHub, locate

CONFIG_NAME = "adapter_config.json"
LARGEST = 2**26  # bytes of a configuration file
__version__ = "0.21.2"  # of peft: the version of the file format that is written


class TaskType(StrEnum):
    """What the adapted model is used for; decides the task head and what `PeftModel` adds to it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig(PushToHub):
    """What every adapter configuration holds.

    Args:
        task_type: one of `TaskType`, or None for a model of one's own.
        peft_type: the method, one of `PeftType`; the class of a method's configuration knows it by itself.
        base_model_name_or_path: hub id or folder of the base model, filled in when the adapter is saved.
        revision: the base model's revision.
        inference_mode: whether the adapter's parameters are frozen.
        auto_mapping: class and library of a base model that has no task type.
        peft_version: version of the file format.

    Raises:
        ConfigError: there is no such task.
    """

    # our own fields, written only when used, so that a file without them is peft's to the letter
    extension_fields: ClassVar[frozenset[str]] = frozenset()
    # the field that holds the number of training steps, where a method must know it
    steps_field: ClassVar[str | None] = None

    task_type: TaskType | str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        from .registry import PeftType

        own = type(self).peft_type
        if own is not None:
            self.peft_type = PeftType(own)
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                raise ConfigError(
                    f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                    f"{', '.join(TaskType)}.",
                    "task_type",
                )
            self.task_type = TaskType(self.task_type)
        self.peft_version = self.peft_version or peft_version()

    @property
    def tuner_name(self) -> str:
        """What peft calls the class that holds adapters of this kind, e.g. LoraModel."""
        return type(self).__name__.removesuffix("Config") + "Model"

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens instead of changing layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        unused = {name for name in self.extension_fields if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @property
    def changes_base(self) -> str | None:
        """What about the adapter changes the base model's weights, if anything does."""
        return None

    def check_beside(self, others: dict[str, PeftConfig]) -> None:
        """Refuse to be on a model together with adapters of these configurations, by name, where that cannot be."""

    def converted(self, trained: dict[str, Any], start: dict[str, Any]) -> tuple[dict[str, Any], PeftConfig]:
        """Tensors and configuration of a plain adapter that adds what `trained` adds beyond `start`, both by checkpoint
        key.

        Raises:
            ConfigError: the method has no such form.
        """
        raise ConfigError(
            f"{self.peft_type} adapters cannot be converted with path_initial_model_for_weight_conversion."
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if need be.

        Args:
            auto_mapping_dict: written as `auto_mapping` in place of the configuration's own.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in self.to_dict().items()}
        values["auto_mapping"] = kwargs.get("auto_mapping_dict") or values["auto_mapping"]
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a configuration from a folder or a hub repository; the file's `peft_type` decides the class.

        Args:
            kwargs: what `hf_hub_download` takes (revision, token, ...); the rest is ignored.

        Raises:
            CheckpointError: no `adapter_config.json`.
            NotAnAdapterError: the file is not one.
            ConfigError: the file's method is not known here, or it uses an option that is not implemented here.
        """
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **kwargs)
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise NotAnAdapterError(
                f"{path} is not an adapter configuration. The {cls.__name__} config that is trying to be loaded is "
                "missing required keys: {'peft_type'}."
            )
        return cls.from_peft_type(**values)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The values in a configuration file.

        Raises:
            NotAnAdapterError: it holds no JSON object.
        """
        try:
            if Path(path_json_file).stat().st_size > LARGEST:
                raise ValueError(f"it has more than {LARGEST} bytes")
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"), parse_constant=_refuse)
        except (OSError, ValueError, RecursionError) as error:
            raise NotAnAdapterError(f"{path_json_file} is not an adapter configuration: {error!r}") from error
        if not isinstance(values, dict):
            raise NotAnAdapterError(f"{path_json_file} is not an adapter configuration, which is a JSON object.")
        if values.pop("runtime_config", None):
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build from plain values; `peft_type` decides the class, without it this one is meant. Values of fields that
        are not known here are ignored, with a warning if they are set.

        Raises:
            ConfigError: there is no such method, or a value is refused.
        """
        from .registry import by_peft_type

        config = by_peft_type(kwargs["peft_type"]).config if "peft_type" in kwargs else cls
        known = {f.name for f in fields(config)}
        check_types(config, kwargs)
        unknown = sorted(name for name, value in kwargs.items() if name not in known and value)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {config.__name__}, these are ignored. The file was "
                "probably written by a newer version of peft; the adapter may answer otherwise here than it was "
                "trained to.",
                stacklevel=3,
            )
        try:  # what options within options are is looked at nowhere else
            return config(**{name: value for name, value in kwargs.items() if name in known})
        except ConfigError:
            raise
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise ConfigError(f"{config.__name__} refuses its values: {error}") from error


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


def check_types(config: type, values: dict[str, Any]) -> None:
    """Refuse values of other types than the fields of a configuration class are of. None is taken for every field, as
    peft writes it, and what is not known of a type here (options within options) is left to the class.

    Raises:
        ConfigTypeError: names the field.
    """
    hints = get_type_hints(config)
    for name, value in values.items():
        if name in hints and value is not None and not is_a(value, hints[name]):
            raise ConfigTypeError(
                f"`{name}` should be of the type {hints[name]}, the value passed is {reprlib.repr(value)}.", name
            )


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as far as JSON tells numbers from numbers and lists from sets."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_a(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(is_a(k, inner[0]) and is_a(v, inner[1]) for k, v in value.items())
    if origin in (list, set, tuple):
        many = isinstance(value, (list, set, tuple))
        return many and (origin is tuple or all(is_a(item, inner[0]) for item in value))
    if hint in (int, float):  # peft writes fractions where a formula gave them, and checks sizes by themselves
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, str):
        return isinstance(value, str)
    if is_dataclass(hint):
        return isinstance(value, (dict, hint))  # type: ignore[arg-type]
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is no number of JSON")


def peft_version() -> str:
    """The version that a new configuration notes. A development version alone does not say which code wrote a file, so
    the commit that was installed is added."""
    if ".dev" not in __version__:
        return __version__
    try:
        commit = _get_commit_hash("workbench")
    except Exception as error:  # whatever the package's metadata hold, configurations must not fail for it
        warnings.warn(
            "A dev version of PEFT is used but there was an error while trying to determine the commit hash: "
            f"{error!r}.",
            stacklevel=2,
        )
        commit = None
    return f"{__version__}@{commit or 'UNKNOWN'}"


def _get_commit_hash(package: str) -> str | None:
    """The commit from which pip installed a package, or None where it came from elsewhere."""
    try:
        text = importlib.metadata.distribution(package).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")


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
