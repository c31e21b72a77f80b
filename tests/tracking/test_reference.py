"""Results in the format of peft's method_comparison, with invented figures, as a reference study."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command import workbench

from workbench.errors import DataError, StorageError
from workbench.tracking import frames
from workbench.tracking.recorded import recorded
from workbench.tracking.reference import import_results
from workbench.tracking.runs import MAX_MESSAGE, Tracking

MIB = 2**20
RESULT: dict[str, Any] = {
    "run_info": {
        "created_at": "2025-01-02T03:04:05+00:00",
        "total_time": 90.5,
        "experiment_name": "lora/tiny-rank4",
        "peft_branch": "main",
        "train_config": {
            "model_id": "someone/tiny",
            "dtype": "bfloat16",
            "batch_size": 4,
            "max_steps": 20,
            "eval_steps": 10,
            "seed": 0,
            "grad_norm_clip": 1.0,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": 0.0002, "weight_decay": 0.1},
            "lr_scheduler": None,
            "generation_kwargs": {"max_length": 80},
        },
        "peft_config": {
            "task_type": "CAUSAL_LM",
            "peft_type": "LORA",
            "auto_mapping": None,
            "base_model_name_or_path": "someone/tiny",
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": ["v_proj", "q_proj"],
            "use_dora": False,
            "rank_pattern": {},
            "exclude_modules": None,
        },
        "error_msg": "",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 100 * MIB,
        "accelerator_memory_max": 300 * MIB,
        "accelerator_memory_reserved_99th": 200 * MIB,
        "train_time": 60.0,
        "file_size": 4321,
        "num_trainable_params": 2000,
        "num_total_params": 80000,
        "status": "success",
        "metrics": [
            {"step": 10, "valid accuracy": 0.2, "train loss": 1.5, "train samples": 40, "train time": 12.0},
            {"step": 20, "valid accuracy": 0.4, "train loss": 1.25, "train samples": 80, "train time": 13.0},
            {"step": 20, "test accuracy": 0.3, "train loss": 1.25, "train total tokens": 777, "forgetting": 0.05},
        ],
    },
    "meta_info": {"system_info": {"accelerator": "Some GPU"}},
}


def _result(**changes: Any) -> dict[str, Any]:
    """The result with other values, named by their path with `__`."""
    result = copy.deepcopy(RESULT)
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = result
        for key in outer:
            place = place[key]
        place[last] = value
    return result


def _write(folder: Path, **results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def _ended(status: str, message: str, name: str) -> dict[str, Any]:
    return _result(
        run_info__experiment_name=name,
        run_info__error_msg=message,
        train_info__status=status,
        train_info__metrics=RESULT["train_info"]["metrics"][:1],
    )


def test_a_result_is_a_trial(tracking: Tracking, tmp_path: Path):
    folder = _write(tmp_path / "method_comparison" / "Sums" / "results", lora=RESULT)
    found = import_results(tracking, "peft", [folder])
    assert (dict(found.outcomes), found.known) == ({"complete": 1}, 0)

    (row,) = frames.trials(tracking.uri, "peft").to_dict("records")
    assert (row["number"], row["label"], row["method"]) == (0, "lora/tiny-rank4", "lora")
    assert (row["outcome"], row["message"], row["role"]) == ("complete", "", "search")
    assert row["objective"] == row["test.accuracy"] == 0.3  # what they published, not the last validation
    assert row["validation.accuracy"] == 0.4
    assert (row["trainable_params"], row["all_params"], row["trainable_percent"]) == (2000, 80000, 2.5)
    assert (row["adapter_bytes"], row["peft_memory_max_mib/published"]) == (4321, 300)
    assert (row["seconds/steps"], row["seconds/train"], row["seconds/total"]) == (25, 60, 90.5)
    assert (row["train.loss"], row["tokens_seen"], row["forgetting"]) == (1.25, 777, 0.05)
    assert {key: value for key, value in row.items() if key.startswith("hp.")} == {
        "hp.optimizer": "AdamW",
        "hp.schedule": "constant",
        "hp.batch_size": 4,
        "hp.steps": 20,
        "hp.max_grad_norm": 1.0,
        "hp.dtype": "bfloat16",
        "hp.learning_rate": 0.0002,
        "hp.weight_decay": 0.1,
        "hp.r": 4,
        "hp.lora_alpha": 8,
        "hp.lora_dropout": 0.0,
        "hp.target_modules": "q_proj, v_proj",
        "hp.use_dora": "False",
    }
    assert row["searched"] == "learning_rate weight_decay r lora_alpha lora_dropout"

    history = frames.history(tracking.uri, row["run_id"])
    accuracy = history[history["metric"] == "validation.accuracy"]
    assert accuracy[["step", "value"]].values.tolist() == [[10, 0.2], [20, 0.4]]
    assert len(history[history["metric"] == "train.loss"]) == 2  # the last evaluation and the test name the same step

    study = frames.studies(tracking.uri).set_index("study").loc["peft"]
    assert (study["reference"], study["split"]) == ("peft method_comparison, Sums", "test")
    assert (study["metric"], study["goal"], study["status"]) == ("accuracy", "maximize", "FINISHED")
    kept = Path(tracking.client.download_artifacts(row["run_id"], "lora.json"))
    assert json.loads(kept.read_text()) == RESULT


def test_older_files_and_full_fine_tuning(tracking: Tracking, tmp_path: Path):
    old, full = _result(), _result(run_info__peft_config=None, run_info__experiment_name="full/tiny")
    info = old["train_info"]
    info["cuda_memory_max"] = info.pop("accelerator_memory_max")
    for name in ("num_trainable_params", "num_total_params"):
        del info[name]
    del old["run_info"]["error_msg"]
    full["train_info"]["file_size"] = 99999999  # what they write where they could not tell
    import_results(tracking, "peft", [_write(tmp_path / "files", old=old, full=full)])
    table = frames.trials(tracking.uri, "peft").set_index("label")
    assert table.loc["lora/tiny-rank4", "peft_memory_max_mib/published"] == 300
    assert pd.isna(table.loc["lora/tiny-rank4", "trainable_params"])
    assert table.loc["full/tiny", "method"] == "full"
    assert pd.isna(table.loc["full/tiny", "adapter_bytes"])
    assert "hp.r" in table
    assert pd.isna(table.loc["full/tiny", "hp.r"])
    assert frames.studies(tracking.uri)["reference"].tolist() == ["peft method_comparison"]


def test_runs_that_did_not_end_well(tracking: Tracking, tmp_path: Path):
    folder = _write(
        tmp_path / "files",
        good=RESULT,
        memory=_ended("canceled", "CUDA out of memory. Tried to allocate 1 GiB", "lora/big"),
        stopped=_ended("canceled", "manually canceled", "lora/stopped"),
        raised=_ended("canceled", "a tensor of another shape" + "!" * 2000, "lora/raised"),
        failed=_ended("failed", "", "lora/failed"),
    )
    nothing = _ended("cancelled", "", "lora/nothing")
    nothing["train_info"] = {"status": "cancelled", "metrics": [], "train_time": None, "error": "no port is free"}
    found = import_results(tracking, "peft", [_write(folder, nothing=nothing)])
    assert found.outcomes == {"complete": 1, "out_of_memory": 1, "interrupted": 1, "crashed": 3}
    table = frames.trials(tracking.uri, "peft").set_index("label")
    assert table["outcome"].to_dict() == {
        "lora/tiny-rank4": "complete",
        "lora/big": "out_of_memory",
        "lora/stopped": "interrupted",
        "lora/raised": "crashed",
        "lora/failed": "crashed",
        "lora/nothing": "crashed",
    }
    assert table.loc["lora/big", "message"] == "CUDA out of memory. Tried to allocate 1 GiB"
    assert len(table.loc["lora/raised", "message"]) == MAX_MESSAGE
    assert table.loc["lora/nothing", "message"] == "no port is free"
    assert table["objective"].notna().sum() == 1  # a validation before the end is no published result
    assert table.loc["lora/big", "validation.accuracy"] == 0.2


def test_what_was_imported_before_is_left_as_it_is(tracking: Tracking, tmp_path: Path):
    folder = _write(tmp_path / "files", first=RESULT)
    import_results(tracking, "peft", [folder])
    before = frames.trials(tracking.uri, "peft")
    retry = _result(run_info__created_at="2025-02-02T03:04:05+00:00")
    earlier = _result(run_info__created_at="2024-02-02T03:04:05+00:00", run_info__experiment_name="ia3/tiny")
    _write(folder, retry=retry, earlier=earlier, copy_of_first=RESULT)
    found = import_results(tracking, "peft", [folder])
    assert (dict(found.outcomes), found.known) == ({"complete": 3}, 1)
    after = frames.trials(tracking.uri, "peft")
    assert after["label"].tolist() == ["lora/tiny-rank4", "ia3/tiny", "lora/tiny-rank4"]
    assert after["run_id"][0] == before["run_id"][0]
    assert after["config"][0] == after["config"][2] != after["config"][1]
    assert import_results(tracking, "peft", [folder]).known == 3
    assert frames.trials(tracking.uri, "peft")["run_id"].tolist() == after["run_id"].tolist()


def test_an_import_that_was_cut_off_is_finished_by_the_next(tracking: Tracking, tmp_path: Path, monkeypatch):
    folder = _write(tmp_path / "files", a=RESULT, b=_result(run_info__experiment_name="lora/z"))
    with monkeypatch.context() as patch:
        patch.setattr(tracking.client, "log_artifact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_results(tracking, "peft", [folder])
    assert frames.studies(tracking.uri)["status"].tolist() == ["KILLED"]
    assert frames.trials(tracking.uri, "peft")["outcome"].tolist() == ["running"]
    assert import_results(tracking, "peft", [folder]).known == 0
    table = frames.trials(tracking.uri, "peft")
    assert table["number"].tolist() == [0, 1]
    assert table["outcome"].tolist() == ["complete"] * 2
    assert len(frames.history(tracking.uri, table["run_id"][0]).query("metric == 'validation.accuracy'")) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"run_info": {', "EOF while parsing"),
        ("[]", "Input should be an object"),
        ('{"r": 8, "peft_type": "LORA"}', "run_info: Field required; train_info: Field required"),
        (json.dumps(_result(train_info__status="odd")), "train_info.status: Input should be 'success'"),
        (json.dumps(_result(train_info__metrics=[{"valid accuracy": 1}])), "train_info.metrics.0.step: Field required"),
        (json.dumps(_result(train_info__metrics=[])), "no 'test accuracy' or 'test dino_similarity'"),
        (json.dumps(_result(run_info__peft_config={"r": 8})), "run_info.peft_config.peft_type: Field required"),
        ("\xff", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_file_that_is_no_result_is_named(tracking: Tracking, tmp_path: Path, text: str, says: str):
    folder = _write(tmp_path / "files", good=RESULT)
    (folder / "bad.json").write_text(text, encoding="latin-1")
    (folder / "worse.json").write_text("")
    with pytest.raises(DataError) as caught:
        import_results(tracking, "peft", [folder])
    _, bad, worse = str(caught.value).splitlines()
    assert bad.startswith(f"{folder / 'bad.json'}: ")
    assert says in bad
    assert worse.startswith(f"{folder / 'worse.json'}: ")
    assert frames.studies(tracking.uri).empty  # nothing is written


def test_what_does_not_belong_together(tracking: Tracking, tmp_path: Path):
    images = copy.deepcopy(RESULT["train_info"]["metrics"])
    images[-1]["test dino_similarity"] = images[-1].pop("test accuracy")
    other = _write(tmp_path / "other", a=_result(run_info__train_config__model_id="someone/else"))
    image = _write(tmp_path / "image", a=_result(train_info__metrics=images))
    lora = _write(tmp_path / "lora", a=RESULT)
    failed = _write(tmp_path / "failed", a=_ended("failed", "why", "lora/a"))
    (tmp_path / "empty").mkdir()
    for paths, says in [
        ([lora, other], "more than one base model (someone/else, someone/tiny)"),
        ([lora, image], "more than one metric (accuracy, dino_similarity)"),
        ([failed], "No result has a test metric"),
        ([tmp_path / "empty"], "holds no .json file"),
        ([tmp_path / "absent"], "cannot be read"),
    ]:
        with pytest.raises(DataError) as caught:
            import_results(tracking, "peft", paths)
        assert says in str(caught.value)
    assert frames.studies(tracking.uri).empty

    import_results(tracking, "peft", [lora])
    for folder, says in [(other, "of model someone/tiny"), (image, "of metric accuracy")]:
        with pytest.raises(DataError, match=says):
            import_results(tracking, "peft", [folder])
    assert import_results(tracking, "pictures", [image / "a.json"]).known == 0
    assert frames.trials(tracking.uri, "pictures")["objective"].tolist() == [0.3]


def test_own_and_imported_studies_do_not_mix(tracking: Tracking, tmp_path: Path):
    lora = _write(tmp_path / "lora", a=RESULT)
    own = tracking.open_study("mine", {}, {"workbench.metric": "accuracy"}, {})
    own.open_trial(0, {}, {}).end("complete")
    with pytest.raises(StorageError, match="a study 'mine' already, one of your own"):
        import_results(tracking, "mine", [lora])
    import_results(tracking, "peft", [lora])
    with pytest.raises(StorageError, match="a study 'peft' already, one of imported results"):
        tracking.open_study("peft", {}, {"workbench.metric": "accuracy"}, {})
    with pytest.raises(StorageError, match="holds imported results"):
        recorded(tracking.uri, "peft", 0)
    assert len(frames.trials(tracking.uri, "mine")) == len(frames.trials(tracking.uri, "peft")) == 1


def test_the_command(tmp_path: Path):
    good = _write(tmp_path / "method_comparison" / "Sums" / "results", a=RESULT)
    better = _result(run_info__experiment_name="ia3/tiny", train_info__metrics=[{"step": 20, "test accuracy": 0.5}])
    _write(good, b=better, c=_ended("canceled", "CUDA out of memory", "lora/big"))
    home = tmp_path / "my runs"
    done = workbench("import-results", good, "--name", "peft", "--home", home)
    assert done.code == 0
    first, *commands = done.out.splitlines()
    assert first == "results read: 3 (2 complete, 1 out of memory); known before: 0. Next:"
    assert [line.partition("#")[0].strip() for line in commands] == [
        f"workbench compare peft --home '{home}'",
        f"workbench show peft --home '{home}'",
    ]
    again = workbench("import-results", good, "--name", "peft", "--home", home)
    assert "known before: 3." in again.out

    shown = workbench("show", "peft", "--home", home)
    assert (shown.code, shown.err) == (0, "")
    assert "peft: maximize test accuracy" in shown.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if line[0] == "│"]
    assert [(row[0], row[2], row[4]) for row in rows if row[1]] == [
        ("1", "ia3/tiny", "0.5000"),
        ("2", "lora/tiny-rank4", "0.3000"),
        ("", "lora/big", ""),
    ]
    settings = " ".join(row[3] for row in rows)
    assert "learning_rate=0.0002, weight_decay=0.1, r=4, lora_alpha=8, lora_dropout=0" in settings
    assert shown.out.splitlines()[-1] == "imported from peft method_comparison, Sums: as published, one run each"

    (tmp_path / "broken.json").write_text("{")
    broken = workbench("import-results", tmp_path / "broken.json", "--name", "peft", "--home", home)
    assert (broken.code, broken.out) == (2, "")
    assert f"{tmp_path / 'broken.json'}: Invalid JSON" in broken.err


def test_what_training_found_is_no_hyperparameter(tracking: Tracking, tmp_path: Path):
    pattern = {"layers.0.q_proj": [True] * 64}
    adalora = _result(
        run_info__peft_config={"peft_type": "ADALORA", "r": 8, "rank_pattern": pattern},
        train_info__metrics=[{"step": 20, "test accuracy": 0.5, "drift": float("nan")}],
    )
    lora = _result(run_info__peft_config={"peft_type": "LORA", "r": 8, "rank_pattern": {"layers.0.q_proj": 16}})
    lora["run_info"]["experiment_name"] = "lora/pattern"
    import_results(tracking, "peft", [_write(tmp_path / "files", a=adalora, b=lora)])
    table = frames.trials(tracking.uri, "peft").set_index("method")
    assert table["hp.rank_pattern"].fillna("").to_dict() == {"adalora": "", "lora": '{"layers.0.q_proj": 16}'}
    assert table["objective"].to_dict() == {"adalora": 0.5, "lora": 0.3}
    assert "drift" not in table  # NaN, as in one of their files
