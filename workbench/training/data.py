"""Data: from a hub id or files to token ids on disk, and from there to padded batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import DataError

from .config import DataSection, Task

SPLITS = ("train", "validation", "test")
# what a task reads; a name is both the field of the study file and the column's name from here on
COLUMNS: dict[Task, tuple[str, ...]] = {
    "SEQ_CLS": ("text", "label"),
    "TOKEN_CLS": ("tokens", "tags"),
    "CAUSAL_LM": ("text",),
    "SEQ_2_SEQ_LM": ("text", "target"),
}
OPTIONAL_COLUMNS: dict[Task, tuple[str, ...]] = {"SEQ_CLS": ("text_pair",), "CAUSAL_LM": ("target",)}
LABEL_COLUMN: dict[Task, str] = {"SEQ_CLS": "label", "TOKEN_CLS": "tags"}
IGNORED = -100  # the label of a position that is not scored, as in torch and transformers
HELD_OUT, HELD_OUT_SEED = 0.1, 0
ENCODING = 1  # part of the cache key: count up when `encoder` changes what it writes

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class RawData:
    """The splits as text.

    Attributes:
        splits: train, validation and perhaps test, each with the columns of its task (see `COLUMNS`).
        section: where they came from.
        labels: class or tag names, sorted; [] for language models. Label ids count along this list.
        notes: what a reader of the results should know about the splits.
        fingerprint: hash of the rows and columns in use.
    """

    splits: dict[str, Columns]
    section: DataSection
    task: Task
    labels: list[str]
    notes: list[str]
    fingerprint: str

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by split."""
        return {name: len(next(iter(columns.values()))) for name, columns in self.splits.items()}


@dataclass(frozen=True)
class Split:
    """Rows as token ids, on disk.

    Attributes:
        features: columns `input_ids` and `labels` (a class id, or a list with one id a position), `token_type_ids`
            where there are pairs, `target` (the text itself) where there is a text to produce.
        task: what the labels mean.
        pad_token_id: fills up short rows in `collate`.
    """

    features: Dataset
    task: Task
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class TaskData:
    """What trials train on and are compared by, tokenised. The test split is not among it (see `open_vault`).

    `fingerprint` is of rows, tokenizer and settings; `labels`, `notes` as in `RawData`.
    """

    train: Split
    validation: Split
    labels: list[str]
    notes: list[str]
    fingerprint: str


# ---------------------------------------------------------------- text


def read_data(data: DataSection, task: Task) -> RawData:
    """Read the splits and find the labels.

    Raises:
        DataError: a file, split or column is missing, a split is empty, a row lacks its text or label, tokens and tags
            differ in length, or validation or test hold a label that training does not.
    """
    loaded, notes = load_splits(data), []
    if "validation" not in loaded:
        loaded |= hold_out(loaded["train"])
        notes.append(
            f"There is no validation split: {len(loaded['validation'])} rows ({HELD_OUT:.0%}) of train are held out "
            f"for it, drawn with seed {HELD_OUT_SEED}."
        )
    splits = {}
    for name, dataset in loaded.items():
        dataset = dataset.select(range(min(len(dataset), data.max_rows.get(name, len(dataset)))))  # type: ignore[call-overload]
        if not len(dataset):
            raise DataError(f"data: the {name} split is empty.")
        columns = read_columns(dataset, data, task, name)
        if name == "test" and task == "SEQ_CLS" and set(columns["label"]) == {None}:
            notes.append("The test split has no labels and is left out.")
            continue
        check_rows(columns, task, name)
        splits[name] = columns
    labels = find_labels(splits, task)
    settings = {"task": task, "labels": labels, "splits": splits}
    return RawData(splits, data, task, labels, notes, digest(settings))


def load_splits(data: DataSection) -> dict[str, Dataset]:
    """The splits that exist, with all their columns, in the order of `SPLITS`."""
    if data.path is not None and not Path(data.path).is_dir():
        return load_hub(data)
    files = {name: Path(value) for name in SPLITS if (value := getattr(data, name)) is not None}
    if data.path is not None:
        files |= find_files(Path(data.path), [name for name in SPLITS if name not in files])
    if "train" not in files:
        where = (
            f"the folder {data.path} holds no train.csv, .jsonl, .json or .parquet"
            if data.path
            else "data.train is not set"
        )
        raise DataError(f"data: there is no training split: {where}.")
    return {name: load_file(files[name]) for name in SPLITS if name in files}


