"""`PeftModel`: a base model with adapters, saved and loaded in the file format of huggingface peft."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from workbench.errors import AdapterNameError, CheckpointError, ConfigError

from . import quantised
from .card import write_card
from .checkpoint import (
    LoadResult,
    fill_all,
    get_peft_model_state_dict,
    load_peft_weights,
    match_slots,
    write_weights,
)
from .config import PeftConfig, TaskType
from .convert import supports_lora_conversion
from .fitting import check_fits
from .hub import PushToHub
from .inject import HEADS
from .methods import alora
from .prompts import PromptTuner
from .registry import by_peft_type
from .sharded import check_whole
from .tuner import Tuner
from .tuner_layer import BASE, TunerLayer
from .tying import holds_tied_embeddings

if TYPE_CHECKING:
    from .status import TunerLayerStatus, TunerModelStatus

HEAD_MODULES: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS.value: HEADS,
    TaskType.TOKEN_CLS.value: HEADS,
    TaskType.QUESTION_ANS.value: ("qa_outputs",),
}


class PeftModel(PushToHub, nn.Module):
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
        warn_of_name(adapter_name, peft_config)
        peft_config = self.admit(peft_config)
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

    def admit(self, config: PeftConfig, others: Iterable[PeftConfig] = ()) -> PeftConfig:
        """A new adapter's configuration as this model takes it, beside those of the others: the task's head trains
        along.

        Raises:
            ConfigError: it is of another method than the others, or only one adapter of the method may train.
        """
        every = [*others, config]
        if len({other.peft_type for other in every}) > 1:
            raise ConfigError(
                f"Cannot combine adapters with different peft types: this model has {every[0].peft_type}, the new "
                f"adapter is {config.peft_type}. Pass mixed=True to get_peft_model to mix them."
            )
        if by_peft_type(config.peft_type).one_trains and sum(not other.inference_mode for other in every) > 1:
            raise ConfigError(
                f"{config.tuner_name} supports only 1 trainable adapter; set inference_mode=True for all but that one.",
                "inference_mode",
            )
        return add_head(config)

    @classmethod
    def for_task(cls, task_type: str | None) -> type[PeftModel]:
        """The class of a model for this task; this one for models of one's own."""
        return TASK_MODELS.get(task_type or "", cls)

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

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that train as a whole, for any of the adapters."""
        named = [getattr(config, "modules_to_save", None) or () for config in self.peft_config.values()]
        return {name for names in named for name in names} or None

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
        self,
        *args: Any,
        adapter_names: list[str] | None = None,
        task_ids: Tensor | None = None,
        alora_offsets: list[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model with its adapters.

        Args:
            adapter_names: an adapter for each row of the batch; "__base__" for none.
            task_ids: the task of each row, (rows,), for methods that know tasks.
            alora_offsets: for each row the number of its last tokens on which aLoRA adapters act; default: found in the
                input ids.
        """
        told = {"adapter_names": adapter_names, "alora_offsets": alora_offsets} | kwargs
        found = alora.get_alora_offsets_for_forward(self, *args[:1], **told).get("alora_offsets")
        with self._rows(adapter_names, task_ids):
            alora.invoke(self, adapter_names, found, kwargs.get("num_beams"))
            return self.base_model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        adapter_names: list[str] | None = None,
        task_ids: Tensor | None = None,
        alora_offsets: list[int | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the base model's own `generate`; the named arguments as in `forward`."""
        told = {"adapter_names": adapter_names, "alora_offsets": alora_offsets} | kwargs
        found = alora.get_alora_offsets_for_generate(self, *args, **told).get("alora_offsets")
        with self._rows(adapter_names, task_ids):
            alora.invoke(self, adapter_names, found, kwargs.get("num_beams"))
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _rows(self, adapter_names: list[str] | None, task_ids: Tensor | None = None) -> Iterator[None]:
        if adapter_names is not None and self.training:  # a checkpointed layer would run again without the names
            raise ConfigError("Cannot pass `adapter_names` when the model is in training mode.")
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
        tuner = self.base_model
        before = tuner.state.enabled
        if any(layer.disable_adapters == before for _, layer in tuner.adapted_layers()):
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. After this "
                "context, all of them will be enabled.",
                stacklevel=3,
            )
            before = True
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable(before)

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
        warn_of_name(adapter_name, peft_config)
        peft_config = self.admit(peft_config, self.peft_config.values())
        self.base_model.add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several that fold in this order, the active ones; with `inference_mode` they do not
        train."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of one adapter or several train or not.

        Raises:
            TypeError: a prompt method, as in peft.
        """
        if self.active_peft_config.is_prompt_learning:
            raise TypeError(
                "Setting `requires_grad` is not supported for prompt learning methods like "
                f"{self.active_peft_config.peft_type}."
            )
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter or several, and their parameters."""
        self.base_model.delete_adapter(adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all parameters, adapters included."""
        sizes = [(quantised.size(p), p.requires_grad) for p in self.parameters()]
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
        **kwargs: Any,
    ) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`, and the model card; adapters not named "default"
        get their own subfolder.

        Args:
            path_initial_model_for_weight_conversion: folder of the same adapter before training. Where its start took a
                part of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA), what is saved then is a plain adapter for the
                base model as it was, of twice the rank.
            state_dict: values to save instead of the model's own, by the names in `model.state_dict()`, where the
                model's parameters are spread over processes.
            kwargs: ignored, as transformers' trainer passes arguments for other models.

        Raises:
            AdapterNameError: an adapter of `selected_adapters` does not exist.
            CheckpointError: the folder is a file, `safe_serialization` is off (pickles are not written), or a parameter
                is spread over processes.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"Provided path ({folder}) should be a directory, not a file.")
        if not safe_serialization:
            raise CheckpointError("Only safetensors are written, since a pickle could run code when it is loaded.")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if not set(names) <= set(self.peft_config):
            raise AdapterNameError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {names}."
            )
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.create_or_update_model_card(folder)
        for name in names:
            target = folder if name == "default" else folder / name
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)  # type: ignore[arg-type]
            config = self.saved_config(name)
            if path_initial_model_for_weight_conversion is not None:
                tensors, config = config.converted(tensors, load_peft_weights(path_initial_model_for_weight_conversion))
            check_whole(tensors, name)
            write_weights(tensors, target)
            config.save_pretrained(target)

    def saved_config(self, adapter_name: str) -> PeftConfig:
        """An adapter's configuration as `save_pretrained` writes it."""
        config = copy.copy(self.peft_config[adapter_name])
        config.inference_mode = True  # as peft does: whoever loads the file decides anew
        if holds_tied_embeddings(self.get_base_model(), adapter_name):
            config.ensure_weight_tying = False  # type: ignore[attr-defined]  # peft would tie linear layers to each
        config.base_model_name_or_path = config.base_model_name_or_path or base_name(self.get_base_model())
        if config.task_type is None:
            base = type(self.get_base_model())
            config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return config

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write a folder's README.md, or add to it; see `card.write_card`."""
        write_card(self, output_dir)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        torch_device: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on a base model.

        Args:
            model: the base model, wrapped in place.
            model_id: folder or hub id of the adapter.
            is_trainable: train on; otherwise the adapter is frozen.
            config: a configuration to use instead of the file's.
            ephemeral_gpu_offload: see `LoraRuntimeConfig`.
            key_mapping: for a file made for another version of the model's class, regular expressions for the base
                model's paths, with what stands for them in this model; default: what transformers says of the class.
            torch_device: where the file's tensors are put before they are copied into the adapter; default: nowhere.
            ignore_mismatched_sizes: leave out tensors of another shape than their parameter, with a warning.
            kwargs: `subfolder`, and what `hf_hub_download` takes (revision, token, ...); the rest is ignored.

        Raises:
            ConfigError: `config` is none.
            CheckpointError: the files are missing, damaged, pickled or made for another base; the model stays as it
                was.
        """
        config = PeftConfig.from_pretrained(model_id, **kwargs) if config is None else config
        if not isinstance(config, PeftConfig):
            raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}.")
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        tensors = load_peft_weights(model_id, None, key_mapping, **kwargs)
        set_offload(config, ephemeral_gpu_offload)
        config.inference_mode = not is_trainable
        if not ignore_mismatched_sizes:
            check_fits(model, config, tensors)
        trained = [p for p in model.parameters() if p.requires_grad]
        task_model = cls.for_task(config.task_type)
        peft_model = task_model(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        try:
            peft_model._fill(tensors, adapter_name, model_id, ignore_mismatched_sizes, torch_device)
        except CheckpointError:
            peft_model.delete_adapter(adapter_name)
            for p in trained:
                p.requires_grad_(True)
            raise
        return peft_model.eval() if not is_trainable else peft_model

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> LoadResult:
        """Add a saved adapter, or fill one that exists already. It is not active until `set_adapter` says so. Arguments
        as of `from_pretrained`; unless the adapter is trainable, the model is left in evaluation mode.

        Raises:
            CheckpointError: as `from_pretrained`; no new adapter is left behind.
        """
        tensors = load_peft_weights(model_id, None, key_mapping, **kwargs)
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, **kwargs)
            set_offload(config, ephemeral_gpu_offload)
            config.inference_mode = not is_trainable
            if not ignore_mismatched_sizes:
                check_fits(self.get_base_model(), config, tensors)
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            result = self._fill(tensors, adapter_name, model_id, ignore_mismatched_sizes, torch_device)
        except CheckpointError:
            if new:
                self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()
        elif new:
            self.base_model.set_requires_grad(adapter_name)
        return result

    def _fill(
        self,
        tensors: dict[str, Tensor],
        adapter_name: str,
        source: str | Path,
        ignore_mismatched_sizes: bool,
        device: str | None,
    ) -> LoadResult:
        """Load a file's tensors, if it is complete and all of them have a place; by way of a device, if one is
        named."""
        places, result = match_slots(self.base_model, tensors, adapter_name, ignore_mismatched_sizes)
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
        fill_all(self.base_model, adapter_name, [(slot, tensor.to(device or tensor.device)) for slot, tensor in places])
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter into a LoRA adapter."""
        return supports_lora_conversion(self, adapter_name)

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

    def generate(self, **kwargs: Any) -> Any:  # type: ignore[override]  # as in peft: by name alone
        """As `PeftModel.generate`, with all arguments by name."""
        return super().generate(**kwargs)


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


def base_name(model: nn.Module) -> str | None:
    """Hub id or folder of a base model, as transformers notes it; a model built from a configuration has none."""
    return model.__dict__.get("name_or_path") or None


def device_of(model: nn.Module) -> str:
    """Where a model is, or CPU if it has no parameters in memory."""
    return str(next((p.device for p in model.parameters() if not p.is_meta), "cpu"))


def set_offload(config: Any, ephemeral_gpu_offload: bool) -> None:
    """Switch `ephemeral_gpu_offload` on, if asked for and the method knows it."""
    if ephemeral_gpu_offload and hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = True
    elif ephemeral_gpu_offload:
        warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", stacklevel=3)


def warn_of_name(adapter_name: str, config: PeftConfig) -> None:
    """Warn of an adapter name that peft takes for a part of a parameter's name."""
    prefix = by_peft_type(config.peft_type).prefix
    if adapter_name and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. This may lead to "
            "reinitialization of the adapter weights when peft loads them under this name.",
            stacklevel=3,
        )


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
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wrap a base model with a new adapter; see `PeftModel`.

    Args:
        mixed: let adapters of other methods be added; see `PeftMixedModel`.
        revision: the base model's revision, noted in the configuration.
    """
    if any(isinstance(module, TunerLayer) for module in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    before, name = peft_config.base_model_name_or_path, base_name(model)
    if before is not None and before != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}'. Please ensure that "
            "the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with "
                f"revision {revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    from .mixed import PeftMixedModel

    task_model = (PeftMixedModel if mixed else PeftModel).for_task(peft_config.task_type)
    return task_model(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
