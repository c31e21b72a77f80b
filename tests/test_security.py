"""What files from others may not do: run code, take memory, write elsewhere, tell passwords."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from command import workbench
from safetensors.torch import load_file, save_file

from workbench.adapters import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig
from workbench.adapters.auto import IMPORTABLE, AutoPeftModel
from workbench.adapters.checkpoint import write_weights
from workbench.adapters.loftq import weight_files
from workbench.cli import store_options
from workbench.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    DataError,
    MismatchError,
    ModelError,
    StorageError,
    StudyError,
)
from workbench.sweep.spec import load_study
from workbench.sweep.workshop import Job, Seeds, prepare
from workbench.tracking.peft_results import read
from workbench.tracking.reference import import_results
from workbench.tracking.runs import default_store, open_tracking, public_url
from workbench.training.base import load_base
from workbench.training.config import ModelSection
from workbench.training.trainee import Trainee

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.chaos.fuzz import Place, Workplace, place  # noqa: E402
from benchmarks.chaos.mutations import Exploit  # noqa: E402

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MIB = 2**20


@pytest.fixture(scope="module")
def at() -> Iterator[Place]:
    with place() as made:
        yield made


@pytest.fixture(scope="module")
def work(at: Place) -> Workplace:
    return Workplace(at)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where an exploit would leave its canary."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# -------------------------------------------------------------------- the source itself

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "joblib.load", "marshal.loads"),
}
SHELLS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(source: str) -> list[str]:
    """Calls that run text or files as code, or say that others may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN:
                found.append(f"{node.lineno}: {name}")
            for keyword in node.keywords:
                said = isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value)
                if said in SHELLS:
                    found.append(f"{node.lineno}: {keyword.arg}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in UNSAFE]
    return found


@pytest.mark.parametrize("folder", ["workbench", "dashboards"])
def test_nothing_runs_text_as_code(folder: str) -> None:
    files = sorted((ROOT / folder).glob("**/*.py"))
    assert len(files) >= 4
    assert {str(file): found for file in files if (found := dangers(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "import os\nos.system(x)", "run(x, shell=True)", "torch.load(x)", "import pickle"),
        *("from_pretrained(x, trust_remote_code=True)", "np.load(x, allow_pickle=True)", "yaml.load(x)"),
    ],
)
def test_a_danger_is_found(source: str) -> None:
    assert len(dangers(source)) == 1


# -------------------------------------------------------------------- trial checkpoints


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def about(**changes: str | None) -> Callable[[bytes], bytes]:
    """Another note in the metadata."""

    def change(content: bytes) -> bytes:
        header, body = header_of(content)
        noted = header["__metadata__"] | changes
        header["__metadata__"] = {key: value for key, value in noted.items() if value is not None}
        return with_header(header, body)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    """Other tensors, with the same notes."""

    def changed(content: bytes) -> bytes:
        file = Path("tensors.safetensors")
        file.write_bytes(content)
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(found)
        save_file(found, file, header_of(content)[0]["__metadata__"])
        return file.read_bytes()

    return changed


def parameter(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(found) if name.startswith("parameter.") and found[name].dim() == 2)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "pickled": lambda content: pickle.dumps(Exploit()),
    "truncated": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + bytes(100),
    "gigabytes claimed": lambda content: struct.pack("<Q", 2**40) + content[8:],
    "all that there is claimed": lambda content: b"\xff" * 8 + content[8:],
    "header no JSON": lambda content: content[:8] + b"!" * 40 + content[48:],
    "header a list": lambda content: with_header([1], b""),
    "no notes": lambda content: with_header({k: v for k, v in header_of(content)[0].items() if k[0] != "_"}, b""),
    "no step": about(step=None),
    "step below": about(step="-1"),
    "step above": about(step="5"),
    "step huge": about(step="9" * 30),
    "step no number": about(step="nan"),
    "step in other digits": about(step="٢"),
    "another trial": about(config="{}"),
    "tensor missing": tensors(lambda found: found.pop(parameter(found))),
    "tensor too many": tensors(lambda found: found.update({"parameter.x": torch.ones(1)})),
    "tensor of no kind": tensors(lambda found: found.update({"../../x": torch.ones(1)})),
    "misshapen": tensors(lambda found: found.update({parameter(found): torch.ones(99, 99)})),
    "transposed": tensors(lambda found: found.update({parameter(found): found[parameter(found)].T.contiguous()})),
    "doubles": tensors(lambda found: found.update({parameter(found): found[parameter(found)].double()})),
    "whole numbers": tensors(lambda found: found.update({parameter(found): found[parameter(found)].int()})),
    "not a number": tensors(lambda found: found[parameter(found)].fill_(float("nan"))),
    "infinite moments": tensors(lambda found: found["optimizer.exp_avg.0"].fill_(float("inf"))),
    "optimiser ahead": tensors(lambda found: found["optimizer.steps"].fill_(3)),
    "optimiser before the start": tensors(lambda found: found["optimizer.steps"].fill_(-1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_trial_checkpoints(work: Workplace, here: Path, damage: Callable[[bytes], bytes]) -> None:
    make, content = work.stints[0]
    file = here / "0-2.safetensors"
    file.write_bytes(damage(content))
    with pytest.raises(CheckpointError, match="begin anew"):
        Trainee(work.base, work.data, work.stint(make(), file, 4), None, {})
    assert work.state() == work.before
    assert not (here / "canary").exists()


@pytest.mark.parametrize("number", range(len(Workplace.CONFIGS)))
def test_a_whole_trial_checkpoint_is_taken(work: Workplace, here: Path, number: int) -> None:
    make, content = work.stints[number]
    file = here / "0-2.safetensors"
    file.write_bytes(content)
    trainee = Trainee(work.base, work.data, work.stint(make(), file, 4), None, {})
    trainee.remove()
    assert trainee.step == 2


def test_a_pipe_is_no_checkpoint(work: Workplace, here: Path) -> None:
    """To open one would wait for ever."""
    make, _ = work.stints[0]
    os.mkfifo(here / "0-2.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        Trainee(work.base, work.data, work.stint(make(), here / "0-2.safetensors", 4), None, {})


def test_links_are_not_written_through(work: Workplace, here: Path, tmp_path: Path) -> None:
    """Whatever lies where a file is about to be written, what it leads to stays."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    make, content = work.stints[0]
    (here / "0-4.part").symlink_to(precious)
    (here / "0-4.safetensors").write_bytes(content)
    trainee = Trainee(work.base, work.data, work.stint(make(), here / "0-4.safetensors", 4), None, {})
    with trainee.attached():
        trainee.save()
    trainee.remove()
    (here / "adapter_model.partial").symlink_to(precious)
    write_weights({"x": torch.ones(2)}, here)
    (here / "0-6.safetensors").symlink_to(precious)
    config: Any = None
    prepare(Job(0, Seeds(0, 0), config, here / "0-4.safetensors", here / "0-6.safetensors", 6, None))
    assert precious.read_text() == "mine"
    assert (here / "0-6.safetensors").read_bytes() == (here / "0-4.safetensors").read_bytes()


# -------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(work: Workplace, here: Path) -> Path:
    """The folder of a saved LoRA adapter."""
    for name, content in work.adapters[0].items():
        (here / name).write_bytes(content)
    return here


def configure(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def grown(before: int) -> float:
    """MiB that this process has more than before."""
    return (psutil.Process().memory_info().rss - before) / MIB


def refused(work: Workplace, folder: Path, error: type[Exception]) -> str:
    """What is said of an adapter that is refused; the base stays as it was."""
    with pytest.raises(error) as told:
        loaded(work, folder)
    assert work.state() == work.before
    return str(told.value)


def loaded(work: Workplace, folder: Path) -> None:
    """Load an adapter, and leave a plain base to the next test."""
    model = PeftModel.from_pretrained(work.base.model, folder)
    model.delete_adapter("default")
    work.base.model.requires_grad_(False)


def test_the_adapter_itself_is_taken(work: Workplace, adapter: Path) -> None:
    """So that what follows is refused for what was changed."""
    loaded(work, adapter)
    assert work.state() == work.before


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_pickled_adapters(work: Workplace, adapter: Path, name: str) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / name).write_bytes(pickle.dumps(Exploit()))
    refused(work, adapter, CheckpointError)
    assert not (adapter / "canary").exists()


def test_more_in_the_file_than_the_configuration_allows_for(work: Workplace, adapter: Path) -> None:
    """Four gigabytes that are not there until they are read."""
    header, _ = header_of((adapter / WEIGHTS).read_bytes())
    name, size = next(name for name in header if name != "__metadata__"), 2**32
    header = {name: {"dtype": "F32", "shape": [size // 64, 16], "data_offsets": [0, size]}}
    with open(adapter / WEIGHTS, "wb") as file:
        file.write(with_header(header, b""))
        file.truncate(file.tell() + size)
    before = psutil.Process().memory_info().rss
    refused(work, adapter, CheckpointError)
    assert grown(before) < 200


@pytest.mark.parametrize("r", [10**7, 10**12, 2**62])
def test_more_in_the_configuration_than_the_file_holds(work: Workplace, adapter: Path, r: int) -> None:
    configure(adapter, r=r)
    before = psutil.Process().memory_info().rss
    refused(work, adapter, (MismatchError, ConfigError))  # type: ignore[arg-type]
    assert grown(before) < 200


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.bool])
def test_numbers_of_another_kind(work: Workplace, adapter: Path, kind: torch.dtype) -> None:
    found = load_file(adapter / WEIGHTS)
    save_file({name: tensor.to(kind) for name, tensor in found.items()}, adapter / WEIGHTS)
    assert str(kind) in refused(work, adapter, MismatchError)


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": "8"}, {"r": [1]}, {"lora_alpha": "x"}, {"lora_dropout": {}}, {"target_modules": {"a": 1}}),
        *({"rank_pattern": {"query": "x"}}, {"rank_pattern": [1]}, {"bias": 3}, {"use_dora": "no"}, {"peft_type": [1]}),
        *({"task_type": {}}, {"modules_to_save": "classifier"}, {"loftq_config": 7}),
    ],
    ids=str,
)
def test_values_of_another_kind(work: Workplace, adapter: Path, changes: dict[str, Any]) -> None:
    configure(adapter, **changes)
    refused(work, adapter, ConfigError)


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"r": NaN}', b'{"r": ' + b"9" * 5000 + b"}", b"\xff", b"", b"null"], ids=range(6)
)
def test_configurations_that_are_none(adapter: Path, content: bytes) -> None:
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError):
        PeftConfig.from_pretrained(adapter)


@pytest.mark.parametrize("name", ["/etc/x", "a/b", "..", ".", "a\\b", "a\0b", "x" * 300, "\n", "é" * 150])
def test_adapter_names_stay_in_their_folder(work: Workplace, adapter: Path, name: str) -> None:
    with pytest.raises(AdapterNameError):
        PeftModel.from_pretrained(work.base.model, adapter, adapter_name=name)
    assert work.state() == work.before


@pytest.mark.parametrize("name", ["../../etc", "/etc", ".", "\0", "x" * 10**4])
def test_modules_that_no_model_has(work: Workplace, adapter: Path, name: str) -> None:
    """Names of modules are looked up in the model, and are never those of files."""
    configure(adapter, target_modules=[name], modules_to_save=[name])
    refused(work, adapter, ConfigError)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_names_files_of_its_folder(here: Path, file: str) -> None:
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="not in the folder"):
        weight_files(here)


# -------------------------------------------------------------------- code that comes with a model or an adapter

EVIL = "from pathlib import Path\nPath('canary').touch()\n"


@pytest.fixture
def evil(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model whose classes come with it."""
    folder = here / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(
        EVIL + "from transformers import BertConfig\nclass EvilConfig(BertConfig):\n    model_type = 'evil'\n"
    )
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_if_the_study_says_so(evil: Path, here: Path, trusted: bool) -> None:
    section = {"trust_remote_code": True} if trusted else {}
    with pytest.raises(ModelError):  # the model itself is none
        load_base(ModelSection(path=str(evil), task="SEQ_CLS", weights="random", **section), None, 0, "cpu")
    assert (here / "canary").exists() == trusted


def test_a_configuration_cannot_trust_code(work: Workplace, evil: Path, here: Path) -> None:
    """The tokenizer that an adapter's first words are split by."""
    options = {"trust_remote_code": True, "cache_dir": str(here / "cache")}
    config = PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        tokenizer_name_or_path=str(evil),
        tokenizer_kwargs=options,
    )
    with pytest.raises(Exception, match=r"."):
        PeftModel(work.base.model, config)
    assert work.state() == work.before
    assert not (here / "canary").exists()
    assert not (here / "cache").exists()


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "evil_module", "base_model_class": "X"},
        {"parent_library": "transformers_evil", "base_model_class": "X"},
        {"parent_library": "transformers.evil_module", "base_model_class": "X"},
        {"parent_library": "transformers", "base_model_class": "pipeline"},
        {"parent_library": "transformers.utils.import_utils", "base_model_class": "importlib"},
        {"parent_library": ["transformers"], "base_model_class": "X"},
        {"parent_library": "transformers"},
    ],
    ids=str,
)
def test_a_configuration_cannot_import(here: Path, mapping: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("evil_module.py", "transformers_evil.py"):
        (here / name).write_text(EVIL)
    monkeypatch.syspath_prepend(str(here))
    config = LoraConfig(r=2, auto_mapping=mapping)
    with pytest.raises(ConfigError):
        AutoPeftModel._base_class(config, IMPORTABLE)
    with pytest.raises(ConfigError):
        AutoPeftModelForCausalLM._base_class(config, IMPORTABLE)
    assert not (here / "canary").exists()


# -------------------------------------------------------------------- study files


@pytest.fixture
def study(at: Place, here: Path) -> Path:
    """A study of the tiny model that takes a second."""
    text = next(text for text in at.studies if "quickstart" in text)
    (here / "study.yaml").write_text(text.replace("../../", f"{at.root}/").replace("trials: 12", "trials: 1"))
    return here / "study.yaml"


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "/etc/x", "a/b", "a\\\\b", "a\\0b", ".hidden", "", "x" * 101, "a\\n"]
)
def test_study_names_stay_in_their_folder(study: Path, name: str) -> None:
    study.write_text(study.read_text().replace("study: quickstart", f'study: "{name}"'))
    with pytest.raises(StudyError):
        load_study(study)


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", "a/b", "a\0b", "", "x" * 300])
def test_names_of_imported_studies_stay_in_their_folder(at: Place, here: Path, name: str) -> None:
    tracking = open_tracking(*default_store(at.root / "cases" / "imports"))
    with pytest.raises(StorageError):
        tracking.open_study(name, {}, {}, {"study.yaml": "x"})


