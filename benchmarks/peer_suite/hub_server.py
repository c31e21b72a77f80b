"""A little Hugging Face hub on 127.0.0.1, so that tests which ask the hub run offline with nothing patched.

All libraries speak to the hub through huggingface_hub's HTTP client, so one server stands for it: files, revisions,
lists of files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2024-01-01T00:00:00.000Z"


def digest(*parts: object) -> str:
    """What stands for a commit or a file's hash."""
    return hashlib.sha1("/".join(map(str, parts)).encode()).hexdigest()


def folder_of(hub: Path, kind: str, repository: str) -> Path:
    """Where a repository of a kind ("models", "datasets") lies; below it is a folder for each revision."""
    return hub / kind / repository.replace("/", "--")


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories below `hub`."""

    hub: ClassVar[Path]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def send(self, code: int, body: Any = b"", **headers: str) -> None:
        """One answer; anything but bytes goes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, kind: str, status: int = 404, **headers: str) -> None:
        """An error, by the name that huggingface_hub raises for."""
        self.send(status, {"error": kind}, X_Error_Code=kind, X_Error_Message=kind, **headers)

    def answer(self, body: bytes) -> None:
        """/REPO/resolve/REVISION/FILE, /datasets/REPO/resolve/..., /api/{models,datasets}/REPO/..."""
        try:
            parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
            api = parts[:1] == ["api"]
            kind = parts[1] if api and len(parts) > 1 else "datasets" if parts[:1] == ["datasets"] else "models"
            if kind not in ("models", "datasets"):
                self.refuse("Unauthorized", 401)
                return
            rest = parts[2:] if api else parts[kind == "datasets" :]
            repository, rest = self.repository(kind, rest)
            if repository is None:
                self.refuse("RepoNotFound")
                return
            what, name, *inside = [*rest, *["revision", "main"][len(rest) :]]
            revision = self.revision(repository, name)
            if revision is None:
                self.refuse("RevisionNotFound")
            elif api:
                self.tell(repository, revision, what, "/".join(inside), body)
            elif what == "resolve":
                self.send_file(repository / revision, "/".join(inside))
            else:
                self.refuse("NotFound")
        except (BrokenPipeError, ConnectionResetError):
            pass

    def repository(self, kind: str, parts: list[str]) -> tuple[Path | None, list[str]]:
        """The folder of a repository, `owner/name` or `name`, and what follows in the address."""
        for length in (2, 1):
            folder = folder_of(self.hub, kind, "/".join(parts[:length]))
            if len(parts) >= length and folder.is_dir():
                return folder, parts[length:]
        return None, parts

    @staticmethod
    def revision(repository: Path, name: str) -> str | None:
        """The revision of a name or of a commit."""
        names = [folder.name for folder in repository.iterdir() if folder.is_dir()]
        return next((known for known in names if name in (known, digest(repository, known))), None)

    def send_file(self, folder: Path, name: str) -> None:
        """A file or, as the client asks for, a range of its bytes."""
        path, commit = folder / name, digest(folder.parent, folder.name)
        if not path.is_file() or folder.resolve() not in path.resolve().parents:
            self.refuse("EntryNotFound", X_Repo_Commit=commit)
            return
        data = path.read_bytes()
        headers = {"X_Repo_Commit": commit, "ETag": f'"{self.entry(folder, path)["oid"]}"', "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            self.send(200, data, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        self.send(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)

    def tell(self, repository: Path, revision: str, what: str, inside: str, body: bytes) -> None:
        """What a repository holds."""
        folder, commit = repository / revision, digest(repository, revision)
        if what == "revision":
            name = repository.name.replace("--", "/")
            files = [{"rfilename": str(f.relative_to(folder))} for f in sorted(folder.rglob("*")) if f.is_file()]
            facts = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            names = {"_id": commit[:24], "id": name, "modelId": name, "sha": commit, "siblings": files}
            self.send(200, names | facts | {"lastModified": DATE, "createdAt": DATE}, X_Repo_Commit=commit)
        elif what == "tree" and (folder / inside).is_dir():
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            found = (folder / inside).rglob("*") if recursive else (folder / inside).iterdir()
            self.send(200, [self.entry(folder, path) for path in sorted(found)])
        elif what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            paths = asked.get("paths", [])
            paths = [folder / path for path in ([paths] if isinstance(paths, str) else paths) if path]
            self.send(200, [self.entry(folder, path) for path in paths if path.exists()])
        elif what == "refs":
            heads = [
                {"name": f.name, "ref": f"refs/heads/{f.name}", "targetCommit": digest(repository, f.name)}
                for f in repository.iterdir()
            ]
            self.send(200, {"branches": heads, "tags": [], "converts": []})
        else:
            self.refuse("EntryNotFound")

    @staticmethod
    def entry(folder: Path, path: Path) -> dict[str, Any]:
        """A file or folder, as lists of files have it."""
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "oid": digest(name), "size": 0, "path": name}
        stat = path.stat()
        commit = {"id": digest(folder), "title": "-", "date": DATE}
        oid = digest(path, stat.st_size, stat.st_mtime_ns)
        return {"type": "file", "oid": oid, "size": stat.st_size, "path": name, "lastCommit": commit}


def serve(hub: Path, cache: Path) -> None:
    """Start the server, and point huggingface_hub, which must not be imported yet, to it and to a cache of its own."""
    assert "huggingface_hub.constants" not in sys.modules, "huggingface_hub has read its settings already"
    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(cache)}
    # transformers would ask the hub to convert models; telemetry and another protocol are not served
    switches = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_XET")
    os.environ |= dict.fromkeys((*switches, "DISABLE_SAFETENSORS_CONVERSION"), "1")
    os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        os.environ.pop(name, None)
