"""A sweep that is stopped, wherever and however, and started again ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from command import workbench
from optuna.trial import TrialState
from safetensors.torch import load_file

from workbench.sweep import entry, run, workshop
from workbench.sweep.checkpoints import Checkpoints
from workbench.sweep.record import Record
from workbench.sweep.scheduler import Scheduler
from workbench.training import adapted, trainee

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.chaos.place import MlflowServer  # noqa: E402

# the sweep in a process of its own, which stops at step 7 of trial 1 and waits for whatever comes
HOLDING = """
import sys
from workbench.cli import main
from workbench.sweep.display import Display

def step(self, number, at, loss):
    if (number, at) == (1, 7):
        print("holding", flush=True)
        sys.stdin.read()

Display.step = step
main()
"""


@pytest.fixture(scope="module")
def undisturbed(new_lab: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Results of the study without any interruption."""
    lab = new_lab(tmp_path_factory.mktemp("undisturbed"))
    assert lab.write().sweep().code == 0
    return lab.results()


def check_complete(lab: Any, undisturbed: list[tuple]) -> None:
    """Three trials, none lost or doubled, in both stores, and the results that they always have."""
    assert [(trial.number, trial.state) for trial in lab.study.trials] == [(n, TrialState.COMPLETE) for n in range(3)]
    assert [run.data.tags["workbench.trial"] for run in lab.trials] == ["0", "1", "2"]
    assert {run.data.tags["workbench.outcome"] for run in lab.trials} == {"complete"}
    assert {run.info.status for run in [lab.parent, *lab.trials]} == {"FINISHED"}
    assert len(lab.runs) == 4
    assert [trial.user_attrs["run_id"] for trial in lab.study.trials] == [run.info.run_id for run in lab.trials]
    assert [run.data.tags.get("workbench.message") for run in lab.trials] == [None] * 3
    lab.check_alike(lab.results(), undisturbed)
    for child, trial in zip(lab.trials, lab.study.trials, strict=True):
        losses = {step: -loss for step, loss in lab.curve(child, "validation.loss").items()}
        assert trial.intermediate_values == pytest.approx(losses, abs=1e-6)
        assert lab.adapter(child).joinpath("adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("how", "workers"),
    [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGTERM, 1)],
    ids=["killed", "killed with its workers", "Ctrl-C", "stopped"],
)
def test_a_process_that_ends_while_a_trial_trains(lab, undisturbed, how: signal.Signals, workers: int):
    lab.write()
    command = [sys.executable, "-c", HOLDING, "sweep", lab.file, "--home", lab.home, f"--workers={workers}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        before = list(iter(process.stdout.readline, "holding\n"))
        helpers = psutil.Process(process.pid).children()
        second = lab.sweep()
        process.send_signal(how)
        out, err = process.communicate()
    finally:
        process.kill()
    assert [line.split(": ")[1] for line in before if line.startswith("trial 1 lora: step")] == ["step 5"]
    assert second.code == 2
    assert "Another `workbench sweep` is running the study 'tiny'" in second.err
    assert len(second.err.splitlines()) == 1
    assert len(helpers) == (workers if workers > 1 else 0)
    assert psutil.wait_procs(helpers, timeout=60)[1] == []  # none is left behind
    first_try = lab.study.trials[1]
    assert first_try.state == TrialState.RUNNING
    (first_run,) = [run for run in lab.trials if run.data.tags["workbench.trial"] == "1"]
    assert list(lab.curve(first_run, "train.loss")) == [1, 2, 3, 4, 5]
    if how != signal.SIGKILL:
        assert (process.returncode, err) == (130, "")
        assert "the same command goes on from here" in out
        assert "Traceback" not in out
        assert (first_run.info.status, first_run.data.tags["workbench.outcome"]) == ("KILLED", "interrupted")
        assert lab.parent.info.status == "KILLED"
    else:
        assert process.returncode == -signal.SIGKILL

    done = lab.sweep()
    assert done.code == 0
    assert re.search(r"resuming study tiny: [012] trials are done, [123] go(es)? on\n", done.out)
    assert re.search("trial 1 lora: .*, from step 5\n", done.out)
    assert "trial 1 lora: step 5" not in done.out
    assert first_run.info.run_id == lab.trials[1].info.run_id
    check_complete(lab, undisturbed)


def once(method: Callable) -> Callable:
    """The method, which Ctrl-C interrupts when it is called for trial 1."""
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
        return method(*args, **options)

    return interrupted


@pytest.mark.parametrize(
    ("owner", "name", "states"),
    [
        (entry, "suggest", "RR"),
        (Scheduler, "_on_reports", "RRR"),
        (optuna.Trial, "report", "RRR"),
        (Checkpoints, "keep_only", "RR"),
        (Record, "keep", "CRR"),
        (optuna.Study, "tell", "CRR"),
    ],
    ids=["drawing", "reporting", "recording", "entering", "saving", "telling"],
)
def test_ctrl_c_at_any_other_time(
    lab, undisturbed, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, states: str
):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, once(getattr(owner, name)))
        stopped = lab.write().sweep("--workers=1")
    assert (stopped.code, stopped.err) == (130, "")
    assert "the same command goes on from here" in stopped.out
    assert [trial.state.name[0] for trial in lab.study.trials] == [*states]
    assert lab.sweep().code == 0
    check_complete(lab, undisturbed)