def result_file(here: Path, name: str = "lora", **changes: Any) -> Path:
    """A result of peft's, with other values in its `train_info`."""
    info = {"created_at": "2025-01-02T03:04:05+00:00", "total_time": 1.0, "experiment_name": name, "peft_config": None}
    train: dict[str, Any] = {"status": "success", "metrics": [{"step": 1, "test accuracy": 0.5}]}
    content = {"run_info": info | {"train_config": {"model_id": "m", "seed": 0}}, "train_info": train | changes}
    (here / "result.json").write_text(json.dumps(content))
    return here / "result.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [{"step": 10**30, "test accuracy": 0.5}]},
        {"metrics": [{"step": 1, "test accuracy": 10**400}]},
        {"num_trainable_params": 10**400, "num_total_params": 1},
        {"file_size": 10**30},
        {"accelerator_memory_max": 10**30},
    ],
    ids=str,
)
def test_numbers_of_imported_results(here: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        read([result_file(here, **changes)])


@pytest.mark.parametrize("name", ["../../../x", "/etc/x", "..", "a\0b", "x" * 5000])
def test_names_in_imported_results_are_no_paths(at: Place, here: Path, name: str) -> None:
    home = here / "a" / "b" / "home"
    shutil.copytree(at.root / "empty", home)
    assert import_results(open_tracking(*default_store(home)), "imported", [result_file(here, name)]).known == 0
    files = [file for file in here.glob("**/*") if file.is_file()]
    assert {file.name for file in files if not file.is_relative_to(home)} == {"result.json"}
    kept = {file.name for file in (home / "artifacts").glob("**/*") if file.is_file()}
    assert kept == {"result.json"}


def test_a_name_on_the_command_line_makes_no_file(here: Path) -> None:
    done = workbench("promote", "../../outside", "--home", here / "a" / "b")
    assert done.code == 2
    assert not list(here.glob("**/*.lock"))


BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "tag": "study: !!python/object/apply:os.system ['touch canary']\n",
    "deep": "study: " + "[" * 3000 + "]" * 3000,
    "digits": "training: {steps: " + "9" * 6000 + "}",
    "surrogate": 'study: "\\ud800"',
    "nul": 'study: "a\\0"',
    "long": "x: " + "y" * 2**23,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_study_files_that_are_traps(here: Path, text: str) -> None:
    (here / "study.yaml").write_text(text)
    with pytest.raises(StudyError) as told:
        load_study(here / "study.yaml")
    str(told.value).encode()
    assert not (here / "canary").exists()


# -------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("postgresql://me:p@ss@host/x", "postgresql://me:***@host/x"),
        ("https://s3cret@host/x", "https://***@host/x"),
        ("https://me:s3cret@host:5000", "https://me:***@host:5000"),
        ("https://:s3cret@host", "https://:***@host"),
        (
            "postgresql://host/x?user=me&password=s3cret&sslmode=on",
            "postgresql://host/x?user=me&password=***&sslmode=on",
        ),
        ("mysql://host/x?ssl_key_password=s3cret", "mysql://host/x?ssl_key_password=***"),
        ("https://host/x?access_token=s3cret#a", "https://host/x?access_token=***#a"),
        ("https://host/x?X-Amz-Signature=s3cret&a=1", "https://host/x?X-Amz-Signature=***&a=1"),
        (
            "cannot reach http://me:s3cret@host/x (try http://host)",
            "cannot reach http://me:***@host/x (try http://host)",
        ),
        ("sqlite:////home/a@b/x.db", "sqlite:////home/a@b/x.db"),
        ("http://host:5000/x?page=1", "http://host:5000/x?page=1"),
    ],
)
def test_public_urls(url: str, public: str) -> None:
    assert public_url(url) == public


