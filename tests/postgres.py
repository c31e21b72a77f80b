"""A PostgreSQL server of one's own on 127.0.0.1, for tests and benchmarks, from the programs that are installed."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

USER = "workbench"
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


def programs() -> Path | None:
    """The folder of initdb and postgres: the one on PATH, or the newest of Debian's; None without PostgreSQL."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return debian[-1].parent if debian else None


needs_postgres = pytest.mark.skipif(programs() is None, reason="needs PostgreSQL, which is not installed")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A server that can be stopped and started again on the same port, with the same data.

    Attributes:
        bin: folder of PostgreSQL's programs.
        data: the cluster, in a folder that the server's user can enter.
        log: file of what the server says; it grows from start to start.
        port: TCP port on 127.0.0.1.
        password: of the superuser, `USER`.
    """

    bin: Path
    data: Path
    log: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy's URL of a database, with the password."""
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Create an empty database; its URL."""
        self.psql(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def psql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as the superuser; its rows as unaligned text."""
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database]
        command = [str(self.bin / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", *where, "-c", statement]
        environment = os.environ | {"PGPASSWORD": self.password}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def start(self) -> None:
        """Start it and wait until it takes connections.

        Raises:
            RuntimeError: it ended instead.
        """
        options = ["-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1", "-c", "unix_socket_directories="]
        options += ["-c", "fsync=off"]  # only a machine that loses its power could tell
        options += ["-c", "max_connections=500"]  # a test that ends leaves its connections to the garbage collector
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.bin / "postgres"), *options], stdout=log, stderr=log, cwd=self.data, **unprivileged()
            )
        ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            if self.process.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended: {self.log.read_text()}")
            time.sleep(0.05)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """End it: when its clients have left, at once, or as a crash does, without a checkpoint."""
        assert self.process is not None, "it was not started"
        self.process.send_signal(SIGNALS[mode])
        self.process.wait()


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A running server that is gone with its data afterwards.

    Args:
        folder: gets the log. The data lie elsewhere: PostgreSQL refuses to run as root, and root's temporary folders
            are closed to the user that it runs as instead.
    """
    found = programs()
    assert found is not None, "PostgreSQL is not installed"
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as place:
        data = Path(place)
        made = Server(found, data / "data", folder / "postgres.log")
        password = data / "password"
        password.write_text(made.password)
        if os.geteuid() == 0:
            for path in (data, password):
                shutil.chown(path, **owner())
        arguments = ["--username", USER, "--pwfile", str(password), "--auth", "scram-sha-256", "--encoding", "UTF8"]
        initdb = [str(found / "initdb"), *arguments, "--locale", "C", "--no-sync", "-D", str(made.data)]
        with made.log.open("ab") as log:
            subprocess.run(initdb, stdout=log, stderr=log, cwd=data, check=True, **unprivileged())
        password.unlink()
        made.start()
        try:
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.stop()


def owner() -> dict[str, int]:
    """Who runs the server when root may not."""
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def unprivileged() -> dict[str, Any]:
    """Arguments of a process that must not be root's."""
    return {**owner(), "extra_groups": []} if os.geteuid() == 0 else {}
