"""Predictions of a registered adapter, computed as its trial computed them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from workbench.adapters import PeftModel
from workbench.errors import DataError, ModelError
from workbench.training.base import blame, load_base, pick_device, quiet, weights_hash
from workbench.training.config import TrainingSection
from workbench.training.data import IGNORED, Columns, RawData, Split, check_rows, collate, encoder
from workbench.training.halved import halve_weights
from workbench.training.loop import Measured, by_length, evaluate, in_order, produce, score_rows, to_device

from .recipe import ADAPTER, TOKENIZER, BaseRecipe, Recipe

Answer = dict[str, Any]  # of one row, by column


class SharedBase:
    """A base model for all adapters of this process that were trained on it. Bases that differ in their heads alone
    share the weights below in memory.

    Attributes:
        base: the model.
        fingerprint: of the weights in its files.
        lock: held by whoever loads or computes, since an adapter may write to the base's weights while it is on.
        known: by what they were loaded from; they live as long as the process.
    """

    lock: ClassVar = threading.RLock()
    known: ClassVar[dict[str, SharedBase]] = {}

    def __init__(self, recipe: BaseRecipe, device: str):
        base = load_base(recipe.model, list(recipe.labels) or None, recipe.seed, device)
        if recipe.model.weights == "random":
            base = replace(base, fresh=())
        found = weights_hash(base)
        if recipe.fingerprint not in ("", found):
            raise ModelError(
                f"{recipe.model.path} holds other weights than those that the adapter was trained on "
                f"({found}, not {recipe.fingerprint}). Name the right folder or hub id: --base."
            )
        if recipe.precision == "bf16":
            halve_weights(base)
        self.fingerprint = found
        self._grown = ExitStack()  # with more tokens the model stays so: whoever shares it has the same recipe
        self.base = self._grown.enter_context(base.vocabulary(recipe.new_tokens))
        self._share()

    def _share(self) -> None:
        """Hold the weights that another base has too in the same memory; but not those that an adapter brings."""
        own = {name: p for name, p in self.base.model.named_parameters() if name not in self.base.fresh}
        for other in self.known.values():
            for name, theirs in other.base.model.named_parameters():
                if name in own and name not in other.base.fresh and alike(own[name], theirs):
                    own.pop(name).data = theirs.data

    @classmethod
    def of(cls, recipe: BaseRecipe, device: str) -> SharedBase:
        """The base of a recipe, loaded the first time.

        Raises:
            ModelError: it is missing, unreadable, or another one than the adapter was trained on.
        """
        key = f"{device} {recipe.model_dump_json(exclude={'fingerprint'})}"
        with cls.lock:
            if key not in cls.known:
                cls.known[key] = cls(recipe, device)
            return cls.known[key]


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same, and in the same place."""
    where = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return where and torch.equal(one, other)


