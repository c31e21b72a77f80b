"""Workers that are placed as processes, by Ray and by Slurm: what becomes of them, and of their trials."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import typer
from command import workbench
from optuna.trial import TrialState

from tests.postgres import Server, free_port, needs_postgres, server
from workbench.cli import app
from workbench.errors import WorkbenchError
from workbench.sweep import launch, launch_worker
from workbench.sweep.fleet import WORKER
from workbench.sweep.launch import RESTARTS, Processes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "workers.md").read_text()
TWO_AT_ONCE = "search: {sampler: random, pruner: none, in_flight: 2}\n"  # or one worker would take all


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("postgres")) as running:
        yield running


class Witness(threading.Thread):
    """Sees all processes below this one.

    Args:
        kills: how many workers it kills as soon as it sees them.

    Attributes:
        commands: command lines.
        workers: those that were started.
    """

    def __init__(self, kills: int = 0):
        super().__init__(daemon=True)
        self.commands: set[str] = set()
        self.workers: dict[int, psutil.Process] = {}
        self._kills, self._over = kills, threading.Event()

    def __enter__(self) -> Witness:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    command = process.cmdline()
                except psutil.Error:
                    continue
                self.commands.add(" ".join(command))
                if is_worker(command) and process.pid not in self.workers:
                    self.workers[process.pid] = process
                    if len(self.workers) <= self._kills:
                        process.kill()


def check_complete(lab: Any, trials: int, study: Any = None) -> None:
    """Every trial once in both stores."""
    found = (study or lab.study).trials
    assert [(trial.number, trial.state) for trial in found] == [(n, TrialState.COMPLETE) for n in range(trials)]
    assert [run.data.tags["workbench.trial"] for run in lab.trials] == [str(n) for n in range(trials)]
    assert {run.info.status for run in [lab.parent, *lab.trials]} == {"FINISHED"}


def is_worker(command: list[str]) -> bool:
    return command[1:4] == ["-m", "workbench", "worker"]


def gone(workers: list[psutil.Process]) -> bool:
    return psutil.wait_procs(workers, timeout=120)[1] == []


def holding(folder: Path, word: str) -> list[Path]:
    """The files in which a word stands."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    return [path for path in files if word.encode() in path.read_bytes()]


# -------------------------------------------------------------------- processes


@pytest.mark.slow
def test_workers_as_processes_and_one_that_is_killed(lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["GPU-4", "GPU-7"])
    devices: list[str] = []

    def start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        devices.append(environment["CUDA_VISIBLE_DEVICES"])
        return launch_worker.start(words, environment, log)

    monkeypatch.setattr(launch, "start", start)
    with Witness(kills=1) as witness:
        done = lab.write(budget="{trials: 6}", more=TWO_AT_ONCE).sweep("--launcher", "processes")
    assert (done.code, done.err) == (0, "")
    check_complete(lab, 6)
    assert f"note: 2 workers; what they say is in {lab.home / 'logs' / 'tiny'}" in done.out
    assert sorted(re.findall(r"^trial (\d) lora: complete, accuracy", done.out, re.MULTILINE)) == list("012345")
    assert "tiny: maximize validation accuracy" in done.out
    assert "Best: trial" in done.out
    logs = [(lab.home / "logs" / "tiny" / f"worker-{index}.log").read_text() for index in range(2)]
    assert "".join(logs).count(": complete, accuracy") == 6
    assert len(witness.workers) == 3
    assert devices[:2] == ["GPU-4", "GPU-7"]
    assert devices[2] in devices[:2]
    assert len(devices) == 3
    again = lab.sweep("--launcher", "processes")
    assert again.code == 0
    assert "study tiny is finished: 6 trials" in again.out


