"""Data: what is read, refused, tokenised once and put into batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from workbench.errors import DataError
from workbench.training import data as data_module
from workbench.training.config import DataSection
from workbench.training.data import batches, collate, read_data, tokenize

from .conftest import make_tokenizer, write_rows


def section(path: Path | None = None, **values: object) -> DataSection:
    return DataSection(**{"path": None if path is None else str(path), "text": "text", "label": "label", **values})


# ---------------------------------------------------------------- reading


def test_folder_of_csv(reviews: Path) -> None:
    raw = read_data(section(reviews), "SEQ_CLS")
    assert list(raw.splits) == ["train", "validation", "test"]
    assert raw.labels == ["no", "yes"]
    assert raw.splits["train"]["text"][:2] == ["the film was bad ", "the film was good a "]
    assert raw.notes == []


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_file_format_reads_alike(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "null", "label": "007"}, {"text": 'two\nlines, "quoted"', "label": "b"}]
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(rows))
        else:
            frame = datasets.Dataset.from_list(rows)
            {"jsonl": frame.to_json, "parquet": frame.to_parquet, "csv": frame.to_csv}[suffix](path)
    raw = read_data(section(tmp_path), "SEQ_CLS")
    assert raw.splits["train"] == {"text": ["null", 'two\nlines, "quoted"'], "label": ["007", "b"]}


def test_single_files_and_max_rows(reviews: Path) -> None:
    files = {name: str(reviews / f"{name}.csv") for name in ("train", "validation")}
    raw = read_data(section(**files, max_rows={"train": 5, "test": 3}), "SEQ_CLS")
    assert {name: len(columns["text"]) for name, columns in raw.splits.items()} == {"train": 5, "validation": 12}


def test_a_file_replaces_that_of_the_folder(reviews: Path, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"text": "mine", "label": "yes"}])
    raw = read_data(section(reviews, validation=str(own)), "SEQ_CLS")
    assert raw.splits["validation"]["text"] == ["mine"]
    assert len(raw.splits["train"]["text"]) == 40


def test_validation_is_held_out_where_there_is_none(reviews: Path) -> None:
    (reviews / "validation.csv").unlink()
    first, second = (read_data(section(reviews), "SEQ_CLS") for _ in range(2))
    assert first.splits == second.splits
    assert first.fingerprint == second.fingerprint
    assert {name: len(columns["text"]) for name, columns in first.splits.items()} == {
        "train": 36,
        "validation": 4,
        "test": 8,
    }
    assert "4 rows (10%) of train are held out" in first.notes[0]


def test_fingerprint_follows_the_rows(reviews: Path) -> None:
    before = read_data(section(reviews), "SEQ_CLS").fingerprint
    path = reviews / "train.csv"
    path.write_text(path.read_text().replace("good", "fine", 1))
    assert read_data(section(reviews), "SEQ_CLS").fingerprint != before


def test_hub_classes_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    found = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features),
            "validation_matched": datasets.Dataset.from_dict({"text": ["c"], "label": [1]}, features),
            "test": datasets.Dataset.from_dict({"text": ["d", "e"], "label": [-1, -1]}, features),
        }
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or found)
    hub = {"path": "some/data", "name": "config", "revision": "abc", "text": "text", "label": "label"}
    raw = read_data(DataSection(**hub, validation="validation_matched"), "SEQ_CLS")
    assert asked == [(("some/data", "config"), {"revision": "abc"})]
    assert raw.labels == ["neg", "pos"]
    assert raw.splits["train"]["label"] == ["pos", "neg"]
    assert raw.splits["validation"] == {"text": ["c"], "label": ["neg"]}
    assert list(raw.splits) == ["train", "validation"]
    assert raw.notes == ["The test split has no labels and is left out."]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation_matched, test"):
        read_data(DataSection(**hub, validation="dev"), "SEQ_CLS")


def test_hub_tags_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "ner": tags})
    rows = datasets.Dataset.from_dict({"words": [["Ann", "likes"]], "ner": [[1, 0]]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, validation=rows))
    raw = read_data(DataSection(path="some/data", tokens="words", tags="ner"), "TOKEN_CLS")
    assert raw.splits["train"] == {"tokens": [["Ann", "likes"]], "tags": [["B-PER", "O"]]}


def test_refusals(tmp_path: Path, reviews: Path) -> None:
    good = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]

    def message(
        train: list[dict] = good, validation: list[dict] = good, task: str = "SEQ_CLS", **values: object
    ) -> str:
        files = {
            "train": str(write_rows(tmp_path / "own_train.jsonl", train)),
            "validation": str(write_rows(tmp_path / "own_validation.jsonl", validation)),
        }
        with pytest.raises(DataError) as caught:
            read_data(section(**{**files, **values}), task)
        return str(caught.value)

    assert "gone.csv does not exist" in message(train=good, validation=good, test=str(tmp_path / "gone.csv"))
    assert "is none of .csv" in message(test=str(write_rows(tmp_path / "rows.txt", good)))
    assert "no column 'lable'; its columns are text, label" in message(label="lable")
    assert "data.label: is not set; its columns are text, label" in message(label=None)
    assert "row 2 of train is missing" in message(train=[good[0], {"text": "b", "label": None}])
    assert "row 1 of validation is missing" in message(validation=[{"text": None, "label": "x"}, good[1]])
    assert "validation has labels that train lacks: z; train has x, y" in message(
        validation=[{"text": "a", "label": "z"}]
    )
    assert "nothing to tell apart" in message(train=[good[0]])
    assert "a label must be a name or a whole number" in message(train=[{"text": "a", "label": 0.5}])
    assert "not a text" in message(train=[{"text": ["a"], "label": "x"}])
    words = {"tokens": ["a", "b"], "tags": ["x"]}
    assert "row 1 of train has 1 tags for 2 tokens" in message(
        [words], [words], "TOKEN_CLS", tokens="tokens", tags="tags"
    )
    words = {"tokens": [], "tags": []}
    full = {"tokens": ["a"], "tags": ["x"]}
    assert "empty or has a gap" in message([full, words], [full], "TOKEN_CLS", tokens="tokens", tags="tags")

    (tmp_path / "empty.csv").write_text("text,label\n")
    assert "the test split is empty" in message(test=str(tmp_path / "empty.csv"))
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    assert "broken.jsonl cannot be read" in message(test=str(tmp_path / "broken.jsonl"))
    (tmp_path / "blank.csv").write_text("")
    assert "blank.csv cannot be read" in message(test=str(tmp_path / "blank.csv"))
    assert "is a file; name it in data.train" in message(path=str(reviews / "train.csv"))
    assert "neither a folder nor a data set on the Hugging Face hub" in message(path=str(tmp_path / "nowhere"))
    write_rows(reviews / "train.jsonl", good)
    with pytest.raises(DataError, match=r"holds train.csv, train.jsonl; say which in data.train"):
        read_data(section(reviews), "SEQ_CLS")
    assert read_data(section(reviews, train=str(reviews / "train.csv")), "SEQ_CLS").labels == ["no", "yes"]
    with pytest.raises(DataError, match="there is no training split"):
        read_data(section(tmp_path / "..", text="text"), "SEQ_CLS")


# ---------------------------------------------------------------- tokens


def test_token_labels_sit_on_the_first_piece_of_a_word(names: Path, tmp_path: Path, bert_folder: Path) -> None:
    rows = [{"tokens": ["Annbad", "likes", "Paris"], "tags": ["person", "O", "town"]}]
    write_rows(names / "validation.jsonl", rows)
    raw = read_data(DataSection(path=str(names), tokens="tokens", tags="tags"), "TOKEN_CLS")
    data = tokenize(raw, AutoTokenizer.from_pretrained(bert_folder), tmp_path / "cache")
    row = data.validation.features[0]
    pieces = make_tokenizer().convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "Ann", "##b", "##a", "##d", "likes", "Paris", "[SEP]"]
    assert raw.labels == ["O", "person", "town"]
    assert row["labels"] == [-100, 1, -100, -100, -100, 0, 2, -100]


def test_causal_lm_learns_the_target_alone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"q": "good film", "a": "Ann was the"}, {"q": "", "a": "Bob"}])
    files = {"train": str(path), "validation": str(path), "text": "q"}
    tokenizer = make_tokenizer(eos_token="[EOS]", pad_token="[PAD]")
    good, film, the, was, ann, eos = tokenizer.convert_tokens_to_ids(["good", "film", "the", "was", "Ann", "[EOS]"])

    data = tokenize(read_data(DataSection(**files, target="a"), "CAUSAL_LM"), tokenizer, tmp_path / "cache")
    assert data.train.features[0]["input_ids"] == [good, film, ann, was, the, eos]
    assert data.train.features[0]["labels"] == [-100, -100, ann, was, the, eos]
    assert (len(data.train), len(data.validation)) == (1, 1)
    assert "1 of 2 rows of train hold nothing to learn from and are left out." in data.notes

    short = DataSection(**files, target="a", max_length=2, max_target_length=2)
    data = tokenize(read_data(short, "CAUSAL_LM"), tokenizer, tmp_path / "cache")
    assert data.train.features[0]["input_ids"] == [good, ann, eos]

    plain = tokenize(read_data(DataSection(**files), "CAUSAL_LM"), tokenizer, tmp_path / "cache").train.features[0]
    assert plain["input_ids"] == plain["labels"] == [good, film, eos]


def test_seq_2_seq(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"q": "good film", "a": "Ann was the"}])
    files = {"train": str(path), "validation": str(path)}
    tokenizer = make_tokenizer(eos_token="[EOS]", pad_token="[PAD]")
    raw = read_data(DataSection(**files, text="q", target="a", max_target_length=3), "SEQ_2_SEQ_LM")
    row = tokenize(raw, tokenizer, tmp_path / "cache").train.features[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["good", "film", "[EOS]"]
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["Ann", "was", "[EOS]"]
    assert row["target"] == "Ann was the"


def test_pairs_have_types_and_long_rows_are_cut(tmp_path: Path, bert_folder: Path) -> None:
    rows = [{"a": "good film " * 40, "b": "bad", "label": "x"}, {"a": "the", "b": "film", "label": "y"}]
    path = str(write_rows(tmp_path / "train.jsonl", rows))
    raw = read_data(DataSection(train=path, validation=path, text="a", text_pair="b", label="label"), "SEQ_CLS")
    data = tokenize(raw, AutoTokenizer.from_pretrained(bert_folder), tmp_path / "cache")
    assert len(data.train.features[0]["input_ids"]) == 64, "the tokenizer's own limit is below max_length"
    assert data.train.features[1]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert collate(data.train, [0, 1])["token_type_ids"].shape == (2, 64)


def test_tokenised_once(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    encoder = data_module.encoder

    def counting(raw, tokenizer):  # type: ignore[no-untyped-def]
        function = encoder(raw, tokenizer)

        def count(batch):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return function(batch)

        return count

    monkeypatch.setattr(data_module, "encoder", counting)
    tokenizer = make_tokenizer(pad_token="[PAD]")
    first = tokenize(read_data(section(reviews), "SEQ_CLS"), tokenizer, tmp_path)
    assert calls == 2
    second = tokenize(read_data(section(reviews), "SEQ_CLS"), tokenizer, tmp_path)
    assert calls == 2
    assert second.fingerprint == first.fingerprint
    assert second.train.features[:] == first.train.features[:]

    longer = make_tokenizer(pad_token="[PAD]")
    longer.add_tokens(["goodbad"])
    assert tokenize(read_data(section(reviews), "SEQ_CLS"), longer, tmp_path).fingerprint != first.fingerprint
    assert calls == 4
    tokenize(read_data(section(reviews, max_length=3), "SEQ_CLS"), tokenizer, tmp_path)
    assert calls == 6


# ---------------------------------------------------------------- batches


def test_batches_see_every_row_once_an_epoch_in_a_new_order() -> None:
    flat = [i for batch in batches(10, 4, 10, seed=0) for i in batch]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(batches(10, 4, 10, seed=0)) == list(batches(10, 4, 10, seed=0)) != list(batches(10, 4, 10, seed=1))


def test_batches_wrap_around_small_data() -> None:
    seen = list(batches(3, 8, 3, seed=0))
    assert [len(batch) for batch in seen] == [8, 8, 8]
    assert set(Counter(i for batch in seen for i in batch).values()) == {8}


def test_batches_leave_the_process_random_numbers_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(batches(10, 4, 3, seed=5))
    assert torch.equal(torch.get_rng_state(), state)


def test_collate_pads_to_the_longest_row(names: Path, tmp_path: Path, bert_folder: Path) -> None:
    raw = read_data(DataSection(path=str(names), tokens="tokens", tags="tags"), "TOKEN_CLS")
    data = tokenize(raw, AutoTokenizer.from_pretrained(bert_folder), tmp_path)
    batch = collate(data.train, [1, 0])
    lengths = [len(data.train.features[i]["input_ids"]) for i in (1, 0)]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][1, lengths[1] :].tolist() == [0] * (max(lengths) - lengths[1])
    assert batch["labels"][1, lengths[1] :].tolist() == [-100] * (max(lengths) - lengths[1])
    assert batch["labels"].dtype == torch.long
