"""From a trial to a version of a registered model, and from there to predictions; every kind of task and of trial."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from command import Done, workbench
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2]))  # as `python -m` would
from benchmarks.chaos.place import MlflowServer
from workbench.serving import predictor as serving
from workbench.sweep.spec import load_study
from workbench.tracking import registry
from workbench.training.data import read_data

Lab = Any
ASSETS = Path(__file__).parents[2] / "studies" / "assets"

LORA = "lora: {r: 2, target_modules: [query, value], learning_rate: 0.05}"
TOKENS = "trainable_tokens: {token_indices: {new_tokens: [sentimentalish, moviegoerish]}, learning_rate: 0.05}"
PROMPT = "prompt_tuning: {num_virtual_tokens: 3, learning_rate: 0.05}"
LLAMA = "lora: {r: 2, target_modules: [q_proj, v_proj], learning_rate: 0.01}"
SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews in two columns, one of them named unlike the study's field."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in SPLITS:
        with (ASSETS / "movie_sentiment" / f"{split}.csv").open() as file:
            rows = list(csv.DictReader(file))[:60]
        with (folder / f"{split}.jsonl").open("w") as file:
            for row, other in itertools.pairwise(rows):
                print(json.dumps({"first": row["text"], "second": other["text"], "label": row["label"]}), file=file)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a decoder; the tokenizer is real."""
    folder = tmp_path_factory.mktemp("tiny-t5")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def made(lab: Lab, request: pytest.FixtureRequest, pairs: Path, t5: Path) -> Lab:
    """A study of the kind named, with one trial of four steps."""
    words = f"{{path: {ASSETS / 'cmudict_pronunciation'}, text: word"
    few = "max_rows: {train: 40, validation: 20}}"
    method, model, data = {
        "classes": (LORA, "", ""),
        "classes in half precision": (LORA, "", ""),
        "classes, weights drawn": (LORA, f"{{path: {lab.model}, task: SEQ_CLS, weights: random}}", ""),
        "pairs": (LORA, "", f"{{path: {pairs}, text: first, text_pair: second, label: label, max_length: 48}}"),
        "new tokens": (TOKENS, "", ""),
        "prompt": (PROMPT, "", ""),
        "full": ("full: {learning_rate: 0.01}", "", ""),
        "tags": (
            LORA,
            f"{{path: {lab.model}, task: TOKEN_CLS}}",
            f"{{path: {ASSETS / 'us_addresses'}, tokens: tokens, tags: tags, max_length: 12, "
            "max_rows: {train: 1163, validation: 20}}",
        ),
        "targets": (
            LLAMA,
            f"{{path: {ASSETS / 'tiny-llama'}, task: CAUSAL_LM}}",
            f"{words}, target: phonemes, max_target_length: 8, {few}",
        ),
        "plain text": (LLAMA, f"{{path: {ASSETS / 'tiny-llama'}, task: CAUSAL_LM}}", f"{words}, {few}"),
        "two texts": (
            "lora: {r: 2, target_modules: [q, v], learning_rate: 0.01}",
            f"{{path: {t5}, task: SEQ_2_SEQ_LM}}",
            f"{words}, target: phonemes, max_target_length: 8, {few}",
        ),
    }[request.param]
    lab.write(method, budget="{trials: 1}", training="precision: bf16" if "half" in request.param else "")
    text = lab.file.read_text().replace("steps: 10, batch_size: 8, eval_every: 5", "steps: 4, batch_size: 8")
    for key, value in (("model", model), ("data", data)):
        if value:
            text = "".join(
                f"{key}: {value}\n" if line.startswith(f"{key}:") else line for line in text.splitlines(True)
            )
    lab.file.write_text(text)
    assert lab.sweep().code == 0
    return lab


def register(lab: Lab, *words: object) -> Done:
    return workbench("register", lab.name, "--name", "best", "--home", lab.home, *words)


def predict(lab: Lab, *words: object) -> Done:
    return workbench("predict", "models:/best@champion", "--home", lab.home, *words)


def recorded(lab: Lab) -> list[dict]:
    """What the trial predicted of validation."""
    run = lab.trials[0].info.run_id
    return pq.read_table(lab.client.download_artifacts(run, "predictions/validation.parquet")).to_pylist()


KINDS = ["classes", "classes in half precision", "classes, weights drawn", "pairs", "new tokens", "prompt", "full"]
KINDS += ["tags", "targets", "plain text", "two texts"]


