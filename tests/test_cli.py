"""The command line as its user meets it: what is printed where, exit codes, and never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jsonschema
import pytest
import torch
from command import Done, workbench

from workbench.cli import app
from workbench.tracking.runs import default_store, open_tracking

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "studies" / "assets"
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)

STUDY = f"""\
study: small
model:
  path: {ASSETS}/minilm-l3-8k
  task: SEQ_CLS
  weights: random
  overrides: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
data:
  path: {ASSETS}/movie_sentiment
  text: text
  label: label
  max_rows: {{train: 60, validation: 20}}
training: {{steps: 4, batch_size: 4, eval_every: 2, device: cpu}}
methods:
  lora:
    r: {{values: [2, 4]}}
  ia3:
budget: {{trials: 3}}
search: {{sampler: grid, pruner: none}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path, Path]:
    """A sweep that was run by the command: what it did, the study file, and the home that it filled."""
    folder = tmp_path_factory.mktemp("swept")
    file, home = folder / "study.yaml", folder / "my runs"
    file.write_text(STUDY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = workbench("sweep", file, "--home", home)
    torch.set_num_threads(threads)
    return done, file, home


# -------------------------------------------------------------------- right


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str):
    done = workbench(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: workbench {command}" in done.out
    (callback,) = [
        found.callback for found in app.registered_commands if (found.name or found.callback.__name__) == command
    ]
    assert callback.__doc__.splitlines()[0].split()[0] in done.out


def test_help_lists_the_commands_and_where_to_start():
    done = workbench("--help")
    assert done.code == 0
    assert all(re.search(rf"\b{command}\b", done.out) for command in COMMANDS)
    assert "workbench sweep studies/quickstart.yaml" in done.out


def test_a_sweep_prints_plain_lines(swept):
    done, _, _ = swept
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "\r" not in done.out
    lines = done.out.splitlines()
    assert "study small: 3 trials, maximize accuracy" in lines
    for number in range(3):
        told = [line.split(": ")[1] for line in lines if re.match(rf"trial {number} (lora|ia3): ", line)]
        assert [part for part in told if part.startswith("step")] == ["step 2", "step 4"]
        assert told[-1].startswith("complete, accuracy 0.")
    assert "3 trials: 3 complete" in lines
    assert max(map(len, lines[: lines.index("3 trials: 3 complete")])) <= 160


def test_the_next_commands_work_as_they_are_printed(swept):
    done, file, home = swept
    told = done.out.partition("Next:\n")[2].splitlines()
    commands = [line.strip().partition("  # ")[0] for line in told]
    assert commands == [
        f"workbench compare small --home '{home}'",
        f"workbench register small --name small --alias champion --home '{home}'",
        f"workbench dashboard --home '{home}'",
        f"workbench show small --home '{home}'",
        f"workbench validate {file}",
    ]


def test_show(swept):
    sweep, _, home = swept
    done = workbench("show", "small", "--home", home)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    rows = [line.split("│")[1:-1] for line in done.out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["1", "2", "3"]
    assert sorted(row[1].strip() for row in rows) == ["0", "1", "2"]
    assert sorted(row[2].strip() for row in rows) == ["ia3", "lora", "lora"]
    assert {row[-1].strip() for row in rows} == {"complete"}
    values = [float(row[4]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert done.out.splitlines()[-1] == "3 trials: 3 complete"
    table = [line for line in sweep.out.splitlines() if line.startswith("│")]
    assert [line for line in done.out.splitlines() if line.startswith("│")] == table


def test_show_before_the_first_trial(tmp_path: Path):
    tags = {"workbench.metric": "accuracy", "workbench.goal": "maximize"}
    open_tracking(*default_store(tmp_path)).open_study("young", {}, tags, {})
    done = workbench("show", "young", "--home", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "0 trials" in done.out


def test_validate(swept):
    _, file, _ = swept
    done = workbench("validate", file)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{file} is right: study small, methods lora, ia3, search space 3 configurations\n"


def test_schema_is_one_that_accepts_a_study():
    import ruamel.yaml

    done = workbench("schema")
    schema = json.loads(done.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    study = ruamel.yaml.YAML(typ="safe").load(STUDY)
    jsonschema.validate(study, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(study | {"studdy": 1}, schema)


def test_methods():
    done = workbench("methods")
    assert done.code == 0
    assert {"lora", "ia3", "trainable_tokens"} <= {
        line.split("│")[1].strip() for line in done.out.splitlines() if "│" in line
    }
    one = workbench("methods", "lora")
    assert one.code == 0
    fields = {line.split("│")[1].strip() for line in one.out.splitlines() if "│" in line}
    assert {"r", "lora_alpha", "target_modules", "learning_rate", "warmup"} <= fields


def test_the_dashboard_is_started_on_the_store(swept, monkeypatch: pytest.MonkeyPatch):
    _, _, home = swept
    server = mock.Mock(return_value=subprocess.CompletedProcess([], 3))
    monkeypatch.setattr(subprocess, "run", server)
    done = workbench("dashboard", "--home", home, "--port", 1234)
    assert done.code == 3  # that of the server
    assert done.out == "dashboard: http://127.0.0.1:1234 (Ctrl-C stops it)\n"
    ((command,), options) = server.call_args
    assert "--server.port=1234" in command
    assert options["env"]["MLFLOW_TRACKING_URI"] == default_store(home)[0]


# -------------------------------------------------------------------- wrong

MISTAKES = f"""\
studdy: small
model: {{path: {ASSETS}/minilm-l3-8k, task: SEQ_CLS}}
data: {{path: {ASSETS}/movie_sentiment, text: text, label: label}}
training: {{steps: ten}}
methods:
  lora:
    r: 0
    learning_rate: {{min: 1, max: 1e-4}}
  ia4:
budget: {{}}
study: small
"""


@pytest.mark.parametrize("command", ["sweep", "validate"])
def test_six_mistakes_are_six_lines(tmp_path: Path, command: str):
    file, home = tmp_path / "study.yaml", tmp_path / "home"
    file.write_text(MISTAKES)
    done = workbench(command, file, *(["--home", home] if command == "sweep" else []))
    assert (done.code, done.out) == (2, "")
    *problems, last = done.err.splitlines()
    places = [problem.removeprefix(f"{file}:").split(": ")[0] for problem in problems]
    assert places == ["1:1", "4:19", "7:8", "8:26", "9:3", "10:9"]
    assert [("did you mean" in problem) for problem in problems] == [True, False, False, False, True, False]
    assert last == "6 problems; nothing was run"
    assert not home.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "nowhere.yaml"], "nowhere.yaml:1:1: the file cannot be read: No such file or directory"),
        (["sweep", "."], ".:1:1: the file cannot be read: Is a directory"),
        (["validate", "nowhere.yaml"], "nowhere.yaml:1:1: the file cannot be read: No such file or directory"),
        (["sweep", "study.yaml", "--home", "study.yaml/home"], "error: "),
        (["show", "small", "--home", "nowhere"], "error: There is no "),
        (["methods", "lorra"], "error: There is no method 'lorra' (did you mean lora?)."),
        (["sweep", "study.yaml", "--storage", "nonsense://x"], "error: Optuna's storage nonsense://x cannot be used: "),
    ],
    ids=["no file", "folder", "nothing to validate", "home in a file", "no store", "no method", "storage"],
)
def test_mistakes_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    done = workbench(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message)
    assert len(done.err.splitlines()) == (2 if message.count(":1:1") else 1)  # no traceback
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY)
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    done = workbench("sweep", tmp_path / "study.yaml", "--home", home)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"error: {home}/locks cannot be used: Permission denied\n", done.err)


def test_an_unknown_study(swept):
    _, _, home = swept
    done = workbench("show", "smal", "--home", home)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert "holds no study 'smal'" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_damaged_storage(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "optuna.db").write_text("not a database, and long enough to be seen for what it is" * 20)
    done = workbench("sweep", tmp_path / "study.yaml", "--home", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: Optuna's storage sqlite:///{tmp_path}/optuna.db cannot be used: file is not a database\n"
    )


@pytest.mark.parametrize("command", ["sweep", "show"])
def test_a_tracking_server_that_does_not_answer(tmp_path: Path, command: str):
    (tmp_path / "study.yaml").write_text(STUDY)
    what = tmp_path / "study.yaml" if command == "sweep" else "small"
    uri = "http://127.0.0.1:9"  # the discard port: nothing listens
    done = workbench(command, what, "--home", tmp_path / "home", "--tracking-uri", uri)
    assert done.code == 2
    assert done.err.startswith(f"error: No tracking server answers at {uri}")
    assert len(done.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.db"))  # a study that nobody can record is not begun


def test_unknown_words():
    for words in (["swep"], ["sweep"], ["sweep", "x.yaml", "--trials", "0"]):
        done = workbench(*words)
        assert (done.code, done.out) == (2, "")
        assert "Usage: workbench" in done.err
        assert "Traceback" not in done.err


# -------------------------------------------------------------------- on a terminal


def on_a_terminal(*words: object) -> tuple[int, str]:
    """Run the command in a process of its own on a pseudo-terminal; exit code and all that it wrote there."""
    terminal, end = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TTY_COMPATIBLE", "CI")}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-m", "workbench", *map(str, words)]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=plain | settings, close_fds=True)
    os.close(end)
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 65536):
            written += part
    os.close(terminal)
    return process.wait(), written.decode()


def test_a_sweep_on_a_terminal_shows_bars(swept, tmp_path: Path):
    _, _, home = swept
    (tmp_path / "study.yaml").write_text(STUDY.replace("study: small", "study: shown"))
    code, out = on_a_terminal("sweep", tmp_path / "study.yaml", "--home", home)
    assert code == 0, out
    assert "Traceback" not in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    bars = re.findall(r"(study shown|trial \d \w+) +[━╸╺]+ +(\d+)/(\d+)", text)
    assert ("study shown", "3", "3") in bars
    assert {("trial", "4")} == {(name.split()[0], total) for name, _, total in bars if not name.startswith("study")}
    # workers train trials beside each other: which one ends first is open
    assert sorted(int(n) for n in re.findall(r"trial (\d) \w+: complete, accuracy", text)) == [0, 1, 2]
    assert ": step " not in text  # what the bars show is not printed as well
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h")  # the cursor is given back
    assert text.rstrip().splitlines()[-3].strip().startswith("workbench dashboard --home ")
