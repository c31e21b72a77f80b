"""The base model: loaded once, frozen, shared by all trials of a study."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workbench.errors import DataError, ModelError

from .config import ModelSection, Task

MODEL_CLASSES: dict[Task, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer.

    Attributes:
        model: the model in evaluation mode, no parameter requires a gradient.
        tokenizer: has a padding token and pads on the right.
        task: decides head, collation and metrics.
        device: where the model is.
        model_id: the folder or hub id as the study names it.
        fingerprint: hash of configuration, weights, labels and seed; equal fingerprints mean equal outputs.
        fresh: names of the weights that the checkpoint lacks (a task head, a pooler), drawn from the seed instead.
        kind: the type of device that is computed for; that of `device`, but in a plan for a device that is not here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: torch.device
    model_id: str
    fingerprint: str
    fresh: tuple[str, ...]
    kind: str

    @property
    def labels(self) -> list[str]:
        """Class or tag names in the order of the head's outputs."""
        names: Any = self.model.config.id2label
        return [names[i] for i in range(len(names))]

    @contextmanager
    def vocabulary(self, new_tokens: Sequence[str]) -> Iterator[Base]:
        """Lend the base with more tokens: the same model with a row more for each, and a tokenizer that knows them.

        A new row is the mean of the rows of the pieces that the token was split into. Afterwards the model is as it
        was, to the bit; adapters must have been taken off by then.

        Raises:
            DataError: a token is known already, named twice, or nothing is left of it after the tokenizer's clean-up.
        """
        if not new_tokens:
            yield self
            return
        pieces = self._pieces(new_tokens)
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_tokens(list(new_tokens))
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[token] for token in new_tokens]

        tables = vocabulary_tables(self.model)
        rows = max(len(self.model.get_input_embeddings().weight), len(tokenizer))  # type: ignore[arg-type]
        grown = {id(table): grow(table, rows, dict(zip(ids, pieces, strict=True))) for _, _, table in tables}
        text_config = self.model.config.get_text_config()
        before = text_config.vocab_size
        try:
            text_config.vocab_size = rows
            for module, name, table in tables:
                put_table(module, name, grown[id(table)])
            yield replace(self, tokenizer=tokenizer)
        finally:
            text_config.vocab_size = before
            for module, name, table in tables:
                put_table(module, name, table)

    def _pieces(self, new_tokens: Sequence[str]) -> list[list[int]]:
        known = self.tokenizer.get_vocab()
        for token in new_tokens:
            if token in known:
                raise DataError(f"new_tokens: {token!r} is a token already (id {known[token]}); name it as a string.")
            if list(new_tokens).count(token) > 1:
                raise DataError(f"new_tokens: {token!r} is named twice.")
        pieces = [self.tokenizer(token, add_special_tokens=False)["input_ids"] for token in new_tokens]
        for token, ids in zip(new_tokens, pieces, strict=True):
            if not ids:
                raise DataError(f"new_tokens: the tokenizer leaves nothing of {token!r}.")
        return pieces


def configs_of(model: Any) -> list[PretrainedConfig]:
    """The configurations that a model and its parts go by, each once."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    parts = [value for config in found.values() for value in vars(config).values()]
    return list((found | {id(part): part for part in parts if isinstance(part, PretrainedConfig)}).values())


def positions(model: nn.Module) -> int | None:
    """How many positions a model has learned; None if it has no table of them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe")):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            return module.num_embeddings - unused
    return None