@pytest.mark.parametrize("made", KINDS, indirect=True, ids=KINDS)
def test_what_is_registered_predicts_what_the_trial_did(made: Lab, tmp_path: Path, request: Any):
    done = register(made, "--alias", "champion")
    assert (done.err, done.code) == ("", 0)
    before = recorded(made)
    assert f"{len(before)} of {len(before)} rows of validation are predicted as the trial did" in done.out
    (version,) = registry.versions_of(made.client.tracking_uri, "best")
    assert (version.number, version.aliases) == ("1", ("champion",))

    folder = registry.fetch(made.client.tracking_uri, version, tmp_path)
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".md", ".txt", ".model"}  # no pickle

    source, columns = tmp_path / "rows.jsonl", serving.Recipe.load(folder).columns
    rows = validation(made)[: len(before)]
    source.write_text("".join(json.dumps({name: row[name] for name in columns.values()}) + "\n" for row in rows))
    answers = [json.loads(line) for line in predict(made, "--input", source).out.splitlines()]
    for answer, was in zip(answers, before, strict=True):
        if "loss" in answer:
            assert answer["loss"] == pytest.approx(was["loss"], abs=1e-3)
        elif isinstance(answer["prediction"], list):
            assert [tag for tag in answer["prediction"] if tag] == json.loads(was["predicted"])
            assert len(answer["prediction"]) == len(answer[columns["tokens"]])
        elif "half precision" not in request.node.name or abs(answer["score"] - 0.5) > 0.05:
            assert answer["prediction"] == was["predicted"]


def validation(lab: Lab) -> list[dict]:
    """The rows of the study's validation split."""
    study = load_study(lab.file)
    columns = read_data(study.data, study.model.task).splits["validation"]
    names = {getattr(study.data, field): values for field, values in columns.items()}
    return [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]


# -------------------------------------------------------------------- one study for what follows


