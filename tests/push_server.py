"""The stand-in hub, to which can be written: create, validate, preupload, LFS batch, upload, commit, as huggingface_hub 2 asks for them.

Sources: huggingface_hub's hf_api.py, _commit_api.py and lfs.py; Git LFS' batch API. What is committed lies in a folder, and is read by the
calls of hub_server.py.
"""

import base64
import hashlib
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hub_server import GOOD_TOKEN, Handler, HubServer, Repository, StoredFile

READ_TOKEN = "hf_read"


@dataclass
class Failure:
    """What goes wrong with coming requests: `times` of those whose method and path match are answered by a status.

    cut: "before" anything is done, "during" the upload after some bytes, or "after" the work, so that only the answer is lost.
    """

    method: str
    path: str
    status: int = 0
    cut: str = ""
    times: int = 1


class PushServer(HubServer):
    """The stand-in; repositories are made below `folder` by the client. `uploads` counts the bodies of large files that arrived, `commits` those made."""

    def __init__(self, folder: Path) -> None:
        super().__init__(PushHandler)
        self.folder = folder
        self.owner, self.organisations = "me", ("my-team",)
        self.failures: list[Failure] = []
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[tuple[str, list[str]]] = []
        self.seen: list[bytes] = []
        """All that was sent, to look for what must not be in it."""

    def content(self, name: str) -> dict[str, bytes]:
        """The files of a repository."""
        folder = self.folder / name
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class PushHandler(Handler):
    """One connection of the client."""

    server: PushServer

    def do_GET(self) -> None:
        """Who has the token, or what the reading stand-in answers."""
        if self.path != "/api/whoami-v2":
            return None if self._failed() else super().do_GET()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self._body()
        if self._failed():
            return None
        if token not in (GOOD_TOKEN, READ_TOKEN):
            return self._refuse(401, message="Invalid user token.")
        organisations = [{"name": name} for name in self.server.organisations]
        role = "read" if token == READ_TOKEN else "write"
        return self._json({"type": "user", "name": self.server.owner, "orgs": organisations, "auth": {"accessToken": {"role": role}}})

    def do_POST(self) -> None:
        """All that is said of files."""
        self._write()

    def do_PUT(self) -> None:
        """A large file's bytes."""
        self._write()

    def _write(self) -> None:
        cut = self._next_failure("during")
        body = self._body(64 if cut else None)
        if cut:
            return self._hang_up()
        if self.headers.get("Authorization") != f"Bearer {GOOD_TOKEN}" and not self.path.startswith("/large/"):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if self._failed():
            return None
        if match := re.fullmatch(r"/large/(\w+)", self.path):
            assert hashlib.sha256(body).hexdigest() == match[1], "a file arrived other than it was announced"
            self.server.large[match[1]] = body
            self.server.uploads.append(match[1])
            return self._send(200, b"", {})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git/info/lfs/objects/batch|/(preupload|commit)/main)", self.path.split("?")[0]):
            if match[1] not in self.server.repositories:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            return {"preupload": self._preupload, "commit": self._commit, None: self._batch}[match[2]](match[1], body)
        return self._refuse(404, message="no such call")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or self.server.owner}/{asked['name']}"
        if (asked["organization"] or self.server.owner) not in (self.server.owner, *self.server.organisations):
            return self._refuse(403, message="You don't have the rights to create a model under this namespace")
        known = name in self.server.repositories
        if not known:
            folder = self.server.folder / name
            folder.mkdir(parents=True)
            (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self.server.repositories[name] = Repository(folder)
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        answer = json.dumps({"url": f"{self.server.endpoint}/{name}", "name": name, "error": "You already created this model repo" if known else None})
        return self._send(409 if known else 200, answer.encode(), {"Content-Type": "application/json"})

    def _validate(self, card: str) -> None:
        matter = yaml.safe_load(card.split("---\n")[1])
        wrong = [name for name in ("license", "tags", "pipeline_tag") if not matter.get(name)]
        return self._refuse(400, message=f"{wrong} are missing") if wrong else self._json({"errors": [], "warnings": []})

    def _preupload(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name].files
        answers = []
        for file in json.loads(body)["files"]:
            large = StoredFile(Path(file["path"])).is_lfs
            there = {"oid": files[file["path"]].id} if file["path"] in files else {}
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **there})
        return self._json({"files": answers})

    def _batch(self, name: str, body: bytes) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"actions": {"upload": {"href": f"{self.server.endpoint}/large/{wanted['oid']}"}}} if wanted["oid"] not in self.server.large else {}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **action})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        folder, changed = self.server.folder / name, []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            data = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.large[value["oid"]]
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(data)
            changed.append(value["path"])
        self.server.repositories[name] = Repository(folder)
        self.server.commits.append((name, sorted(changed)))
        if self._failed(after=True):
            return None
        commit = self.server.repositories[name].commit
        return self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}", "hookOutput": ""})

    def _body(self, limit: int | None = None) -> bytes:
        """What the client sends, in one piece or in chunks; cut at `limit`."""
        length = self.headers.get("Content-Length")
        if length is None and "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if limit and len(body) > limit:
                    return body
            self.rfile.readline()
        else:
            body = self.rfile.read(min(int(length or 0), limit or 1 << 40))
        self.server.seen.append(self.path.encode() + body)
        return body

    def _failed(self, after: bool = False) -> bool:
        """Whether this request is to fail, and then it has."""
        failure = self._next_failure("after" if after else "before")
        if failure is None:
            return False
        if failure.cut:
            self._hang_up()
        else:
            self._refuse(failure.status, message="as ordered by the test")
        return True

    def _next_failure(self, when: str) -> Failure | None:
        """The failure that this request is to have at that time."""
        for failure in self.server.failures:
            if failure.times and (failure.cut or "before") == when and failure.method == self.command and re.search(failure.path, self.path):
                failure.times -= 1
                return failure
        return None

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