def find_files(folder: Path, splits: Sequence[str]) -> dict[str, Path]:
    """The files of a folder that are named as these splits are."""
    found: dict[str, Path] = {}
    for split in splits:
        paths = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"data.path: the folder {folder} holds {names}; say which in data.{split}.")
        if paths:
            found[split] = paths[0]
    return found


def load_file(path: Path) -> Dataset:
    """A CSV, JSON (lines or one list) or Parquet file; column types as the file has them."""
    if not path.is_file():
        raise DataError(f"data: the file {path} does not exist.")
    if path.suffix not in READERS:
        raise DataError(f"data: {path} is none of {', '.join(READERS)}.")
    try:
        return Dataset(READERS[path.suffix](path))
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"data: {path} cannot be read: {error}") from error


def read_csv(path: Path) -> pa.Table:
    # every cell stays the text that it is: "null" may be a word, "007" a class
    names = pa.csv.read_csv(path, parse_options=MULTILINE).column_names
    as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pa.csv.read_csv(path, parse_options=MULTILINE, convert_options=as_text)


def read_json(path: Path) -> pa.Table:
    if path.read_bytes().lstrip()[:1] == b"[":
        return pa.Table.from_pylist(json.loads(path.read_bytes()))
    return pa.json.read_json(path)


MULTILINE = pa.csv.ParseOptions(newlines_in_values=True)
READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": pa.parquet.read_table,
}


def load_hub(data: DataSection) -> dict[str, Dataset]:
    """The splits of a hub data set; a missing validation or test split is left out unless the study names it."""
    assert data.path is not None
    if Path(data.path).is_file():
        raise DataError(f"data.path: {data.path} is a file; name it in data.train.")
    try:
        found = datasets.load_dataset(data.path, data.name, revision=data.revision)
    except Exception as error:  # the library raises of every kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data.path: {data.path!r} is neither a folder nor a data set on the Hugging Face hub: {reason[0]}"
        ) from error
    for split in SPLITS:
        asked = getattr(data, split)
        if (asked or split) not in found and (asked or split == "train"):
            raise DataError(f"data.{split}: {data.path} has no split {asked or split!r}; it has {', '.join(found)}.")
    return {split: found[name] for split in SPLITS if (name := getattr(data, split) or split) in found}


def hold_out(train: Dataset) -> dict[str, Dataset]:
    """A training and a validation split out of one."""
    if len(train) < 2:
        raise DataError("data: there is no validation split, and train has too few rows to hold any out.")
    parts = train.train_test_split(test_size=max(1, round(HELD_OUT * len(train))), seed=HELD_OUT_SEED)
    return {"train": parts["train"], "validation": parts["test"]}


def read_columns(dataset: Dataset, data: DataSection, task: Task, split: str) -> Columns:
    """The columns that the task reads, under the names of the study's fields, labels as names."""
    columns = {}
    for field in COLUMNS[task] + OPTIONAL_COLUMNS.get(task, ()):
        name = getattr(data, field)
        if name is None and field not in COLUMNS[task]:
            continue
        if name not in dataset.column_names:
            wrong = "is not set" if name is None else f"the {split} split has no column {name!r}"
            raise DataError(f"data.{field}: {wrong}; its columns are {', '.join(dataset.column_names)}.")
        values = dataset[name][:]
        columns[field] = values
        feature = dataset.features[name]
        if isinstance(feature, ClassLabel):
            columns[field] = [class_name(feature, value) for value in values]
        elif isinstance(inner := getattr(feature, "feature", None), ClassLabel):
            columns[field] = [[class_name(inner, value) for value in row] for row in values]
    return columns


def class_name(feature: ClassLabel, value: int | None) -> str | None:
    """A class's name; None where the hub marks that there is none (-1)."""
    return None if value is None or value < 0 else feature.int2str(value)


