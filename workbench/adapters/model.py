"""`PeftModel`: a base model with adapters, saved and loaded in the file format of huggingface peft."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from workbench.errors import AdapterNameError, CheckpointError, ConfigError

from .checkpoint import (
    LoadResult,
    get_peft_model_state_dict,
    match_slots,
    read_weights,
    set_peft_model_state_dict,
    write_weights,
)
from .config import PeftConfig, TaskType
from .inject import HEADS
from .prompts import PromptTuner
from .tuner import Tuner
from .tuner_layer import BASE

if TYPE_CHECKING:
    from .status import TunerLayerStatus, TunerModelStatus

HEAD_MODULES: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS.value: HEADS,
    TaskType.TOKEN_CLS.value: HEADS,
    TaskType.QUESTION_ANS.value: ("qa_outputs",),
}


class PeftModel(nn.Module):
    """A base model with one or more adapters, of which the active ones act.

    Args:
        model: the base model; its layers are wrapped in place and its parameters frozen.
        peft_config: the first adapter's configuration. Its `task_type` decides which task head trains along.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: keep the adapter's half-precision parameters in float32.
        low_cpu_mem_usage: leave the parameters on the meta device until a file is loaded.

    Raises:
        AdapterError: the configuration does not fit the model, which then stays as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        peft_config = add_head(peft_config)
        tuner = PromptTuner if peft_config.is_prompt_learning else Tuner
        self.base_model = tuner(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.prepare_model_for_gradient_checkpointing(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they act."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if several are active."""
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    def get_base_model(self) -> nn.Module:
        """The base model; its adapted layers are still wrapped."""
        return self.base_model.model

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let the embedded input require gradients: checkpointed blocks give none at all if nothing that enters them
        requires one. Call it with the base model where checkpointing is switched on later."""
        model.enable_input_require_grads()  # type: ignore[operator]
        return model

    # ---------------------------------------------------------------- forward

    def forward(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the base model with its adapters.

        Args:
            adapter_names: an adapter for each row of the batch; "__base__" for none.
            task_ids: the task of each row, (rows,), for methods that know tasks.
        """
        with self._rows(adapter_names, task_ids):
            return self.base_model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: list[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Generate with the base model's own `generate`; `adapter_names` and `task_ids` as in `forward`."""
        with self._rows(adapter_names, task_ids):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _rows(self, adapter_names: list[str] | None, task_ids: Tensor | None = None) -> Iterator[None]:
        unknown = sorted(set(adapter_names or ()) - {BASE} - set(self.peft_config))
        if unknown:
            raise AdapterNameError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        state = self.base_model.state
        state.rows, state.task_ids = adapter_names, task_ids
        try:
            yield
        finally:
            state.rows = state.task_ids = None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the base model answers alone."""
        before = self.base_model.state.enabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.base_model.state.enabled = before

    # ---------------------------------------------------------------- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, which is neither active nor trained until `set_adapter` says so.

        Raises:
            AdapterError: the name is taken or the configuration does not fit; the model stays as it was.
        """
        if len({config.peft_type for config in self.peft_config.values()} | {peft_config.peft_type}) > 1:
            raise ConfigError(
                f"Cannot combine adapters with different peft types: this model has "
                f"{self.active_peft_config.peft_type}, "
                f"the new adapter is {peft_config.peft_type}."
            )
        self.base_model.add(adapter_name, add_head(peft_config), low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one; with `inference_mode` it does not train."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its parameters."""
        self.base_model.delete_adapter(adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all parameters, adapters included."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print what `get_nb_trainable_parameters` counts."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of every adapted layer; see `status.TunerLayerStatus`."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the model's adapters together; see `status.TunerModelStatus`."""
        from .status import get_model_status

        return get_model_status(self)

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`; adapters not named "default" get their own
        subfolder.

        Args:
            path_initial_model_for_weight_conversion: folder of the same adapter before training. Where its start took a
                part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA), what is saved then is a plain adapter for the
                base model as it was, of twice the rank.
            state_dict: tensors to save instead of the model's own, by checkpoint key.

        Raises:
            AdapterNameError: an adapter of `selected_adapters` does not exist.
            CheckpointError: the folder is a file, or `safe_serialization` is off (pickles are not written).
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"Provided path ({folder}) should be a directory, not a file.")
        if not safe_serialization:
            raise CheckpointError("Only safetensors are written, since a pickle could run code when it is loaded.")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        self.base_model.check_known(names)
        if not is_main_process:
            return
        for name in names:
            target = folder if name == "default" else folder / name
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)  # type: ignore[arg-type]
            config = copy.copy(self.peft_config[name])
            if path_initial_model_for_weight_conversion is not None:
                tensors, config = config.converted(tensors, read_weights(path_initial_model_for_weight_conversion))
            write_weights(tensors, target)
            config.inference_mode = True  # as peft does: whoever loads the file decides anew
            if config.task_type is None:
                base = type(self.get_base_model())
                config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
            config.save_pretrained(target)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """Put a saved adapter on a base model.

        Args:
            model: the base model, wrapped in place.
            model_id: folder or hub id of the adapter.
            is_trainable: train on; otherwise the adapter is frozen.
            config: a configuration to use instead of the file's.
            hub: `subfolder`, and what `hf_hub_download` takes (revision, token, ...).

        Raises:
            CheckpointError: the files are missing, damaged, pickled or made for another base; the model stays as it
                was.
        """
        config = config or PeftConfig.from_pretrained(model_id, **hub)
        tensors = read_weights(model_id, **hub)
        config.inference_mode = not is_trainable
        trained = [p for p in model.parameters() if p.requires_grad]
        task_model = TASK_MODELS.get(config.task_type or "", cls)
        peft_model = task_model(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            peft_model._fill(tensors, adapter_name, model_id)
        except CheckpointError:
            peft_model.base_model.unload()
            for p in trained:
                p.requires_grad_(True)
            raise
        return peft_model.eval() if not is_trainable else peft_model

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> LoadResult:
        """Add a saved adapter, or fill one that exists already.

        Raises:
            CheckpointError: as `from_pretrained`; no new adapter is left behind.
        """
        tensors = read_weights(model_id, **hub)
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **hub)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            return self._fill(tensors, adapter_name, model_id)
        except CheckpointError:
            if new:
                self.delete_adapter(adapter_name)
            raise

    def _fill(self, tensors: dict[str, Tensor], adapter_name: str, source: str | Path) -> LoadResult:
        """Load a file's tensors, if it is complete and all of them have a place."""
        _, result = match_slots(self.base_model, tensors, adapter_name)
        if result.missing_keys:
            raise CheckpointError(
                f"{source} lacks {len(result.missing_keys)} of the adapter's tensors, e.g. {result.missing_keys[0]}; "
                "it was made for another base model, or its configuration was changed."
            )
        if result.unexpected_keys:
            raise CheckpointError(
                f"{source} holds {len(result.unexpected_keys)} tensors that have no place in this model, e.g. "
                f"{result.unexpected_keys[0]}; it was made for another base model."
            )
        return set_peft_model_state_dict(self, tensors, adapter_name)

    # ---------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (default: the active ones) into the base weights; `unmerge_adapter` takes them out again."""
        self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base weights, equal to the bit."""
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters merged for good and all wrappers gone."""
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model without adapters."""
        return self.base_model.unload()


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of texts; its head, `classifier` or `score`, trains along."""


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens; its head, `classifier` or `score`, trains along."""


class PeftModelForQuestionAnswering(PeftModel):
    """A finder of answers in a text; its head, `qa_outputs`, trains along."""


class PeftModelForCausalLM(PeftModel):
    """A language model that goes on writing."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder that writes."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model without a head."""


TASK_MODELS: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def add_head(config: PeftConfig) -> PeftConfig:
    """Let the task's head train along, under the names that transformers gives it."""
    heads = HEAD_MODULES.get(config.task_type or "", ())
    if (
        heads
        and "modules_to_save" in inspect.signature(type(config)).parameters
        and "modules_to_save" not in config.extension_fields
    ):
        chosen = config.modules_to_save or []  # type: ignore[attr-defined]
        config.modules_to_save = [*chosen, *(head for head in heads if head not in chosen)]  # type: ignore[attr-defined]
    return config


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wrap a base model with a new adapter; see `PeftModel`.

    Args:
        revision: the base model's revision, noted in the configuration.
    """
    peft_config.base_model_name_or_path = model.__dict__.get("name_or_path") or peft_config.base_model_name_or_path
    peft_config.revision = revision or peft_config.revision
    task_model = TASK_MODELS.get(peft_config.task_type or "", PeftModel)
    return task_model(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