def test_ctrl_c_before_the_first_trial_leaves_nothing_to_mend(lab, undisturbed, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(workshop, "load_base", interrupt)
        assert lab.write().sweep().code == 130
    assert "study tiny: 3 trials" in lab.sweep().out
    check_complete(lab, undisturbed)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_when_the_study_s_run_is_opened(lab, undisturbed, monkeypatch: pytest.MonkeyPatch, times: int):
    """Nobody else would close it. A second Ctrl-C is not kept waiting."""

    def opened(*args: Any) -> Any:
        parent = open_parent(*args)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return parent

    open_parent = run.open_parent
    with monkeypatch.context() as patch:
        patch.setattr(run, "open_parent", opened)
        assert lab.write().sweep().code == 130
    assert lab.parent.info.status == ("KILLED" if times == 1 else "RUNNING")
    assert not lab.study.trials
    assert lab.sweep().code == 0
    check_complete(lab, undisturbed)


@pytest.mark.parametrize("words", [["--workers=1"], ["--workers=2"], ["--solo"]], ids=" ".join)
def test_a_disk_that_is_full(lab, undisturbed, words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Half of a checkpoint is written, or half of an adapter: the one before still loads, and the study goes on."""
    module, write = (adapted, "write_table") if words == ["--solo"] else (trainee, "save_file")
    calls = []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            file = Path(args[1])
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return whole(*args)

    whole = getattr(module, write)
    monkeypatch.setattr(module, write, full)
    done = lab.write().sweep(*words)
    assert done.code == 2
    assert done.err.startswith("error: The disk is full ([Errno 28] No space left on device: ")
    assert done.err.endswith("Make room; the same command goes on from here.\n")
    assert len(done.err.splitlines()) == 1
    assert all(load_file(file) for file in lab.home.glob("checkpoints/*/*.safetensors"))
    assert lab.parent.info.status == "FAILED"
    monkeypatch.undo()
    assert lab.sweep(*words).code == 0
    check_complete(lab, undisturbed)
    assert [file for file in lab.home.glob("checkpoints/*/*") if file.is_file()] == []


@pytest.mark.slow
def test_a_worker_that_is_killed_and_another_with_another_home(lab, undisturbed, tmp_path: Path):
    """As on two machines: they share Optuna's storage and an MLflow server, by which the checkpoint comes."""
    server = MlflowServer(tmp_path, f"sqlite:///{tmp_path}/server.db")
    lab.write().tracking = server.url
    where = ["--storage", f"sqlite:///{lab.home}/optuna.db", "--tracking-uri", server.url, "--heartbeat", "1"]
    command = [sys.executable, "-c", HOLDING, "worker", lab.file, "--home", tmp_path / "one", "--workers=1", *where]
    server.start()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert list(iter(process.stdout.readline, "holding\n"))[-1] != ""
        finally:
            process.kill()
            process.wait()
        (first_run,) = [run for run in lab.trials if run.data.tags["workbench.trial"] == "1"]
        known = [file.path for file in lab.client.list_artifacts(first_run.info.run_id, "checkpoints")]
        assert known == ["checkpoints/1-5.safetensors"]
        done = workbench("worker", lab.file, "--home", tmp_path / "two", "--workers=1", *where)
        assert done.code == 0, done.err
        assert re.search("trial 1 lora: .*, from step 5\n", done.out)
        assert first_run.info.run_id == lab.trials[1].info.run_id
        check_complete(lab, undisturbed)
        assert not any(lab.client.list_artifacts(run.info.run_id, "checkpoints") for run in lab.trials)
        assert [file for file in tmp_path.glob("two/checkpoints/*/*") if file.is_file()] == []
    finally:
        server.stop()