def check_rows(columns: Columns, task: Task, split: str) -> None:
    """Turn every cell into text, or lists of text; refuse cells that are missing or of another kind."""
    lists = ("tokens", "tags")
    for field, values in columns.items():
        for i, value in enumerate(values):
            where = f"data.{field}: row {i + 1} of {split}"
            if value is None or (field in LABEL_COLUMN.values() and value == ""):
                raise DataError(f"{where} is missing.")
            if isinstance(value, list) != (field in lists):
                raise DataError(f"{where} is {value!r}, not a {'list of words' if field in lists else 'text'}.")
            if field == "label" and isinstance(value, float):
                raise DataError(f"{where} is {value!r}; a label must be a name or a whole number.")
            if field in lists and (not value or None in value):
                raise DataError(f"{where} is empty or has a gap: {value!r}.")
            values[i] = [str(part) for part in value] if field in lists else str(value)
    if "tags" in columns:
        for i, (words, tags) in enumerate(zip(columns["tokens"], columns["tags"], strict=True)):
            if len(words) != len(tags):
                raise DataError(f"data.tags: row {i + 1} of {split} has {len(tags)} tags for {len(words)} tokens.")


def find_labels(splits: dict[str, Columns], task: Task) -> list[str]:
    """The labels of the training split, sorted; the other splits may hold no more."""
    column = LABEL_COLUMN.get(task)
    if column is None:
        return []
    used = {
        name: set(columns[column]) if column == "label" else {tag for row in columns[column] for tag in row}
        for name, columns in splits.items()
    }
    labels = sorted(used["train"])
    if len(labels) < 2:
        raise DataError(f"data.{column}: all rows of train are labelled {labels[0]!r}; there is nothing to tell apart.")
    for name, names in used.items():
        if extra := sorted(names - used["train"]):
            raise DataError(
                f"data.{column}: {name} has labels that train lacks: {', '.join(extra)}; train has {', '.join(labels)}."
            )
    return labels


def digest(value: Any) -> str:
    """Short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- tokens


def tokenize(raw: RawData, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> TaskData:
    """Turn what trials may see into token ids, once: the result lies in `cache_dir` under a hash of rows, tokenizer and
    settings.

    Raises:
        DataError: nothing is left of a split, or the tokenizer lacks the end-of-text token that targets end with.
    """
    fingerprint, notes = fingerprint_of(raw, tokenizer), list(raw.notes)
    train, validation = (encoded(raw, name, tokenizer, cache_dir, fingerprint) for name in ("train", "validation"))
    for name, split in (("train", train), ("validation", validation)):
        if left_out := raw.rows[name] - len(split):
            notes.append(f"{left_out} of {raw.rows[name]} rows of {name} hold nothing to learn from and are left out.")
    return TaskData(train, validation, raw.labels, notes, fingerprint)


def open_vault(raw: RawData, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Split:
    """The test split. Whoever calls this has to record that it was read.

    Raises:
        DataError: there is none.
    """
    if "test" not in raw.splits:
        raise DataError("data: there is no test split; name one in data.test.")
    return encoded(raw, "test", tokenizer, cache_dir, fingerprint_of(raw, tokenizer))


def fingerprint_of(raw: RawData, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of rows, tokenizer and settings."""
    lengths = raw.section.model_dump(include={"max_length", "max_target_length"})
    settings = {"rows": raw.fingerprint, "tokenizer": tokenizer_state(tokenizer), **lengths, "encoding": ENCODING}
    return digest(settings)


