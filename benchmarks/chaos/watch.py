"""Sees what the process does while somebody else's file is read: programs started, code run, files written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
WRITES = {  # events, and which of their arguments are the paths that they change
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
    "sqlite3.connect": (0,),
}
WITHIN = ("os.mkdir", "os.remove", "os.rmdir")  # their last argument is a descriptor of a folder, or -1
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NOWHERE = ("/dev/null", "/dev/tty", "/proc/")
SHARED = "/dev/shm"  # processes share memory by files in it, not in its folders
OWN = (("git", "rev-parse"), ("git", "status"), ("nvidia-smi",), ("/sbin/ldconfig",), ("gcc",), ("ld",))

_watching: list[Watch] = []  # a hook cannot be taken away, so there is one, which asks who is watching
_hooked = False


class Watch:
    """What was done that no file may make us do.

    Attributes:
        allowed: folders that may be written to.
        foreign: the folder of files that are not ours, from which no code may run.
        seen: what was done against that.
    """

    def __init__(self, allowed: list[Path], foreign: Path):
        self.allowed, self.foreign = [os.path.realpath(folder) for folder in allowed], os.path.realpath(foreign)
        self.seen: list[str] = []

    def event(self, name: str, args: tuple[Any, ...]) -> None:
        """Note an audit event, if it is one of these."""
        if name in PROGRAMS:
            words = [str(word) for word in args[1]] if name == "subprocess.Popen" and args[1] else [str(args[0])]
            if not any(tuple(words[: len(own)]) == own for own in OWN):
                self.seen.append(f"{name} {words}")
        elif name == "pickle.find_class":
            self.seen.append(f"{name} {args}")
        elif name == "exec" and str(getattr(args[0], "co_filename", "")).startswith(self.foreign):
            self.seen.append(f"{name} {args[0].co_filename}")
        elif name == "open" and self.writes(args):
            self.check(name, args[0])
        if name in WITHIN and args[-1] != -1:
            return  # within a folder that was opened before: one that shutil.rmtree removes, and that was seen
        for place in WRITES.get(name, ()):
            self.check(name, args[place])

    def writes(self, args: tuple[Any, ...]) -> bool:
        """Whether an `open` is for writing."""
        _, mode, flags = args
        return bool(set(mode) & set("wax+") if isinstance(mode, str) else (flags or 0) & WRITING)

    def check(self, name: str, path: Any) -> None:
        """Note a path that may not be written to."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor: opening it was seen
        text = os.fsdecode(path)
        place = os.path.realpath(os.path.dirname(os.path.abspath(text)))  # a link itself may be replaced
        own = place == SHARED or any(place == folder or place.startswith(folder + os.sep) for folder in self.allowed)
        if not own and not text.startswith(NOWHERE) and text not in ("", ":memory:"):
            self.seen.append(f"{name} {text}")


@contextmanager
def watched(allowed: list[Path], foreign: Path) -> Iterator[Watch]:
    """Watch what is done within."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    watch = Watch(allowed, foreign)
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)


def _hook(name: str, args: tuple[Any, ...]) -> None:
    for watch in _watching:
        watch.event(name, args)
