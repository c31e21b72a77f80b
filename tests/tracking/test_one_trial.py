"""What is read of one trial: files, layers, phases, examples, rungs, and how it differs from another."""

from __future__ import annotations

import json
import struct

import made_up
import numpy as np
import optuna
import pandas as pd
import pytest

from workbench.errors import DataError, StorageError
from workbench.tracking import artifacts, difference, examples, layers, phases, rungs
from workbench.tracking.study_facts import facts


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file with these tensors, whose numbers are left out."""
    text = json.dumps({key: {"dtype": "F32", "shape": shape} for key, shape in shapes.items()} | {"__metadata__": {}})
    return struct.pack("<Q", len(text)) + text.encode()


# -------------------------------------------------------------------- files


def test_files_of_a_run_come_as_they_are(tracking, tmp_path):
    study = made_up.open_study(tracking)
    run = made_up.finalist(study, tmp_path / "made", 0, 0, (1, 2), made_up.right(0.5, 0))
    uri = tracking.uri
    assert list(artifacts.names(uri, run.run_id, "predictions")) == [artifacts.VALIDATION]
    assert artifacts.fetch(uri, study.run_id, "study.yaml") == made_up.STUDY.encode()
    table = artifacts.parquet(artifacts.fetch(uri, run.run_id, artifacts.VALIDATION))
    assert table["row"].tolist() == list(range(200))
    assert artifacts.fetch(uri, run.run_id, artifacts.ADAPTER) is None
    assert artifacts.fetch(uri, run.run_id, "traceback.txt") is None


def test_a_large_file_stays_where_it_is(tracking):
    study = made_up.open_study(tracking)
    with pytest.raises(artifacts.TooLarge, match=r"study\.yaml has .* MiB; only files of at most 1e-06 MiB"):
        artifacts.fetch(tracking.uri, study.run_id, "study.yaml", limit_mib=1e-6)


def test_a_store_that_is_gone_is_said(tmp_path):
    with pytest.raises(StorageError, match=r"absent\.db"):
        artifacts.fetch(f"sqlite:///{tmp_path}/absent.db", "0" * 32, "study.yaml")


@pytest.mark.parametrize(
    "content", [b"", b"123", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]", b"PK\x03\x04" * 9]
)
def test_what_is_no_safetensors_file_is_refused(content):
    with pytest.raises(DataError, match=r"adapter_model\.safetensors cannot be read"):
        artifacts.header(content)


def test_what_is_no_parquet_file_is_refused():
    with pytest.raises(DataError, match=r"validation\.parquet cannot be read"):
        artifacts.parquet(b"no table")


def test_a_study_s_run_tells_its_settings(tracking):
    study = tracking.open_study("s", {"training.steps": 30}, made_up.TAGS, {})
    study.summary({"seconds/load": 2.0})
    found = facts(tracking.uri, study.run_id)
    assert (found.params["training.steps"], found.metrics["seconds/load"]) == ("30", 2.0)


# -------------------------------------------------------------------- layers


def modules(shapes: dict[str, list[int]]) -> pd.DataFrame:
    return layers.layers(artifacts.header(safetensors(shapes)))


def test_layers_of_lora():
    found = modules(
        {
            f"base_model.model.bert.encoder.layer.{number}.attention.self.{name}.lora_{side}.weight": shape
            for number in (0, 1, 3)
            for name in ("query", "value")
            for side, shape in (("A", [8, 384]), ("B", [384, 8]))
        }
        | {"base_model.model.classifier.weight": [12, 384], "base_model.model.classifier.bias": [12]}
    )
    assert len(found) == 7
    kinds = layers.by_kind(found)
    assert kinds[["kind", "part", "layers", "modules", "each", "parameters"]].values.tolist() == [
        ["attention.self.query", "adapter", "0-1, 3", 3, 6144, 18432],
        ["attention.self.value", "adapter", "0-1, 3", 3, 6144, 18432],
        ["classifier", "whole weights", "", 1, 4620, 4620],
    ]
    assert kinds["tensors"].tolist()[0] == "lora_A 8x384, lora_B 384x8"


@pytest.mark.parametrize(
    ("key", "shape", "module", "part", "tensors"),
    [
        (
            "base_model.model.m.layers.2.mlp.down_proj.ia3_l",
            [1, 64],
            "m.layers.2.mlp.down_proj",
            "adapter",
            "ia3_l 1x64",
        ),
        ("base_model.model.m.layers.0.q.hada_w1_a", [8, 2], "m.layers.0.q", "adapter", "hada_w1_a 8x2"),
        ("base_model.model.m.layers.0.q.lokr_w2", [4, 4], "m.layers.0.q", "adapter", "lokr_w2 4x4"),
        ("base_model.model.m.layers.0.q.lora_E", [0, 1], "m.layers.0.q", "adapter", "lora_E 0x1"),
        (
            "base_model.model.e.token_adapter.trainable_tokens_delta",
            [3, 8],
            "e",
            "adapter",
            "token_adapter.trainable_tokens_delta 3x8",
        ),
        ("base_model.model.e.trainable_tokens_delta", [3, 8], "e", "adapter", "trainable_tokens_delta 3x8"),
        ("prompt_embeddings", [20, 16], "virtual tokens", "virtual tokens", "prompt_embeddings 20x16"),
        ("base_model.classifier.weight", [2, 16], "classifier", "whole weights", "weight 2x16"),
    ],
)
def test_keys_of_every_method(key, shape, module, part, tensors):
    (row,) = modules({key: shape}).to_dict("records")
    assert (row["module"], row["part"], row["tensors"]) == (module, part, tensors)
    assert row["parameters"] == np.prod(shape)


def test_modules_of_other_ranks_stand_apart():
    found = layers.by_kind(modules({f"base_model.model.l.{n}.q.lora_A.weight": [n + 1, 4] for n in (0, 1)}))
    assert found["layers"].tolist() == ["0", "1"]
    assert found["each"].tolist() == [4, 8]


# -------------------------------------------------------------------- phases


def test_phases_of_what_is_known():
    trial = {
        "seconds/train": 3.0,
        "tensor_peak_mib/train": 100.0,
        "process_peak_growth_mib/train": 300.0,
        "predicted_peak_mib/train": 102.0,
        "predicted_pass_mib/train": 204.0,
        "prediction_error_percent/train": 2.0,
        "predicted_pass_mib/eval": 0.0,
        "seconds/eval": float("nan"),
        "predicted_mib/weights": 90.0,
        "predicted_mib/adapter": 2.0,
    }
    found = phases.phases(trial, {"seconds/load": 0.5, "seconds/total": 9.0})
    assert found["phase"].tolist() == ["load", "train"], "of the evaluation nothing is known"
    assert found["seconds"].tolist() == [0.5, 3.0]
    train = found.iloc[1]
    assert (train["peak"], train["kind"]) == (100.0, "tensors"), "the exact one before the process"
    assert (train["predicted"], train["in_pass"], train["error"]) == (102.0, 204.0, 2.0)
    assert phases.parts(trial).values.tolist() == [["weights", 90.0], ["adapter", 2.0]]


def test_of_an_imported_trial_no_phase_is_known():
    assert phases.phases({"seconds/published": 1.0, "test.accuracy": 0.5}, {}).empty


# -------------------------------------------------------------------- examples


def predictions(actual: list, predicted: list, loss: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"row": range(len(loss)), "actual": actual, "predicted": predicted, "loss": loss})


def test_the_highest_loss_comes_first_and_wrong_is_known():
    found = examples.errors(predictions(["a", "b", "a"], ["a", "a", "b"], [0.1, 3.0, 2.0]))
    assert found["row"].tolist() == [1, 2, 0]
    assert found["wrong"].tolist() == [True, True, False]


def test_texts_without_a_right_answer_are_not_wrong():
    found = examples.errors(predictions([None, None], ["x", None], [0.1, 0.2]))
    assert found["wrong"].isna().all()
    assert examples.confusion(found).empty


def test_a_table_of_something_else_is_refused():
    with pytest.raises(DataError, match="no column loss, predicted"):
        examples.errors(pd.DataFrame({"row": [1], "actual": ["a"]}))


def test_confusion_counts_by_the_actual_label():
    found = examples.errors(predictions(list("aaab"), list("aabb"), [0, 0, 0, 0]))
    table = examples.confusion(found)
    assert table[["actual", "predicted", "count"]].values.tolist() == [["a", "a", 2], ["a", "b", 1], ["b", "b", 1]]
    assert table["share"].tolist() == pytest.approx([2 / 3, 1 / 3, 1])
    assert examples.confusion(found, most=1).empty


def test_which_examples_changed():
    one = examples.errors(predictions(list("aaaa"), list("abbc"), [0.1, 1.0, 1.0, 1.0]))
    other = examples.errors(predictions(list("aaaa"), list("babb"), [3.0, 0.5, 0.9, 1.2]))
    found = examples.changed(one, other)
    assert found[["row", "became"]].values.tolist() == [[0, "wrong"], [1, "right"], [3, "other"]]
    with pytest.raises(DataError, match="same examples"):
        examples.changed(one, other.head(2))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("data: {path: d}", "rows of the validation split of d, counted from 0"),
        ("data: {train: t.csv, validation: v.csv}", "rows of v.csv, counted from 0"),
        ("data: {path: glue, validation: dev}", "rows of dev of glue, counted from 0"),
        ("data: {train: t.csv}", "rows of the validation split of t.csv, counted from 0"),
        ("data: [", "rows of the validation split, counted from 0"),
    ],
)
def test_where_rows_lie(file, words):
    assert examples.place(file) == words


# -------------------------------------------------------------------- rungs


@pytest.mark.parametrize(
    ("pruner", "measured", "decided"),
    [
        ("median", [10, 20, 30, 40, 45], [10, 20, 30, 40]),
        ("successive_halving", [10, 20, 30, 40, 45], [10, 30]),
        ("none", [10, 20, 30, 40, 45], []),
    ],
)
def test_steps_at_which_a_study_measures_and_decides(pruner, measured, decided):
    params = {"training.steps": "45", "training.eval_every": "10", "search.pruner": pruner}
    assert rungs.evaluations(params) == measured
    assert rungs.decisions(params) == decided


def test_rungs_are_those_of_the_sweep():
    from workbench.sweep import halving
    from workbench.training.config import TrainingSection

    for steps, every in ((150, 50), (90, 10), (7, None), (100, 33)):
        params = {"training.steps": str(steps), "training.eval_every": str(every), "search.pruner": "hyperband"}
        section = TrainingSection(steps=steps, eval_every=every)
        assert rungs.evaluations(params) == section.eval_steps
        assert rungs.decisions(params) == halving.rungs(section.eval_steps[0], steps)


def test_a_study_that_does_not_say_has_no_rungs():
    assert rungs.evaluations({}) == rungs.decisions({}) == []


@pytest.mark.parametrize(
    ("named", "goal", "found"),
    [
        ("loss", "maximize", ("loss", -1)),
        ("loss", "minimize", ("loss", 1)),
        ("objective", "maximize", ("accuracy", 1)),
        ("f1", "maximize", ("f1", 1)),
    ],
)
def test_optuna_holds_what_is_compared_in_the_objective_s_direction(named, goal, found):
    assert rungs.compared({"search.prune_by": named}, "accuracy", goal) == found


def test_what_others_had_come_to_at_each_rung(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(study_name="s", storage=url)
    for values in ((1.0, 10.0), (3.0, 30.0), (5.0,), (100.0, 100.0)):
        trial = study.ask()
        for step, value in enumerate(values):
            trial.report(value, 10 * (step + 1))
    optuna.create_study(study_name="another", storage=url).ask().report(7.0, 10)
    found = rungs.at_rungs(rungs.reported(url, "s"), but=3)
    assert found[["step", "median", "trials"]].values.tolist() == [[10, 3.0, 3], [20, 20.0, 2]]
    assert found[["low", "high"]].values.tolist() == [[2.0, 4.0], [15.0, 25.0]]


def test_a_storage_that_is_not_there_is_said_and_not_made(tmp_path):
    with pytest.raises(StorageError, match=r"absent\.db"):
        rungs.reported(f"sqlite:///{tmp_path}/absent.db", "s")
    assert not (tmp_path / "absent.db").exists()
    (tmp_path / "empty.db").touch()
    with pytest.raises(StorageError, match="cannot be read"):
        rungs.reported(f"sqlite:///{tmp_path}/empty.db", "s")


# -------------------------------------------------------------------- two trials


def test_only_what_differs_is_shown():
    usual = {"label": "lora", "method": "lora", "role": "search", "init_seed": 0, "order_seed": 0, "hp.r": 8.0}
    one = pd.Series(
        usual | {"hp.learning_rate": 1e-3, "validation.accuracy": 0.5, "adapter_bytes": 100, "hp.alpha": None}
    )
    other = pd.Series(
        usual | {"hp.learning_rate": 3e-3, "validation.accuracy": 0.6, "adapter_bytes": 80, "hp.alpha": 2097152.0}
    )
    told = difference.configuration(one, other)
    assert told.values.tolist() == [["learning_rate", "0.001", "0.003"], ["alpha", "", "2097152"]]
    came = difference.results(one, other).set_index("what")
    assert came.loc["validation.accuracy", "by"] == pytest.approx(0.1)
    assert came.loc["adapter_bytes", "percent"] == pytest.approx(-20)
    assert difference.configuration(one, one).empty


def test_a_trial_that_was_never_measured_has_no_results():
    nothing = pd.Series({"label": "lora", "validation.accuracy": None, "adapter_bytes": pd.NA})
    assert difference.results(nothing, nothing).empty
