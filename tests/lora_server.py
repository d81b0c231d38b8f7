"""A web server on this machine that gives LoRAs, and each of the ways in which real ones fail; and the LoRAs to give."""

import hashlib
import io
import json
import re
import socket
import tarfile
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from safetensors.numpy import save


def lora_bytes(size: int = 64, trigger: str = "TOK") -> bytes:
    """A LoRA file with `size` numbers in it."""
    import numpy

    state = {"transformer.a.lora_A.weight": numpy.arange(size, dtype=numpy.float32).reshape(1, size)}
    return save(state, metadata={"modelspec.trigger_phrase": trigger})


def tar_bytes(**files: bytes) -> bytes:
    """A tar with these files, whose names have `__` for the slash."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass
class Page:
    """What is at a path, and what is wrong with it."""

    body: bytes = b""
    status: int = 200
    statuses: list[int] = field(default_factory=list)
    """Answers to the first requests, before `status`."""
    location: str = ""
    etag: bool = True
    ranges: bool = True
    """Whether Range is heeded."""
    if_range: bool = True
    """Whether If-Range is heeded; if not, a part is sent of whatever file there is now."""
    piece: int = 0
    """The most bytes that are sent of a part."""
    pieces_told: bool = True
    """Whether the answer says so, or ends early."""
    length: bool = True
    """Whether Content-Length is told."""
    cuts: list[int] = field(default_factory=list)
    """For each coming GET, the number of bytes of the body after which the connection is cut."""
    pause_seconds: float = 0
    """Before the last byte."""
    drip: str = ""
    """headers, chunk or body: a byte of that every twentieth of a second, without an end."""
    token: str = ""
    """Needed as a bearer token."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return f'"{hashlib.md5(self.body, usedforsecurity=False).hexdigest()}"'


@dataclass(frozen=True)
class Call:
    """A request that came in."""

    path: str
    headers: dict[str, str]
    status: int


class LoraServer(ThreadingHTTPServer):
    """Use it in a `with` block; put pages into `pages`, read what was asked from `calls`."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.host = host
        self.pages: dict[str, Page] = {}
        self.calls: list[Call] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @cached_property
    def base(self) -> str:
        """The address without a path."""
        return f"http://{self.host}:{self.server_port}"

    def put(self, path: str, body: bytes | dict[str, Any] = b"", **trouble: Any) -> str:
        """Put a page at a path; its address."""
        self.pages[path] = Page(body if isinstance(body, bytes) else json.dumps(body).encode(), **trouble)
        return self.base + path

    def asked(self, path: str) -> list[Call]:
        """The requests for a path (without its query)."""
        return [call for call in self.calls if call.path.split("?")[0] == path]

    def __enter__(self) -> "LoraServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: LoraServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error; `calls` has it all."""

    def handle_one_request(self) -> None:
        """Clients hang up as they please, also between requests."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        """Any page."""
        page = self.server.pages.get(self.path) or self.server.pages.get(self.path.split("?")[0]) or Page(b"not here", 404)
        status = page.statuses.pop(0) if page.statuses else page.status
        if page.token and self.headers.get("Authorization") != f"Bearer {page.token}":
            status = 401
        start = 0
        if status == 200 and page.etag and self.headers.get("If-None-Match") == page.tag:
            status = 304
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status == 200 and page.ranges and match and (self.headers.get("If-Range") in (page.tag, page.headers.get("Last-Modified")) or not page.if_range):
            status, start = (206, int(match.group(1))) if int(match.group(1)) < len(page.body) else (416, 0)
        self.server.calls.append(Call(self.path, dict(self.headers.items()), status))
        if page.drip:
            return self._drip(page.drip)
        end = start + page.piece if status == 206 and page.piece else len(page.body)
        body = b"" if status == 304 else page.body[start:end] if status in (200, 206) else b"no"
        self.send_response(status)
        if status == 206:
            last = start + len(body) if page.pieces_told else len(page.body)
            self.send_header("Content-Range", f"bytes {start}-{last - 1}/{len(page.body)}")
        if page.location:
            self.send_header("Location", page.location)
        if page.etag and status in (200, 206, 304):
            self.send_header("ETag", page.tag)
        for name, value in page.headers.items():
            self.send_header(name, value)
        if page.length and (status != 206 or page.pieces_told):
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        try:
            self._write(page, body)
        except OSError:  # the client has seen enough
            self.close_connection = True

    def _drip(self, what: str) -> None:
        begin = {"headers": "X: ", "chunk": "Transfer-Encoding: chunked\r\n\r\n1;", "body": "\r\n"}[what]
        self.wfile.write(f"HTTP/1.1 200 OK\r\n{begin}".encode())
        while True:  # until the client hangs up
            self.wfile.write(b" ")
            time.sleep(0.05)

    def _write(self, page: Page, body: bytes) -> None:
        if page.cuts and body:
            self.wfile.write(body[: page.cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body[:-1])
        self.wfile.flush()
        time.sleep(page.pause_seconds)
        self.wfile.write(body[-1:])