def encoded(raw: RawData, name: str, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, fingerprint: str) -> Split:
    """A split as token ids."""
    columns = raw.splits[name]
    cache_dir.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    features = Dataset.from_dict(columns).map(
        encoder(raw, tokenizer),
        batched=True,
        remove_columns=list(columns),
        cache_file_name=str(cache_dir / f"{fingerprint}-{name}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=f"{fingerprint}-{name}",
    )
    if not len(features):
        raise DataError(f"data: no row of {name} holds anything to learn from after tokenisation.")
    return Split(features, raw.task, tokenizer.pad_token_id)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides how the tokenizer splits text."""
    state: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        del state["truncation"], state["padding"]  # these change with every call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "state": state, "special": special, "limit": tokenizer.model_max_length}


def encoder(raw: RawData, tokenizer: PreTrainedTokenizerBase) -> Callable[[Columns], Columns]:
    """The function that turns a batch of text columns into columns of ids, without the rows that teach nothing."""
    ids = {label: i for i, label in enumerate(raw.labels)}
    cut = {"truncation": True, "max_length": min(raw.section.max_length, tokenizer.model_max_length)}
    cut_target = {"truncation": True, "max_length": raw.section.max_target_length}
    eos = tokenizer.eos_token_id

    def seq_cls(batch: Columns) -> Columns:
        encoded = tokenizer(batch["text"], batch.get("text_pair"), **cut)
        columns = {"input_ids": encoded["input_ids"], "labels": [ids[label] for label in batch["label"]]}
        if "text_pair" in batch and "token_type_ids" in encoded:
            columns["token_type_ids"] = encoded["token_type_ids"]
        return keep(columns, [bool(row) for row in encoded["input_ids"]])

    def token_cls(batch: Columns) -> Columns:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, **cut)
        labels = []
        for i, tags in enumerate(batch["tags"]):
            words = encoded.word_ids(i)
            first = [
                word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)
            ]
            labels.append([ids[tags[word]] if new else IGNORED for word, new in zip(words, first, strict=True)])
        return keep(
            {"input_ids": encoded["input_ids"], "labels": labels}, [max(row, default=IGNORED) >= 0 for row in labels]
        )

    def causal_lm(batch: Columns) -> Columns:
        rows = tokenizer(batch["text"], **cut)["input_ids"]
        return keep(
            {"input_ids": rows, "labels": rows}, [len(row) > 1 for row in rows]
        )  # the first token is not predicted

    def causal_lm_target(batch: Columns) -> Columns:
        prompts = [row[:-1] if row[-1:] == [eos] else row for row in tokenizer(batch["text"], **cut)["input_ids"]]
        cut_before_eos = cut_target | {"max_length": raw.section.max_target_length - 1}
        targets = [
            [*row, eos] for row in tokenizer(batch["target"], add_special_tokens=False, **cut_before_eos)["input_ids"]
        ]
        return keep(
            {
                "input_ids": [prompt + target for prompt, target in zip(prompts, targets, strict=True)],
                "labels": [[IGNORED] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)],
                "target": batch["target"],
            },
            [bool(prompt) for prompt in prompts],
        )

    def seq_2_seq_lm(batch: Columns) -> Columns:
        rows = tokenizer(batch["text"], **cut)["input_ids"]
        labels = tokenizer(text_target=batch["target"], **cut_target)["input_ids"]
        kept = [bool(row and label) for row, label in zip(rows, labels, strict=True)]
        return keep({"input_ids": rows, "labels": labels, "target": batch["target"]}, kept)

    if raw.task == "CAUSAL_LM" and raw.section.target is not None:
        if eos is None:
            raise DataError("data.target: the tokenizer has no end-of-text token to end a target with.")
        return causal_lm_target
    functions = {"SEQ_CLS": seq_cls, "TOKEN_CLS": token_cls, "CAUSAL_LM": causal_lm, "SEQ_2_SEQ_LM": seq_2_seq_lm}
    return functions[raw.task]


def keep(columns: Columns, rows: list[bool]) -> Columns:
    """The rows marked true."""
    return {name: [value for value, kept in zip(values, rows, strict=True) if kept] for name, values in columns.items()}


# ---------------------------------------------------------------- batches


def batches(rows: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of `batch_size` row numbers: one random order of all rows after the other, without a gap."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def collate(split: Split, indices: Sequence[int]) -> dict[str, Tensor]:
    """Rows as tensors `(rows, longest)`, padded on the right; the labels of SEQ_CLS have the shape `(rows,)`."""
    columns = split.features[list(indices)]
    ids = columns["input_ids"]
    batch = {"input_ids": pad(ids, split.pad_token_id), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
    if "token_type_ids" in columns:
        batch["token_type_ids"] = pad(columns["token_type_ids"], 0)
    labels = columns["labels"]
    batch["labels"] = pad(labels, IGNORED) if isinstance(labels[0], list) else torch.tensor(labels)
    return batch


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """A tensor `(rows, longest)` of whole numbers."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