@pytest.mark.slow
def test_a_mistake_that_only_workers_see(lab):
    shutil.copytree(lab.model, model := lab.folder / "model")
    lab.model = model
    lab.write()
    (model / "config.json").unlink()
    with Witness() as witness:
        done = lab.sweep("--launcher", "processes", "--workers", "2")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert re.match(rf"error: .*{re.escape(str(model))}", line)
    assert "Traceback" not in done.out
    assert len(witness.workers) == 2
    assert gone(list(witness.workers.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        ("processes", "Ctrl-C in a terminal"),
        ("processes", "killed"),
        ("ray", "Ctrl-C in a terminal"),
        ("ray", "killed"),
        ("slurm", "Ctrl-C in a terminal"),
    ],
)
def test_a_sweep_that_is_stopped(lab, monkeypatch: pytest.MonkeyPatch, launcher: str, how: str):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    lab.write(budget="{trials: 500}", more=TWO_AT_ONCE)
    command = [sys.executable, "-m", "workbench", "sweep", lab.file, "--home", lab.home, "--launcher", launcher]
    sweep = subprocess.Popen(
        [*command, "--workers", "2", *(["--resource", "cluster=local"] if launcher == "slurm" else [])],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any("complete" in line for line in sweep.stdout)
        workers = [child for child in psutil.Process(sweep.pid).children(recursive=True) if is_worker(child.cmdline())]
        if how == "killed":
            sweep.kill()
        else:  # it goes to all processes of its group
            os.killpg(sweep.pid, signal.SIGINT)
        out, err = sweep.communicate()
    finally:
        sweep.kill()
    assert len(workers) == 2
    assert gone(workers)
    if how == "killed":
        assert sweep.returncode == -signal.SIGKILL
    else:
        assert sweep.returncode == 130
        assert err == "" or launcher == "slurm"  # submitit's local jobs say what signal they got
        assert "the same command goes on from here" in out
    trials = lab.study.trials
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    assert 1 <= len(running) <= 4
    if launcher != "slurm" and (launcher, how) != (
        "ray",
        "killed",
    ):  # submitit's local jobs, and Ray's, are killed soon
        assert {trial.user_attrs.get(WORKER, "") for trial in running} == {""}  # given back
        assert lab.parent.info.status == "KILLED"
    assert lab.sweep("--workers", "1", "--trials", len(trials)).code == 0
    check_complete(lab, len(trials))


def test_a_worker_that_ends_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []

    def start(*_: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["false"]))
        started[-1].wait()
        return started[-1]

    monkeypatch.setattr(launch, "start", start)
    workers = Processes(tmp_path)
    workers.place([], {}, 1)
    for _ in range(RESTARTS):
        assert workers.working(False) == 1
    assert workers.working(True) == 1  # a trial ended: it is no use to give up
    for _ in range(RESTARTS - 1):
        workers.working(False)
    with pytest.raises(WorkbenchError, match=rf"Worker 0 ended {RESTARTS + 1} times \(exit code 1\) .*worker-0.log"):
        workers.working(False)
    assert len(started) == 2 * RESTARTS + 1


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("2,5", 2, ["2", "5"]), ("", 0, []), ("-1", 0, []), (None, 0, [])],
)
def test_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, names: list[str]):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: count)
    assert launch.gpus() == names


def test_a_worker_whose_launcher_has_died_before_it_was_there():
    code = "from workbench.sweep.launch_worker import heed_launcher; heed_launcher(); print('goes on')"
    environment = os.environ | {launch_worker.LAUNCHER: str(os.getpid())}
    child = [sys.executable, "-c", code]
    known = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert (known.returncode, known.stdout) == (0, "goes on\n")
    orphan = subprocess.run(
        child, env=environment | {launch_worker.LAUNCHER: "999999999"}, capture_output=True, text=True, check=False
    )
    assert orphan.stdout == ""
    assert "KeyboardInterrupt" in orphan.stderr


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("reading ...\nerror: There is no model.\n", "There is no model."),
        ("error: An earlier one.\nreading ...\nerror: It failed,\nsee above.\n", "It failed,\nsee above."),
        (
            "reading ...\ns.yaml:3:4: no such module\n1 problem; nothing was run\n",
            "s.yaml:3:4: no such module\n1 problem; nothing was run",
        ),
    ],
)
def test_why_a_worker_cannot_work(tmp_path: Path, said: str, why: str):
    log = tmp_path / "worker-0.log"
    log.write_text(said)
    assert launch_worker.last_words(log) == why


# -------------------------------------------------------------------- Ray and Slurm