class Predictor:
    """An adapter on its base, which it shares with others.

    Args:
        recipe: says which base, and what its input is.
        adapter: folder of the adapter.
        tokenizer: folder of the tokenizer; None takes the base's own.
        device: a torch device, or "auto" for a GPU if there is one.

    Attributes:
        base: the base with the tokenizer.
        fingerprint: of the weights in the base's files.

    Raises:
        CheckpointError: the adapter's files are missing or damaged.
        ModelError: the base cannot be loaded, or is another one than the adapter was trained on.
    """

    def __init__(self, recipe: Recipe, adapter: Path, tokenizer: Path | None = None, device: str = "auto"):
        shared = SharedBase.of(recipe.base, str(pick_device(device)))
        self.recipe, self.base, self.labels = recipe, shared.base, [*recipe.base.labels]
        self.fingerprint = shared.fingerprint
        if tokenizer is not None:
            with blame(f"No tokenizer can be loaded from {tokenizer}"), quiet():
                own = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            self.base = replace(shared.base, tokenizer=own)
        with SharedBase.lock, torch.random.fork_rng(devices=[]):
            self._model = PeftModel.from_pretrained(self.base.model, adapter).eval()
            self._model.base_model.detach()

    @classmethod
    def open(cls, folder: Path, path: str | None = None, device: str = "auto") -> Predictor:
        """Open what `workbench register` wrote.

        Args:
            folder: holds `recipe.json`, `adapter/` and `tokenizer/`.
            path: of the base model, where it is not as recorded.

        Raises:
            CheckpointError, ModelError: see `Predictor`; also the recipe may be missing or damaged.
        """
        recipe = Recipe.load(folder)
        if path is not None:
            base = recipe.base.model_copy(update={"model": recipe.base.model.model_copy(update={"path": path})})
            recipe = recipe.model_copy(update={"base": base})
        return cls(recipe, folder / ADAPTER, folder / TOKENIZER, device)

    @torch.no_grad()
    def predict(
        self, rows: Mapping[str, Sequence[Any]], max_new_tokens: int | None = None, probabilities: bool = False
    ) -> dict[str, list[Any]]:
        """Predict rows.

        Args:
            rows: columns of equal length, named as in the study's data; others are ignored.
            max_new_tokens: of texts; the study's `max_target_length` by default.
            probabilities: of every class, beside that of the likeliest.

        Returns:
            columns of the same length: `prediction` (class, list of tags, or text that goes on from the row's); of
            classes `score`, the probability, and `probabilities`, a JSON object by class; of a language model of plain
            text `loss`, of the row's own text, in nats a token. None where a row holds nothing to predict from; of a
            word that was cut off the tag is None.

        Raises:
            DataError: a column is missing, or a cell is not what it should be.
        """
        columns, names = self._columns(rows), self.outputs(probabilities)
        count = len(next(iter(columns.values())))
        if not count:
            return {name: [] for name in names}
        split, kept = self._encoded(columns)
        order = by_length(split, self.recipe.batch_size)
        with SharedBase.lock:
            self._model.base_model.attach()
            try:
                batches = [self._batch(split, indices, max_new_tokens, probabilities) for indices in order]
            finally:
                self._model.base_model.detach()
        found = in_order(order, [row for batch in batches for row in batch])
        if self.base.task == "TOKEN_CLS":
            found = [{"prediction": self._tags(columns["tokens"][i], row)} for i, row in zip(kept, found, strict=True)]
        answers: dict[int, Answer] = dict(zip(kept, found, strict=True))
        return {name: [answers.get(i, {}).get(name) for i in range(count)] for name in names}

    def measure(self, split: Split) -> Measured:
        """What the adapter does on a split that its tokenizer has encoded."""
        with SharedBase.lock:
            self._model.base_model.attach()
            try:
                settings = TrainingSection(steps=1, eval_batch_size=self.recipe.batch_size)
                return evaluate(self._model, self.base, split, settings)
            finally:
                self._model.base_model.detach()

    def outputs(self, probabilities: bool = False) -> list[str]:
        """Names of the columns that `predict` gives."""
        if self.base.task == "SEQ_CLS":
            return ["prediction", "score", *(["probabilities"] if probabilities else [])]
        plain_text = self.base.task == "CAUSAL_LM" and self.recipe.data.target is None
        return ["prediction", "loss"] if plain_text else ["prediction"]

    def _columns(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        columns: Columns = {}
        for field, name in self.recipe.columns.items():
            if name not in rows:
                raise DataError(f"The input has no column {name!r}; its columns are {', '.join(map(str, rows))}.")
            columns[field] = [list(v) if field == "tokens" and not isinstance(v, str) else v for v in rows[name]]
        if field == "tokens":
            columns[field] = [value.split() if isinstance(value, str) else value for value in columns[field]]
        check_rows(columns, self.base.task, "the input")
        return columns

    def _encoded(self, columns: Columns) -> tuple[Split, list[int]]:
        """The rows as in training, and the numbers of those that hold anything."""
        encode = encoder(RawData({}, self.recipe.data, self.base.task, self.labels, [], ""), self.base.tokenizer)
        count = len(next(iter(columns.values())))
        whole = columns | self._unknown(columns, count)
        encoded, kept = encode(whole), list(range(count))
        if len(encoded["input_ids"]) < count:
            alone = [encode({name: [values[i]] for name, values in whole.items()}) for i in kept]
            kept = [i for i in kept if alone[i]["input_ids"]]
        disable_progress_bars()
        return Split(Dataset.from_dict(encoded), self.base.task, self.base.tokenizer.pad_token_id), kept

    def _unknown(self, columns: Columns, count: int) -> Columns:
        """Anything at all in the place of what is to be predicted."""
        if self.base.task == "SEQ_CLS":
            return {"label": self.labels[:1] * count}
        if self.base.task == "TOKEN_CLS":
            return {"tags": [self.labels[:1] * len(words) for words in columns["tokens"]]}
        return {} if self.recipe.data.target is None else {"target": [""] * count}

    def _batch(self, split: Split, indices: list[int], longest: int | None, probabilities: bool) -> list[Answer]:
        if self.base.task == "SEQ_CLS":
            return self._classes(split, indices, probabilities)
        if self.base.task == "TOKEN_CLS":
            return [{"prediction": row.guesses} for row in score_rows(self._model, self.base, split, indices)]
        losses: list[Answer] = [{} for _ in indices]
        if "loss" in self.outputs():
            rows = score_rows(self._model, self.base, split, indices)
            losses = [{"loss": math.fsum(row.losses) / len(row.losses)} for row in rows]
            unscored = [[IGNORED] * len(ids) for ids in split.features["input_ids"]]
            split = replace(split, features=split.features.remove_columns("labels").add_column("labels", unscored))
        longest = longest or self.recipe.data.max_target_length
        texts = produce(self._model, self.base, split, indices, longest)
        return [{"prediction": text, **loss} for text, loss in zip(texts, losses, strict=True)]

    def _classes(self, split: Split, indices: list[int], probabilities: bool) -> list[Answer]:
        batch = to_device(collate(split, indices), self.base.device)
        del batch["labels"]
        shares = self._model(**batch).logits.float().softmax(-1).cpu()
        found = []
        for row in shares:
            best = int(row.argmax())
            one: Answer = {"prediction": self.labels[best], "score": float(row[best])}
            if probabilities:
                one["probabilities"] = json.dumps(dict(zip(self.labels, row.tolist(), strict=True)))
            found.append(one)
        return found

    def _tags(self, words: list[str], row: Answer) -> list[str | None]:
        """A tag for each word; only those that the tokenizer kept have one."""
        cut = min(self.recipe.data.max_length, self.base.tokenizer.model_max_length)
        encoded = self.base.tokenizer(words, is_split_into_words=True, truncation=True, max_length=cut)
        places = sorted({place for place in encoded.word_ids() if place is not None})
        tags = dict(zip(places, (self.labels[i] for i in row["prediction"]), strict=True))
        return [tags.get(place) for place in range(len(words))]