@pytest.mark.parametrize("key", ["model", "data", "comment"])
def test_a_study_holds_no_password(study: Path, key: str) -> None:
    """Every run has a copy of the file; and the message does not repeat the password."""
    url = "https://user:s3cret@127.0.0.1:9/x"
    text = study.read_text()
    if key == "comment":
        study.write_text(f"# from {url}\n{text}")
    else:
        old = next(line for line in text.replace(",", "\n").splitlines() if "path:" in line and key in line)
        study.write_text(text.replace(old.split("path: ")[1].split("}")[0], url))
    done = workbench("validate", study)
    assert done.code == 2
    assert "password or a token" in done.err
    assert "s3cret" not in done.out + done.err


@pytest.mark.parametrize("url", ["http://me:s3cret@127.0.0.1:9", "http://me:s3cret@127.0.0.1", "http://s3cret@[::"])
def test_a_server_that_is_not_there(url: str) -> None:
    with pytest.raises(StorageError) as told:
        open_tracking(url, None)
    assert "s3cret" not in str(told.value)
    assert "s3cret" not in str(store_options(Path("runs"), url))


SECRETS = (
    *("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "WORKBENCH_TEST_API_KEY"),
)


# commands one after the other in one process, which a start takes longer than most of them
COMMANDS = """
import json, sys
from workbench.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["workbench", *words]
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code)
"""


@pytest.mark.slow
def test_secrets_of_the_environment_stay_there(study: Path, here: Path) -> None:
    """A sweep, a table, a report and a wrong command, and then everything that was written."""
    secrets = {name: f"s3cret-{name.lower()}" for name in SECRETS}
    environment = os.environ | secrets | {"MLFLOW_TRACKING_USERNAME": "me", "PYTHONPATH": str(ROOT)}
    commands = [
        ["sweep", "study.yaml", "--workers", "1"],
        *(["compare", "quickstart"], ["report", "quickstart"], ["show", "quickstart"], ["promote", "quickstart"]),
        ["show", "quickstart", "--tracking-uri", "http://me:s3cret-in-url@127.0.0.1:9"],
        ["sweep", "study.yaml", "--storage", "postgresql://me:s3cret-in-url@127.0.0.1:9/x?password=s3cret-too"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[*words, "--home", "home"] for words in commands])],
        capture_output=True,
        env=environment,
        check=False,
    )
    said = done.stdout + done.stderr
    assert re.findall(rb"^ended with (\d)$", done.stdout, re.MULTILINE) == [b"0"] * 5 + [b"2"] * 2, said.decode()
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    files = [file for file in here.glob("**/*") if file.is_file()]
    assert {"mlflow.db", "optuna.db", "study.yaml", "quickstart.html", CONFIG} <= {file.name for file in files}
    assert [str(file) for file in files if b"s3cret" in file.read_bytes()] == []
    assert b"s3cret" not in said


