"""Study files and checkpoints with something wrong in them, always the same few (more: benchmarks/chaos/fuzz.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.chaos.fuzz import fuzz  # noqa: E402
from benchmarks.chaos.watch import watched  # noqa: E402


def test_every_file_is_refused_or_does() -> None:
    done = fuzz(studies=12, checkpoints=20, number=None)
    for kind, found in done.items():
        assert found.failures == [], kind
        assert found.refused.total() > 5, kind
        assert found.ran.total() > 0, kind
        assert found.refused.total() + found.ran.total() == found.files


@pytest.mark.parametrize("harm", ["program", "shell", "file", "folder", "renamed", "code", "pickle"])
def test_harm_is_seen(tmp_path: Path, harm: str) -> None:
    """What the fuzzer is to find, done on purpose."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "old").write_text("")
    with watched([inside], tmp_path) as watch:
        (inside / "own").write_text("may be")
        os.replace(inside / "own", inside / "other")
        assert watch.seen == []
        if harm == "program":
            subprocess.run([sys.executable, "--version"], check=True, capture_output=True)
        elif harm == "shell":
            os.system("true")
        elif harm == "file":
            (inside / ".." / "outside" / "new").write_text("may not be")
        elif harm == "folder":
            (outside / "new").mkdir()
        elif harm == "renamed":
            os.replace(inside / "other", outside / "new")
        elif harm == "code":
            exec(compile("1", str(inside / "x.py"), "exec"))
        else:
            import pickle

            pickle.loads(b"cos\ngetcwd\n.")
    assert len(watch.seen) == 1
