"""The `workbench` command, run in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from workbench.cli import main


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


def workbench(*words: object) -> Done:
    """Run the command in this process, not on a terminal."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", ["workbench", *map(str, words)]):
                main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