def vocabulary_tables(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every place `(module, name, parameter)` with one row a token; tied places hold the same parameter."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    own = {id(p) for layer in layers for p in layer.parameters()}
    return [
        (m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None and id(p) in own
    ]


def grow(table: nn.Parameter, rows: int, pieces: dict[int, list[int]]) -> nn.Parameter:
    """A frozen copy of a table `(tokens, ...)` with `rows` rows; row `i` of `pieces` is the mean of those it names."""
    longer = table.new_zeros(rows, *table.shape[1:])
    longer[: len(table)] = table.detach()
    for row, parts in pieces.items():
        longer[row] = table.detach()[parts].float().mean(0).to(table.dtype)
    return nn.Parameter(longer, requires_grad=False)


def put_table(module: nn.Module, name: str, table: nn.Parameter) -> None:
    """Make a table the module's own and keep the module's idea of its size true."""
    setattr(module, name, table)
    for size in ("num_embeddings", "out_features"):
        if hasattr(module, size):
            setattr(module, size, len(table))


def load_base(model: ModelSection, labels: list[str] | None, seed: int, device: str | torch.device = "auto") -> Base:
    """Load and freeze the base model of a study.

    Args:
        model: what to load and how.
        labels: class or tag names of the data in the order of their ids; None for language models.
        seed: of the weights that the checkpoint does not hold, such as a new task head.
        device: a torch device, or "auto" for a GPU if there is one.

    Raises:
        ModelError: the model or its tokenizer is missing, unreadable, pickled or not made for the task, or the
            device is not here.
    """
    device = pick_device(device)
    with quiet(), torch.random.fork_rng(devices=[]):
        config = load_config(model, labels)
        tokenizer = load_tokenizer(model)
        adopt_special_tokens(config, tokenizer)
        torch.manual_seed(seed)
        network, fresh = load_model(model, config)
    network.requires_grad_(False)
    digest = fingerprint(network)
    return Base(
        model=network.eval().to(device),
        tokenizer=tokenizer,
        task=model.task,
        device=device,
        model_id=model.path,
        fingerprint=digest,
        fresh=tuple(sorted(fresh)),
        kind=device.type,
    )


def pick_device(device: str | torch.device, absent: bool = False) -> torch.device:
    """A torch device; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Args:
        absent: it may be one that cannot be used here.

    Raises:
        ModelError: there is no device of this name.
    """
    if device == "auto":
        kinds = ("cuda", "mps", "cpu")
        return next(found for kind in kinds if available(found := torch.device(kind)))
    with blame(f"training.device: {str(device)!r} is no device"):
        named = torch.device(device)
    if not absent and not available(named):
        raise ModelError(f"training.device: {named} cannot be used here; leave it out to take what there is.")
    return named


def available(device: torch.device) -> bool:
    """Whether this process can use a device."""
    if device.type == "cpu":
        return True
    backend: Any = getattr(torch, device.type, None)
    return backend is not None and backend.is_available() and (device.index or 0) < backend.device_count()


def load_config(model: ModelSection, labels: list[str] | None) -> PretrainedConfig:
    """The model's configuration with the study's overrides and labels."""
    if Path(model.path).is_dir() and not (Path(model.path) / "config.json").is_file():
        raise ModelError(f"model.path: the folder {model.path} holds no config.json, so it is not a saved model.")
    with blame(f"model.path: {model.path!r} is neither a folder with a model nor a model on the Hugging Face hub"):
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    unknown = sorted(name for name in model.overrides if not hasattr(config, name))
    if unknown:
        raise ModelError(f"model.overrides: {', '.join(unknown)} is no field of {type(config).__name__}.")
    for name, value in model.overrides.items():
        setattr(config, name, value)
    if model.task in CLASSIFICATION and labels is not None:
        config.id2label = dict(enumerate(labels))
        config.problem_type = "single_label_classification"  # else transformers guesses it at the first loss
        config.label2id = {label: i for i, label in enumerate(labels)}
    return config


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right; the end-of-text token pads where there is no padding token."""
    path = model.tokenizer or model.path
    # words that come one by one need the space that byte-level tokenizers expect in front of a word
    options = {"add_prefix_space": True} if model.task == "TOKEN_CLS" else {}
    with blame(f"model.tokenizer: no tokenizer can be loaded from {path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=model.revision if path == model.path else None,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.tokenizer: the tokenizer of {path!r} has neither a padding nor an end-of-text token.")
    return tokenizer


def adopt_special_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model which token pads: a decoder that classifies looks for the last token before the padding."""
    text_config = config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id


def load_model(model: ModelSection, config: PretrainedConfig) -> tuple[PreTrainedModel, set[str]]:
    """The network on the CPU, and the names of weights that had to be drawn anew."""
    cls, dtype = MODEL_CLASSES[model.task], getattr(torch, model.dtype)
    wrong_task = f"model.path: {model.path!r} cannot be loaded for {model.task}"
    if model.weights == "random":
        with blame(wrong_task):
            network = cls.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
        return network, set(network.state_dict())
    if Path(model.path).is_dir() and not list(Path(model.path).glob("*.safetensors")):
        raise ModelError(
            f"model.path: the folder {model.path} holds no *.safetensors. Pickled weights (.bin) are not loaded, since "
            "a pickle can run code: convert them, or set `weights: random`."
        )
    with blame(wrong_task):
        network, report = cls.from_pretrained(
            model.path,
            config=config,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head for other labels gives way to a new one
            output_loading_info=True,
        )
    fresh = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    if fresh and model.task not in CLASSIFICATION:
        raise ModelError(
            f"{wrong_task}: its files lack {len(fresh)} weights of {type(network).__name__}, e.g. {min(fresh)}."
        )
    return network, fresh


def fingerprint(network: PreTrainedModel) -> str:
    """Hash of what the base computes: its configuration, labels included, and every weight."""
    config = network.config.to_dict()
    config.pop("_name_or_path", None)  # the same model may lie elsewhere tomorrow
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    add_weights(digest, network.state_dict())
    return digest.hexdigest()[:16]


def weights_hash(base: Base) -> str:
    """Hash of the weights that the base's own files hold."""
    digest, fresh = hashlib.sha256(), set(base.fresh)
    add_weights(digest, {name: value for name, value in base.model.state_dict().items() if name not in fresh})
    return digest.hexdigest()[:16]


def add_weights(digest: hashlib._Hash, weights: Mapping[str, torch.Tensor]) -> None:
    """Go on with a hash."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def blame(message: str) -> Iterator[None]:
    """Whatever a library raises in here becomes a ModelError with this message and the first line of the library's."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{message}: {first_line(str(error).splitlines()) or type(error).__name__}") from error


def first_line(lines: Iterable[str]) -> str:
    """The first line with anything in it."""
    return next((line.strip() for line in lines if line.strip()), "")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no report on weights drawn anew, which `Base.fresh` holds instead."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