def test_whether_code_is_trusted_is_recorded(study: Path, here: Path) -> None:
    answers = {}
    for name, more in (("plain", ""), ("trusting", "trust_remote_code: true, ")):
        text = study.read_text()
        file = here / f"{name}.yaml"
        file.write_text(text.replace("study: quickstart", f"study: {name}").replace("model: {", f"model: {{{more}"))
        assert ("trust" in file.read_text()) == bool(more)
        done = workbench("sweep", file, "--home", here / "home", "--workers", "1")
        assert done.code == 0, done.err
        client = open_tracking(*default_store(here / "home")).client
        (run,) = client.search_runs(
            [client.get_experiment_by_name(name).experiment_id], "tags.`workbench.kind` = 'study'"
        )
        answers[name] = run.data.params["model.trust_remote_code"]
    assert answers == {"plain": "False", "trusting": "True"}


# -------------------------------------------------------------------- servers


class Hostile(BaseHTTPRequestHandler):
    """A tracking server whose artifacts have names that lead elsewhere."""

    def do_GET(self) -> None:
        answer: dict[str, Any] = {"files": [{"path": "../../../stolen", "is_dir": False, "file_size": "1"}]}
        if "runs/get" in self.path:
            info = {"run_id": "1" * 32, "artifact_uri": f"{self.server.uri}/api/2.0/mlflow-artifacts/artifacts/1"}  # type: ignore[attr-defined]
            answer = {"run": {"info": info, "data": {}}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        pass


def test_artifacts_of_a_server_stay_in_their_folder(here: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from workbench.tracking.runs import Run

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.uri = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        (here / "a").mkdir()
        with pytest.raises(StorageError, match="path"):
            Run(MlflowClient(server.uri), "1" * 32).download("adapter", here / "a")
    finally:
        server.shutdown()
        server.server_close()
    assert not list(tmp_path.glob("**/stolen"))


@pytest.mark.slow
def test_the_dashboard_listens_to_this_machine_only(here: Path) -> None:
    import socket
    import time

    from dashboards import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, variables = launch(default_store(here)[0], None, port)
    server = subprocess.Popen(command, env=os.environ | variables | {"PYTHONPATH": str(ROOT)})
    try:
        listening: list[Any] = []
        while not listening and server.poll() is None:
            time.sleep(0.1)
            listening = [
                c.laddr for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN
            ]
        assert [tuple(address) for address in listening] == [("127.0.0.1", port)]
    finally:
        server.terminate()
        server.wait()
