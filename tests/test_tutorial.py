"""docs/tutorial.md, typed as it stands: each of its commands works and prints what the page shows, but for numbers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import workbench

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
SERVES = re.compile(r"models serve|workbench dashboard")  # until it is stopped
PLAIN = re.compile(r"workbench [\w:/@=. -]+")
LEFT_OUT = "..."


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a reader whose folder holds the studies and whose PATH has `workbench`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    command = tmp_path / "bin" / "workbench"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m workbench "$@"\n')
    command.chmod(0o755)
    places = [str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(places), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_the_tutorial(desk: dict[str, str], tmp_path: Path) -> None:
    assert {language for language, _, _ in BLOCKS} == {"yaml", "csv", "sh", "console"}
    page = iter(BLOCKS)
    said, typed = "", 0
    for language, title, text in page:
        if title:
            (tmp_path / title).write_text(text)
        elif language == "console":
            compare(text, said)
        elif SERVES.search(text):
            with served(text, desk, tmp_path) as port:
                if "dashboard" not in text:  # the question comes next, and its answer
                    said = run(re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{port}", next(page)[2]), desk, tmp_path)
                    compare(next(page)[2], said)
            typed += 1
        else:
            said = run(text, desk, tmp_path)
            typed += 1
    assert typed == 10


def run(text: str, environment: dict[str, str], folder: Path) -> str:
    """Type commands; what they print. Those of workbench run in this process, whose libraries are loaded by then."""
    if all(PLAIN.fullmatch(line) for line in text.splitlines()):
        return "".join(workbench_says(*shlex.split(line)[1:]) for line in text.splitlines())
    done = subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{text}{done.stdout}"
    return done.stdout


def workbench_says(*words: str) -> str:
    """What a command prints."""
    done = workbench(*words)
    assert done.code == 0, done
    return done.out + done.err


@contextmanager
def served(text: str, environment: dict[str, str], folder: Path) -> Iterator[int]:
    """Start what serves, at a port that is free; that port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = re.sub(r"--port \d+", f"--port {port}", text)
    assert command != text
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not answers(port, "_stcore/health" if "dashboard" in text else "ping"):
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int, path: str) -> bool:
    """Whether a server is up."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def compare(shown: str, said: str) -> None:
    """Each line of the page was printed; where it leaves nothing out, no other was."""
    expected, printed = Counter(lines(shown)), Counter(lines(said))
    whole = expected.pop(LEFT_OUT, 0) == 0
    assert expected - printed == Counter(), said
    assert not whole or printed == expected


def lines(text: str) -> list[str]:
    """What two runs have in common: no numbers, no frames of tables, no path of the clone."""
    text = re.sub(r"[─-╿†]", " ", text)
    text = re.sub(r"/[^\s\"]*/(?=studies/)", "", text)
    text = re.sub(r"[-+]?\d(?:[\d.,:T+-]*\d)?", "#", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.split()]