@pytest.fixture(scope="module")
def done(new_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A trial of each method, in this order; nothing is registered."""
    lab = new_lab(tmp_path_factory.mktemp("done"))
    assert lab.write(f"{LORA}\n{TOKENS}\n{PROMPT}", "{per_method: {trials: 1}}").sweep().code == 0
    return lab


@pytest.fixture
def copy(done: Lab, tmp_path: Path) -> Lab:
    """The same study, for tests that write; its artifacts stay where they are."""
    shutil.copytree(done.folder, tmp_path / "copy")
    return replace(done, folder=tmp_path / "copy")


def versions(lab: Lab, name: str = "best") -> list[registry.Version]:
    return registry.versions_of(lab.client.tracking_uri, name)


def test_a_version_says_where_it_is_from(copy: Lab, tmp_path: Path):
    assert register(copy, "--trial", 0, "--alias", "champion").code == 0
    (version,) = versions(copy)
    run = copy.trials[0]
    expected = {
        "study": "tiny",
        "trial": "0",
        "run_id": run.info.run_id,
        "study_run_id": copy.parent.info.run_id,
        "method": "lora",
        "base": str(copy.model),
        "data": str(copy.data),
        "data_fingerprint": copy.parent.data.params["data.fingerprint"],
    }
    assert {key: version.facts[key] for key in expected} == expected
    assert version.hyperparameters == {"r": 2, "target_modules": "query, value", "learning_rate": 0.05}
    value, low, high = version.metrics["validation"]["accuracy"]
    assert value == pytest.approx(run.data.metrics["validation.accuracy"])
    assert low < value < high

    folder = Path(copy.client.download_artifacts(run.info.run_id, "adapter"))
    stored = registry.fetch(copy.client.tracking_uri, version, tmp_path)
    for file in folder.glob("adapter_*"):
        assert (stored / "adapter" / file.name).read_bytes() == file.read_bytes()
    source = Path(copy.client.get_model_version("best", "1").source.removeprefix("file:"))
    lines = (source / "requirements.txt").read_text().splitlines()
    assert f"transformers=={transformers.__version__}" in lines
    assert all("==" in line for line in lines)
    card = (source / "README.md").read_text()
    assert card == version.description
    for words in (
        "models:/best@champion",
        f"`{copy.model}`",
        f"| validation | accuracy | {value:.4f} |",
        "study, trial | tiny, 0",
    ):
        assert words in card
    assert not any(folder.name in ("sweep", "tracking") for folder in source.rglob("*"))


def test_the_best_is_taken(copy: Lab):
    best = max(copy.trials, key=lambda run: run.data.metrics["validation.accuracy"])
    assert register(copy).code == 0
    least = min(copy.trials, key=lambda run: run.data.metrics["validation.loss"])
    assert register(copy, "--best", "loss").code == 0
    second, first = versions(copy)
    assert first.facts["run_id"] == best.info.run_id
    assert second.facts["run_id"] == least.info.run_id
    assert first.aliases == ()


def test_an_alias_moves(copy: Lab):
    for trial in (0, 2):
        assert register(copy, "--trial", trial, "--alias", "champion").code == 0
    assert [(version.facts["trial"], version.aliases) for version in versions(copy)] == [
        ("2", ("champion",)),
        ("0", ()),
    ]


def test_what_cannot_be_registered(copy: Lab):
    for words, message in {
        ("--trial", "7"): "has no trial 7; it has 3",
        ("--best", "chrf"): "--best chrf: the metrics of SEQ_CLS are accuracy, f1, mcc, loss",
        ("--name", "a/b"): "'a/b' is no name for a registered model",
        ("--alias", "v1", "--trial", "0"): "alias",
        ("--home", "/nowhere"): "There is no /nowhere/mlflow.db yet",
    }.items():
        refused = register(copy, *words)
        assert refused.code == 2, refused
        assert message in refused.err
        assert "Traceback" not in refused.err
    assert workbench("register", "other", "--name", "best", "--home", copy.home).code == 2


def test_a_version_that_predicts_otherwise_is_refused(copy: Lab, tmp_path: Path):
    run = copy.trials[0].info.run_id
    table = pq.read_table(copy.client.download_artifacts(run, "predictions/validation.parquet"))
    turned = ["negative" if label == "positive" else "positive" for label in table["predicted"].to_pylist()]
    changed = table.set_column(table.schema.get_field_index("predicted"), "predicted", pa.array(turned))
    pq.write_table(changed, tmp_path / "validation.parquet")
    try:
        copy.client.log_artifact(run, str(tmp_path / "validation.parquet"), "predictions")
        refused = register(copy, "--trial", 0)
    finally:  # other tests have the same artifacts
        pq.write_table(table, tmp_path / "validation.parquet")
        copy.client.log_artifact(run, str(tmp_path / "validation.parquet"), "predictions")
    assert refused.code == 2
    assert "rows otherwise than the trial did" in refused.err
    assert versions(copy) == []


def test_versions_over_one_base_load_it_once(copy: Lab, monkeypatch: pytest.MonkeyPatch):
    for trial in (0, 2):
        assert register(copy, "--trial", trial).code == 0
    loaded = []
    load = serving.load_base
    monkeypatch.setattr(serving, "load_base", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(serving.SharedBase, "known", {})
    mlflow.set_tracking_uri(copy.client.tracking_uri)
    try:
        first, second = (mlflow.pyfunc.load_model(f"models:/best/{number}") for number in (1, 2))
    finally:
        mlflow.set_tracking_uri(None)
    rows = pd.DataFrame({"text": TEXTS})
    one, two, again = first.predict(rows), second.predict(rows), first.predict(rows)
    assert len(loaded) == 1
    assert first.unwrap_python_model().predictor.base.model is second.unwrap_python_model().predictor.base.model
    assert one["score"].tolist() == again["score"].tolist()
    assert not np.allclose(one["score"], two["score"])


def test_bases_with_other_heads_hold_their_weights_once(copy: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving.SharedBase, "known", {})
    assert register(copy, "--trial", 0).code == 0
    (version,) = versions(copy)
    one = registry.fetch(copy.client.tracking_uri, version, tmp_path)
    other = shutil.copytree(one, tmp_path / "other")
    (other / "recipe.json").write_text((one / "recipe.json").read_text().replace("positive", "good"))
    first, second = (serving.Predictor.open(folder) for folder in (one, other))
    assert first.base.model is not second.base.model
    shared = {name for name, p in first.base.model.named_parameters() if name not in first.base.fresh}
    places = dict(second.base.model.named_parameters())
    assert {
        name for name, p in first.base.model.named_parameters() if p.data_ptr() == places[name].data_ptr()
    } == shared
    assert {"bert.embeddings.word_embeddings.weight"} < shared < places.keys()
    answers = [predictor.predict({"text": TEXTS}) for predictor in (first, second, first)]
    assert answers[0] == answers[2]
    assert answers[1]["score"] == answers[0]["score"]
    assert {*answers[1]["prediction"]} <= {"good", "negative"}
    assert first.predict({"text": []}, probabilities=True) == {"prediction": [], "score": [], "probabilities": []}


# -------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def served(done: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A registered model."""
    shutil.copytree(done.folder, folder := tmp_path_factory.mktemp("served") / "copy")
    lab = replace(done, folder=folder)
    assert register(lab, "--trial", 0, "--alias", "champion").code == 0
    return lab


def test_files_of_either_kind(served: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, target = tmp_path / "rows.csv", tmp_path / "out.csv"
    source.write_text('id,text\n7,"a wonderful, moving film"\n8,"dull\nand long"\n')
    assert predict(served, "--input", source, "--output", target).err.endswith(f"2 rows predicted in {target}\n")
    rows = list(csv.DictReader(target.open()))
    assert [row["id"] for row in rows] == ["7", "8"]
    assert rows[1]["text"] == "dull\nand long"
    lines = [json.loads(line) for line in predict(served, "-i", source, "--probabilities").out.splitlines()]
    for row, line in zip(rows, lines, strict=True):
        shares = json.loads(line["probabilities"])
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[row["prediction"]] == line["score"] == float(row["score"]) == max(shares.values())
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "dull\\nand long"}\n\n'))
    (line,) = predict(served, "--input", "-").out.splitlines()
    assert json.loads(line)["score"] == pytest.approx(lines[1]["score"], abs=1e-6)


def test_a_long_file_is_written_as_it_comes(served: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workbench.serving.stream.CHUNK", 4)
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "fine"}\n' * 9 + '{"text": null}\n')
    stopped = predict(served, "--input", source)
    assert stopped.code == 2
    assert "after 8 rows: data.text: row 2 of the input is missing" in stopped.err
    assert len(stopped.out.splitlines()) == 8


def test_wrong_input(served: Lab, tmp_path: Path):
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "other.csv").write_text("body\nfine\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    for words, message in {
        ("rows.txt",): "rows.txt is neither .csv nor .jsonl",
        ("no.csv",): "no.csv cannot be read: No such file or directory",
        ("empty.csv",): "empty.csv holds no rows",
        ("other.csv",): "The input has no column 'text'; its columns are body",
        ("broken.jsonl",): "broken.jsonl:2: this is no JSON",
        ("list.jsonl",): "list.jsonl:1: a row must be an object",
        ("other.csv", "-o", tmp_path / "other.csv"): "is the input; name another file",
        ("other.csv", "-o", tmp_path / "no" / "out.csv"): "out.csv cannot be written",
        ("other.csv", "--base", "/nowhere"): "'/nowhere' is neither a folder with a model",
    }.items():
        refused = predict(served, "--input", tmp_path / words[0], *words[1:])
        assert refused.code == 2
        assert message in refused.err
        assert "Traceback" not in refused.err
    for uri, message in {
        "models:/best@other": "it has 1@champion",
        "models:/nothing/1": "has no registered model 'nothing'",
        "best": "write models:/NAME@ALIAS or models:/NAME/NUMBER",
    }.items():
        refused = workbench("predict", uri, "-i", tmp_path / "other.csv", "--home", served.home)
        assert refused.code == 2
        assert message in refused.err


