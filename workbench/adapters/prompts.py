"""`PromptTuner`: a base model with virtual tokens, which enter through a hook at the base model's own front door. So
`forward`, `generate` and whatever else calls the model see them, and disabling is not to act."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from workbench.errors import AdapterError, AdapterNameError, ConfigError, MergeError

from .adapter import Part
from .config import PeftConfig, TaskType
from .inject import fill_defaults
from .matching import embedding_of
from .methods.prefix_tuning import by_layer
from .registry import by_peft_type
from .tuner import Tuner
from .virtual_tokens import PromptLearningConfig, VirtualTokens, text_config

IGNORED = -100  # a label that counts for nothing
Given = dict[str, Any]  # arguments of a forward call, by name


@dataclass(frozen=True)
class Task:
    """How virtual tokens enter a model for one task.

    Attributes:
        token_labels: there is a label for each token of the input; virtual tokens are not scored.
        token_types: `token_type_ids` are kept; elsewhere they are ignored, as in peft.
    """

    token_labels: bool = False
    token_types: bool = False


TASKS = {
    TaskType.CAUSAL_LM: Task(token_labels=True),
    TaskType.SEQ_2_SEQ_LM: Task(),
    TaskType.SEQ_CLS: Task(token_types=True),
    TaskType.TOKEN_CLS: Task(token_labels=True, token_types=True),
    TaskType.QUESTION_ANS: Task(token_types=True),
    TaskType.FEATURE_EXTRACTION: Task(),
}


class PromptTuner(Tuner):
    """Holds the base model (`model`) and each adapter's virtual tokens (`prompt_encoder`); one adapter acts at a
    time."""

    key_prefix: ClassVar[str] = "base_model."

    prompt_encoder: nn.ModuleDict

    # ---------------------------------------------------------------- adapters

    def add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool = False, autocast: bool = True) -> None:
        """As `Tuner.add`.

        Raises:
            ConfigError: besides, a size that the base model does not tell is missing, or the base model computes
                activations again in the backward pass and the prompt is in the cache.
        """
        self.check_new(name, config)
        method = by_peft_type(config.peft_type)
        fill_defaults(config, method, self.model)
        encoder = method.encoder(config, self.word_embeddings)  # type: ignore[misc]
        self.check_checkpointing(encoder)
        first = not self.peft_config
        super().add(name, config, low_cpu_mem_usage, autocast)
        if first:
            self.prompt_encoder = nn.ModuleDict()
            self._open_doors(encoder)
        self.prompt_encoder[name] = encoder.to(next(self.model.parameters()).device)
        self.set_requires_grad(name, name in self.state.active and not config.inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        super().delete_adapter(adapter_name)
        for name in self.prompt_encoder.keys() - self.peft_config.keys():
            del self.prompt_encoder[name]
        if not self.peft_config:
            self._close_doors()

    def detach(self) -> None:
        super().detach()
        self._close_doors()

    def attach(self) -> None:
        if self.detached:
            self._open_doors(self.encoder(self.state.active[0]))
        super().attach()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise AdapterNameError(f"One prompt acts at a time, not {adapter_name}.")
        super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in getattr(self, "prompt_encoder", ()):
                self.prompt_encoder[name].requires_grad_(requires_grad)

    def parts(self, adapter_name: str) -> Iterator[tuple[str, Part]]:
        yield "", self.encoder(adapter_name)
        yield from super().parts(adapter_name)

    def check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Virtual tokens are input, not weights.

        Raises:
            MergeError: always.
        """
        raise MergeError("A prompt cannot be merged into the base weights.")

    def unload(self) -> nn.Module:
        """A prompt is not in the base model's layers; `delete_adapter` takes it off.

        Raises:
            AttributeError: always, as in peft.
        """
        raise AttributeError("A prompt method has no `unload`: `delete_adapter` takes the prompt off the base model.")

    # ---------------------------------------------------------------- the virtual tokens

    @property
    def word_embeddings(self) -> Any:
        """The base model's input embedding; None if it does not tell which one that is."""
        return embedding_of(self.model)

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The indices of each adapter's virtual tokens."""
        return {name: torch.arange(self.encoder(name).embedding.num_embeddings) for name in self.peft_config}

    def encoder(self, adapter_name: str) -> VirtualTokens:
        """What one adapter holds."""
        return cast(VirtualTokens, self.prompt_encoder[adapter_name])

    @property
    def active_config(self) -> PromptLearningConfig:
        """The active adapter's configuration."""
        return cast(PromptLearningConfig, self.peft_config[self.state.active[0]])

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Tensor | Cache:
        """The active adapter's virtual tokens for a batch: embeddings (rows, tokens, width), or for prefix tuning a
        cache.

        Args:
            task_ids: the task of each row, (rows,), for methods that know tasks; the rows of the batch may be several
                to one of these, as in beam search.
            max_cache_len: as in peft, without effect.
        """
        encoder = self.encoder(self.state.active[0])
        if encoder.in_cache:
            return self._filled(None, batch_size)
        if task_ids is not None:
            task_ids = task_ids.repeat_interleave(batch_size // len(task_ids))
        return encoder.prompt(task_ids).expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What a checkpoint holds of an adapter's virtual tokens."""
        return self.encoder(adapter_name).saved()["prompt_embeddings"].cpu()

    def _filled(self, cache: Any, rows: int) -> Cache:
        """A cache that starts with the keys and values of the prefix: an empty one, or a new one."""
        text, dtype = text_config(self.model.config), cast(Any, self.model).dtype
        if cache is None:
            cache = DynamicCache(config=text)
            if self.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=text))
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        prefix: Any = self.encoder(self.state.active[0])
        for layer, (key, value) in by_layer(prefix.keys_and_values(rows), text).items():
            own.update(key.to(dtype), value.to(dtype), layer)
        return cache

    # ---------------------------------------------------------------- how they enter

    @property
    def is_encoder_decoder(self) -> bool:
        return getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)

    def _doors(self, encoder: VirtualTokens) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The modules at which virtual tokens enter, and the hooks that let them in."""
        model: Any = self.model
        if encoder.in_cache:
            return [(takes_cache(model), self._enter_cache)]
        if self.is_encoder_decoder:  # `generate` calls the encoder by itself
            return [(model, self._enter_decoder), (model.get_encoder(), self._enter_input)]
        return [(model, self._enter_input)]

    def _open_doors(self, encoder: VirtualTokens) -> None:
        self._hooks = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in self._doors(encoder)
        ]

    def _close_doors(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def acts(self) -> bool:
        """Whether virtual tokens enter at all.

        Raises:
            AdapterError: rows were given adapters of their own.
        """
        if self.state.rows is not None:
            raise AdapterError("adapter_names is not supported by prompt methods: one prompt acts on the whole batch.")
        return self.state.enabled and bool(self.state.active)

    def check_checkpointing(self, encoder: VirtualTokens) -> None:
        """Refuse gradient checkpointing, under which transformers drops the cache, where the prompt is in it."""
        on = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if on and encoder.in_cache:
            raise ConfigError("PREFIX_TUNING does not work with gradient checkpointing.")

    def _enter_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given] | None:
        """Pre-hook of a model or encoder: the virtual tokens stand before the embeddings of the input."""
        if not self.acts:
            return None
        given, count, task = self._call(module, args, kwargs)
        started = past(given) > 0
        if given.get("position_ids") is not None:
            if not started and not counts_up(given["position_ids"]):
                warnings.warn("Position ids are not supported by prompt methods and ignored.", stacklevel=2)
            given["position_ids"] = None
        mask = given.get("attention_mask")
        if started:
            given["attention_mask"] = longer(mask, count, 1)
            return (), given
        inputs = self._embedded(given, "")
        if mask is not None and mask.shape[-1] != count + inputs.shape[1]:  # `_enter_decoder` may have been here
            given["attention_mask"] = longer(mask, count, 1)
        given["inputs_embeds"] = torch.cat([self._prompt(inputs)[:, :count], inputs], dim=1)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = longer(given["token_type_ids"], count, 0)
        if given.get("labels") is not None and task.token_labels:
            given["labels"] = longer(given["labels"], count, IGNORED)
        return (), given

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given] | None:
        """Pre-hook of an encoder-decoder: attention to the encoder's virtual tokens, and those before the decoder's
        input. As in peft, `generate` has the former only."""
        if not self.acts:
            return None
        given, count, _ = self._call(module, args, kwargs)
        given["attention_mask"] = longer(given.get("attention_mask"), count, 1)
        encoder = self.encoder(self.state.active[0])
        submodules = self.active_config.num_transformer_submodules
        if not encoder.before_decoder or submodules != 2 or "encoder_outputs" in given:
            return (), given
        labels = given.get("labels")
        if labels is not None:
            if given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
                given["decoder_input_ids"] = cast(Any, self.model).prepare_decoder_input_ids_from_labels(labels=labels)
            given["labels"] = longer(labels, count, IGNORED)
        inputs = self._embedded(given, "decoder_")
        given["decoder_inputs_embeds"] = torch.cat([self._prompt(inputs)[:, count:], inputs], dim=1)
        given["decoder_attention_mask"] = longer(given.get("decoder_attention_mask"), count, 1)
        return (), given

    def _enter_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[tuple[()], Given] | None:
        """Pre-hook of a decoder: the virtual tokens are keys and values that it finds in its cache."""
        if not self.acts:
            return None
        if self.training:
            self.check_checkpointing(self.encoder(self.state.active[0]))
        given, count, _ = self._call(module, args, kwargs)
        if given.get("use_cache") is False:  # `generate` passes what the call before left, with all of the input
            given.pop("past_key_values", None)
        if not past(given):
            names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
            rows = next(len(given[name]) for name in names if given.get(name) is not None)
            given["past_key_values"] = self._filled(given.get("past_key_values"), rows)
        name = "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"
        given[name] = longer(given.get(name), count, 1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + count
        return (), given

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> tuple[Given, int, Task]:
        """The arguments of a call by name, the number of virtual tokens and the task."""
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        config = self.active_config
        task = TASKS[TaskType(config.task_type or "")]
        if given.get("token_type_ids") is not None and not task.token_types:
            warnings.warn("Token type ids are not supported for this task and ignored.", stacklevel=2)
            given["token_type_ids"] = None
        return given, cast(int, config.num_virtual_tokens), task

    def _prompt(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.get_prompt(len(inputs), self.state.task_ids)).to(inputs.dtype)

    def _embedded(self, given: Given, side: str) -> Tensor:
        """The embeddings of the input, which replace its ids among the arguments."""
        ids = given.pop(f"{side}input_ids", None)
        inputs = given.get(f"{side}inputs_embeds")
        return self.word_embeddings(ids) if inputs is None else inputs


def takes_cache(model: nn.Module) -> nn.Module:
    """The model, or the model below its head, whichever takes `past_key_values`. A model of one's own is believed
    to."""
    if not isinstance(model, PreTrainedModel):
        return model
    below = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for module in [model, *below]:
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return module
    raise ConfigError(f"{type(model).__name__} does not take past key values, which prefix tuning needs.")


def past(given: Given) -> int:
    """How many tokens the cache holds."""
    cache = given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def counts_up(position_ids: Tensor) -> bool:
    """Whether positions are 0, 1, 2, ... in every row."""
    return bool((position_ids == torch.arange(position_ids.shape[-1], device=position_ids.device)).all())


def longer(tensor: Any, count: int, value: int) -> Any:
    """A tensor (rows, length) with `count` columns of a value before it; None stays None.

    Raises:
        AdapterError: it is an attention mask for a cache of fixed size, in which virtual tokens have no room.
    """
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        raise AdapterError(
            "Prompt methods need an attention mask of (rows, length): generate with a cache that grows, not with a "
            "static one."
        )
    return torch.cat([tensor.new_full((len(tensor), count), value), tensor], dim=1)
