"""Fetches the peer's tests from its source distribution, with the packages that only they need, and builds the local
hub. Takes two minutes and 2.2 GB, once for each version of the peer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".peer_suite"
PACKAGES = ("diffusers==0.42.1", "sentencepiece", "parameterized")


def prepare() -> None:
    """Set up `WORK`, unless that was done for the installed version of the peer."""
    peer, ready = version("peft"), WORK / "ready"
    if ready.exists() and ready.read_text() == peer:
        return
    shutil.rmtree(WORK, ignore_errors=True)
    print(f"Setting up the tests of peft {peer} in {WORK}: two minutes, once.", flush=True)
    fetch_tests(peer)
    # no dependencies: what there is comes from the environment that is tested
    pip("install", "--no-deps", "--target", str(WORK / "site"), *PACKAGES)
    paths = os.pathsep.join([str(WORK / "site"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "hub_build.py"), str(WORK / "hub")]
    with open(WORK / "hub.log", "wb") as log:
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log)
    ready.write_text(peer)


def fetch_tests(peer: str) -> None:
    """Unpack the `tests` folder of the peer's source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--no-binary", ":all:", f"peft=={peer}", "-d", folder)
        with tarfile.open(next(Path(folder).glob("peft-*.tar.gz"))) as archive:
            members = [m for m in archive.getmembers() if m.name.startswith(f"peft-{peer}/tests/")]
            archive.extractall(folder, members, filter="data")
        shutil.copytree(Path(folder, f"peft-{peer}", "tests"), WORK / "suite" / "tests")
    (WORK / "suite" / "tests" / "__init__.py").touch()


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)