def test_another_base_is_refused_and_the_same_elsewhere_is_not(served: Lab, tmp_path: Path):
    source = tmp_path / "rows.csv"
    source.write_text("text\nfine\n")
    refused = predict(served, "--input", source, "--base", ASSETS / "minilm-l3-8k")
    assert refused.code == 2
    assert "holds other weights than those that the adapter was trained on" in refused.err
    shutil.copytree(served.model, tmp_path / "moved")
    assert (
        predict(served, "--input", source, "--base", tmp_path / "moved").out == predict(served, "--input", source).out
    )


# -------------------------------------------------------------------- export


TEXTS = ["a wonderful, moving film", "dull"]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def shares(lab: Lab, folder: Path) -> torch.Tensor:
    """The probabilities that the champion gives."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    lines = predict(lab, "-i", folder / "rows.jsonl", "--probabilities").out.splitlines()
    return torch.tensor([list(json.loads(json.loads(line)["probabilities"]).values()) for line in lines])


@pytest.mark.parametrize("trial", [0, 1], ids=["lora", "new tokens"])
def test_peft_and_transformers_load_what_is_exported(copy: Lab, tmp_path: Path, trial: int):
    found = {}
    for format in ("peft", "merged"):
        folder = tmp_path / format
        written = workbench("export", "tiny", folder, "--trial", trial, "--format", format, "--home", copy.home)
        assert (written.err, written.code) == ("", 0)
        place: dict[str, Any] = {}
        exec(written.out.partition("\n\n")[2], place)  # the lines that it says to write
        found[format] = logits(place["model"], place["tokenizer"])
        assert place["model"].config.id2label == {0: "negative", 1: "positive"}
    assert isinstance(place["model"], transformers.PreTrainedModel)
    assert not isinstance(place["model"], peft.PeftModel)
    torch.testing.assert_close(found["peft"], found["merged"], rtol=1e-4, atol=1e-5)

    assert register(copy, "--trial", trial, "--alias", "champion").code == 0
    torch.testing.assert_close(found["merged"].softmax(-1), shares(copy, tmp_path), rtol=0, atol=1e-4)


def test_a_base_whose_weights_were_drawn_comes_along(lab: Lab, tmp_path: Path):
    lab.write(LORA, "{trials: 1}", more=f"model: {{path: {lab.model}, task: SEQ_CLS, weights: random}}\n")
    assert lab.sweep().code == 0
    written = workbench("export", "tiny", tmp_path / "out", "--home", lab.home)
    assert (written.err, written.code) == ("", 0)
    place: dict[str, Any] = {}
    exec(written.out.partition("\n\n")[2], place)
    assert register(lab, "--alias", "champion").code == 0
    found = logits(place["model"], place["tokenizer"]).softmax(-1)
    torch.testing.assert_close(found, shares(lab, tmp_path), rtol=0, atol=1e-4)


def test_what_cannot_be_exported(done: Lab, tmp_path: Path):
    refused = workbench("export", "tiny", tmp_path / "out", "--trial", 2, "--format", "merged", "--home", done.home)
    assert refused.code == 2
    assert "A prompt cannot be merged into the base weights. `--format peft` writes the adapter" in refused.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    refused = workbench("export", "tiny", tmp_path, "--home", done.home)
    assert refused.code == 2
    assert "is there already; name a new folder" in refused.err


# -------------------------------------------------------------------- served


@pytest.mark.slow
def test_mlflow_serves_it(served: Lab, tmp_path: Path):
    """By its own command, with the code that is part of the version."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "--model-uri", "models:/best@champion", "--env-manager", "local", "--host", "127.0.0.1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": served.client.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    said: list[str] = []
    try:
        assert any(said.append(line) or "running on http" in line for line in server.stdout), "".join(said)
        rows = [{"text": text} for text in TEXTS]
        asked = {"dataframe_records": rows, "params": {"probabilities": True}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found = json.loads(answer.read())["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
    answered = torch.tensor([list(json.loads(row["probabilities"]).values()) for row in found])
    torch.testing.assert_close(answered, shares(served, tmp_path), rtol=0, atol=1e-6)


# -------------------------------------------------------------------- at the end of a sweep


@pytest.fixture
def vault(lab: Lab, tmp_path: Path) -> Lab:
    """A study with a test split."""
    shutil.copytree(lab.data, tmp_path / "data")
    rows = (ASSETS / "movie_sentiment" / "test.csv").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "test.csv").write_text("".join(rows[:201]))
    lab.data = tmp_path / "data"
    return lab


def sweep(lab: Lab, name: str, register: str = "{name: reviews}", method: str = LORA) -> str:
    """Run a study of one trial; what it says of the registry."""
    lab.name = name
    done = lab.write(method, "{trials: 1}", more=f"register: {register}\n").sweep()
    assert (done.err, done.code) == ("", 0)
    *_, said = [line for line in done.out.splitlines() if line.startswith("registry: trial")]
    return said.removeprefix("registry: ")


def scored(lab: Lab, right: list[float]) -> None:
    """Let the study's trial have been right on these examples of the test split."""
    run = lab.trials[0].info.run_id
    table = pq.read_table(lab.client.download_artifacts(run, "predictions/test.parquet"))
    changed = table.set_column(table.schema.get_field_index("score.accuracy"), "score.accuracy", pa.array(right))
    pq.write_table(changed, lab.folder / "test.parquet")
    lab.client.log_artifact(run, str(lab.folder / "test.parquet"), "predictions")


def test_only_who_beats_the_champion_takes_its_place(vault: Lab):
    assert (
        sweep(vault, "first") == "trial 0 is models:/reviews@champion now, version 1: there was no reviews@champion yet"
    )
    first = vault.trials[0].info.run_id
    readings = json.loads(vault.parent.data.tags["workbench.test_readings"])
    assert [reading["trials"] for reading in readings] == [[0]]
    again = vault.sweep()
    assert "registry: trial 0 is version 1 of reviews already" in again.out

    # the very same adapter: no difference
    assert re.fullmatch(
        r"trial 0 was not registered, it does not beat models:/reviews/1: test accuracy \+0\.0000 \[.*\] against "
        r"version 1, p = 1",
        sweep(vault, "second"),
    )
    assert len(versions(vault, "reviews")) == 1

    # better on two of 200 examples: noise; on 30: not
    vault.name = "first"
    worst = [0.0] * 30 + [1.0] * 170
    scored(vault, worst)
    vault.name = "second"
    scored(vault, [0.0] * 28 + [1.0] * 172)
    assert "was not registered, it does not beat models:/reviews/1: test accuracy +0.0100" in vault.sweep().out
    scored(vault, [1.0] * 200)
    assert "trial 0 is models:/reviews@champion now, version 2: test accuracy +0.1500" in vault.sweep().out
    second, old = versions(vault, "reviews")
    assert (second.aliases, old.aliases) == (("champion",), ())
    assert second.facts["contest"].startswith("test accuracy +0.1500 [")
    assert old.facts["run_id"] == first
    # and worse by as much: not
    assert sweep(vault, "third").startswith(
        "trial 0 was not registered, it does not beat models:/reviews/2: test accuracy -"
    )


def test_a_champion_of_other_data_is_measured_on_these(vault: Lab):
    sweep(vault, "first")
    lines = (vault.data / "train.csv").read_text().splitlines(keepends=True)
    (vault.data / "train.csv").write_text("".join(lines[:100]))
    said = sweep(vault, "second")
    assert re.search(r"test accuracy [+-]0\.\d{4} \[.*\] against version 1, p = ", said)
    readings = json.loads(vault.parent.data.tags["workbench.test_readings"])
    assert [reading["reason"] for reading in readings] == ["", "models:/reviews/1 was measured, to be compared with"]
    expected = json.loads(versions(vault, "reviews")[-1].facts["metrics"])["test"]["accuracy"][0]
    vault.name = "first"
    assert vault.trials[0].data.metrics["test.accuracy"] == pytest.approx(expected)


def test_without_a_test_split_nothing_is_beaten(lab: Lab):
    assert sweep(lab, "first", "{}").endswith("version 1: there was no first@champion yet")
    assert "names no test split" in sweep(lab, "second", "{name: first}")
    assert sweep(lab, "second", "{name: first, alias: challenger}").startswith(
        "trial 0 is models:/first@challenger now"
    )


def test_other_labels_are_another_model(vault: Lab):
    sweep(vault, "first")
    for split in ("train", "validation", "test"):
        file = vault.data / f"{split}.csv"
        file.write_text(file.read_text().replace("positive", "good"))
    vault.name = "second"
    done = vault.write(LORA, "{trials: 1}", more="register: {name: reviews}\n").sweep()
    assert done.code == 0
    assert "registry: nothing was registered. models:/reviews/1 has another task or other labels" in done.out


@pytest.mark.slow
def test_through_a_server(lab: Lab, tmp_path: Path):
    """Artifacts go through it, to the registry and back."""
    server = MlflowServer(tmp_path, f"sqlite:///{tmp_path}/server.db")
    lab.write(LORA, "{trials: 1}").tracking = server.url
    server.start()
    try:
        there = ("--tracking-uri", server.url)
        assert lab.sweep(*there).code == 0
        made = register(lab, "--alias", "champion", *there)
        assert (made.err, made.code) == ("", 0)
        (tmp_path / "rows.csv").write_text("text\nfine\n")
        (line,) = predict(lab, "-i", tmp_path / "rows.csv", *there).out.splitlines()
        written = workbench("export", "tiny", tmp_path / "out", "--home", lab.home, *there)
        assert (written.err, written.code) == ("", 0)
    finally:
        server.stop()
    assert json.loads(line)["prediction"] in ("positive", "negative")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not list(lab.home.glob("artifacts/**/MLmodel"))
