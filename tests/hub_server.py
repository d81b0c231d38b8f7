"""A stand-in for the Hugging Face hub: folders served as repositories on 127.0.0.1, with failures that can be switched on.

It gives the answers `huggingface_hub.snapshot_download` asks for, with the hub's own status codes and headers: model
info, file tree, and `resolve` by HEAD and GET. The client is the real one, pointed here by HF_ENDPOINT.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

GOOD_TOKEN = "hf_good"


@dataclass(frozen=True)
class StoredFile:
    """A file as the hub keeps it: large binary ones by SHA-256 (LFS), the others by their git id."""

    path: Path

    @cached_property
    def data(self) -> bytes:
        """The whole file; it is read once, since a commit does not change."""
        return self.path.read_bytes()

    @property
    def is_lfs(self) -> bool:
        """Whether the hub would keep it outside of git."""
        return self.path.suffix in (".safetensors", ".bin", ".pkl")

    @cached_property
    def id(self) -> str:
        """What the hub sends as ETag."""
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    """A folder as a repository of one commit, and what is wrong with it."""

    folder: Path
    gated: bool = False
    """Its licence has not been accepted: names can be listed, files cannot be had."""
    status: int = 200
    """Anything else is the answer to every call."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File -> for each coming GET of it, the number of bytes after which the connection is cut."""

    @cached_property
    def files(self) -> dict[str, StoredFile]:
        """The files by their path in the repository."""
        return {str(path.relative_to(self.folder)): StoredFile(path) for path in sorted(self.folder.rglob("*")) if path.is_file()}

    @cached_property
    def commit(self) -> str:
        """The id of the only commit: of these contents under these names."""
        return hashlib.sha1("\n".join(f"{name} {file.id}" for name, file in self.files.items()).encode()).hexdigest()

    def tree(self) -> list[dict[str, Any]]:
        """The listing of all files, as the hub's tree call gives it."""
        rows: list[dict[str, Any]] = []
        for name, file in self.files.items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(file.data), "oid": file.id}
            if file.is_lfs:
                row["lfs"] = {"oid": file.id, "sha256": file.id, "size": len(file.data), "pointerSize": 130}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Call:
    """A request that came in."""

    method: str
    path: str
    range: str | None


class HubServer(ThreadingHTTPServer):
    """The stand-in; use it in a `with` block, put repositories into `repositories`, read what was asked from `calls`."""

    daemon_threads = True

    def __init__(self, handler: "type[Handler] | None" = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.repositories: dict[str, Repository] = {}
        self.private: dict[str, bool] = {}
        """Repositories that only their owner sees; the others are public."""
        self.calls: list[Call] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, repository: str) -> list[str]:
        """The files of a repository whose contents were asked for, in the order of the calls."""
        found = (re.fullmatch(rf"/{re.escape(repository)}/resolve/\w+/(.+)", call.path) for call in list(self.calls) if call.method == "GET")
        return [match.group(1) for match in found if match]

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Metadata of a file."""
        self._answer()

    def do_GET(self) -> None:
        """Model info, tree, or the contents of a file."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error; `calls` has it all."""

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.calls.append(Call(self.command, path, self.headers.get("Range")))
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {GOOD_TOKEN}"):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        repository = self.server.repositories.get(match.group(1)) if match else None
        if match is None or repository is None:
            # Without a token the hub does not say whether the repository exists.
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.status != 200:
            return self._refuse(repository.status)
        kind, revision, name = match.groups()[1:]
        if revision not in ("main", repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "revision":
            siblings = [row | {"rfilename": row["path"]} for row in repository.tree()] if "blobs=" in self.path else []
            info = {
                "id": match.group(1),
                "sha": repository.commit,
                "gated": repository.gated,
                "private": self.server.private.get(match.group(1), False),
                "tags": [],
                "siblings": siblings,
            }
            return self._json(info)
        if kind == "tree":
            return self._json(repository.tree())
        if repository.gated:
            return self._refuse(403 if token else 401, "GatedRepo", f"Access to model {match.group(1)} is restricted")
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        self._file(repository, name)

    def _file(self, repository: Repository, name: str) -> None:
        file = repository.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))  # type: ignore[union-attr]
        body = file.data[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(file.data) - 1}/{len(file.data)}")
        self.send_header("ETag", f'"{file.id}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        if file.is_lfs:
            self.send_header("X-Linked-Size", str(len(file.data)))
            self.send_header("X-Linked-Etag", f'"{file.id}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repository.cuts.get(name, [])
        if not cuts:
            self.wfile.write(body)
            return
        self.wfile.write(body[: cuts.pop(0)])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)  # an orderly end in the middle of the body: what a broken proxy or a restart looks like
        self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def client(server: HubServer, home: Path, program: str, *arguments: str, **environment: str) -> Any:
    """What a program with an empty hub cache in `home` prints as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    ours = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | ours | environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def simple_repository(folder: Path, **trouble: Any) -> Repository:
    """A repository with as little in it as the first question needs."""
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    (folder / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "model_index.json").write_text("{}")
    return Repository(folder, **trouble)