@pytest.mark.slow
@needs_postgres
@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_workers_that_ray_and_slurm_place(
    lab, postgres: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: str
):
    """One worker is killed by somebody; Ray starts it again, with Slurm the others go on. Nobody sees the password."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    temporary = Path(f"/tmp/ray-{os.getpid()}")  # short: Ray keeps sockets there
    monkeypatch.setenv("RAY_TMPDIR", str(temporary))
    url = postgres.create(launcher)
    resource, workers = {"ray": ("num_cpus=1", 1), "slurm": ("cluster=local", 2)}[launcher]
    with Witness(kills=1) as witness:
        done = lab.write(more=TWO_AT_ONCE).sweep(
            "--storage", url, "--launcher", launcher, "--workers", workers, "--resource", resource
        )
    assert (done.code, done.err) == (0, "")
    check_complete(lab, 3, optuna.load_study(study_name="tiny", storage=url))
    assert "Best: trial" in done.out
    assert len(witness.workers) == 2
    assert gone(list(witness.workers.values()))
    logs = lab.home / "logs" / "tiny"
    assert sum(log.read_text().count(": complete, accuracy") for log in logs.glob("worker-?.log")) == 3
    assert bool(list(logs.glob("*_submitted.pkl"))) == (launcher == "slurm")
    assert any("workbench worker" in command for command in witness.commands)
    assert [command for command in witness.commands if postgres.password in command] == []
    assert holding(lab.home, postgres.password) == []
    assert postgres.password not in done.out
    assert "WORKBENCH_STORAGE" not in os.environ
    if launcher == "ray":
        assert any("raylet" in command for command in witness.commands)
        assert holding(temporary, postgres.password) == []
        shutil.rmtree(temporary)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["ray", "--resource", "gpus=1"], "error: Ray does not take the --resource options: Invalid option keyword"),
        (["ray", "--resource", "num_gpus=many"], "error: Ray does not take the --resource options: .*num_gpus"),
        (
            ["slurm", "--resource", "cluster=local", "--resource", "colour=red"],
            "error: submitit does not take the --resource parameters: .*colour",
        ),
        (
            ["slurm", "--resource", "cluster=moon"],
            "error: submitit does not take the --resource parameters: .*executor named moon",
        ),
        (["slurm"], "error: --launcher slurm: there is no sbatch here"),
        (["processes", "--resource", "num_gpus=1"], "error: --resource num_gpus: only for --launcher ray and"),
        (["ray", "--resource", "num_gpus"], "num_gpus is not KEY=VALUE"),
        (["ray", "--resume-trial", "1"], "--resume-trial goes without"),
    ],
)
def test_what_launchers_do_not_take(lab, monkeypatch: pytest.MonkeyPatch, words: list[str], error: str):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    done = lab.write().sweep("--launcher", *words)
    assert done.code == 2
    assert re.search(error, done.err)
    assert "Traceback" not in done.err
    if done.err.startswith("error: "):
        assert len(done.err.splitlines()) == 1


def test_resources_without_a_launcher(lab):
    done = lab.write().sweep("--resource", "num_gpus=1")
    assert done.code == 2
    assert "--resource goes with --launcher" in done.err


@pytest.mark.slow
def test_more_than_the_machine_has(lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = lab.write().sweep("--launcher", "ray", "--resource", "num_gpus=64")
    assert done.code == 2
    assert re.fullmatch(
        r"error: --resource num_gpus=64: this machine has \d+. A cluster is named by RAY_ADDRESS.\n", done.err
    )


@pytest.mark.parametrize(("launcher", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_launcher_whose_package_is_missing(lab, monkeypatch: pytest.MonkeyPatch, launcher: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"workbench.sweep.launch_{launcher}", raising=False)
    done = lab.write().sweep("--launcher", launcher)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert f"--launcher {launcher} needs a package: pip install 'workbench[{launcher}]'" in line


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("0.5", 0.5), ("gpu", "gpu"), ('{"a100": 1}', {"a100": 1}), ("1:00:00", "1:00:00")]
)
def test_values_of_resources(text: str, value: Any):
    assert launch.parsed(text) == value


# -------------------------------------------------------------------- a worker by hand


def test_a_worker_knows_a_study_by_its_name(lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shutil.copytree(lab.data, lab.folder / "reviews")
    lab.data = Path("reviews")  # beside the study file
    assert lab.write().sweep("--workers=1").code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = workbench("worker", "tiny", "--home", lab.home, "--trials", 4)
    assert (done.code, done.err) == (0, "")
    assert "trial 3 lora: complete" in done.out
    check_complete(lab, 4)
    unknown = workbench("worker", "huge", "--home", lab.home)
    assert unknown.code == 2
    (line,) = unknown.err.splitlines()
    assert "huge" in line
    assert list(elsewhere.iterdir()) == []


# -------------------------------------------------------------------- the page


def test_the_page_has_all_options_of_a_worker():
    (command,) = [command for command in app.registered_commands if command.callback.__name__ == "worker"]
    options = typer.main.get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None).params
    named = {option.opts[0] for option in options if option.opts[0].startswith("--")}
    table = set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.MULTILINE))
    assert named == table


@pytest.mark.slow
@needs_postgres
def test_several_machines_as_the_page_says(lab, postgres: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The page's commands with other addresses: a server, and a worker that shares no folder with it."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    for database in re.findall(r"CREATE DATABASE (\w+)", PAGE):
        postgres.create(database)
    port = free_port()
    addresses = {
        "me@database": f"workbench@127.0.0.1:{postgres.port}",
        "http://server:5000": f"http://127.0.0.1:{port}",
        "server:5000": f"127.0.0.1:{port}",
        "--host 0.0.0.0 --port 5000": f"--host 127.0.0.1 --port {port}",
        "/data/artifacts": str(tmp_path / "artifacts"),
        "study.yaml": str(lab.write(budget="{trials: 2}").file),
    }
    found = [re.search(rf"^{start}(?:.*\\\n)*.*$", PAGE, re.MULTILINE) for start in ("mlflow", "workbench worker")]
    serve, work = (match[0] for match in found)
    for before, after in addresses.items():
        serve, work = serve.replace(before, after), work.replace(before, after)
    with (tmp_path / "server.log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", *serve.replace("\\\n", " ").split()], stdout=log, stderr=log, start_new_session=True
        )
    try:
        done = workbench(*work.replace("\\\n", " ").split()[1:], "--home", tmp_path / "machine")
        shown = workbench("show", "tiny", "--home", tmp_path / "another", "--tracking-uri", f"http://127.0.0.1:{port}")
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert (done.code, done.err) == (0, "")
    assert "2 trials: 2 complete" in shown.out
    assert list((tmp_path / "artifacts").rglob("adapter_model.safetensors"))
