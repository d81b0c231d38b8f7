"""One file by HTTP: resumed where it broke off, bounded in size, with a progress bar and its SHA-256."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from httpx2 import Response
from tqdm import tqdm

from infer.formats import check_start
from lorabooth import web
from lorabooth.errors import UserError
from lorabooth.runs import write_durable
from lorabooth.web import Web, WebError

BLOCK_BYTES = 512
"""By which the kind of a file can be told: the first block of a tar."""
LIMIT_VARIABLE = "LORABOOTH_LORA_LIMIT_GB"
SLOW_BYTES, SLOW_SECONDS = 64 << 10, 120
"""A server that gives less than this in this time will not finish in this life."""


@dataclass(frozen=True)
class Downloaded:
    """A whole file at `part`, or, where `part` is None, the news that it has not changed."""

    part: Path | None
    sha256: str = ""
    etag: str = ""
    modified: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class Known:
    """What is known of an earlier copy, to ask whether it is still the same."""

    etag: str = ""
    modified: str = ""
    bytes: int = 0


class Download:
    """One file, from `url` to `part`. `show` names it on the bar, None for no bar; a broken-off `part` of the same file is gone on with."""

    def __init__(self, fetcher: Web, url: str, part: Path, token: str, limit_bytes: int, show: str | None):
        self.web, self.url, self.part, self.token = fetcher, url, part, token
        self.limit_bytes, self.show = limit_bytes, show
        self.name = web.shown(web.parse(url))
        self.validators = part.with_suffix(".json")

    def run(self, known: Known | None = None) -> Downloaded:
        """Fetch it; a UserError says why that cannot be. Where a copy is known there is no second attempt: that will do.

        The count of failures begins again with each attempt that brings bytes.
        """
        failed = 0
        while True:
            before = self._have()
            try:
                return self._attempt(known)
            except WebError as error:
                failed = failed + 1 if self._have() <= before else 1
                if known or not self.web.pause(error, failed):
                    raise

    def _attempt(self, known: Known | None) -> Downloaded:
        have, validator = self._have(), self._validator()
        headers = {"Accept": "*/*"}
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        elif known and known.etag:
            headers["If-None-Match"] = known.etag
        elif known and known.modified:
            headers["If-Modified-Since"] = known.modified
        try:
            with self.web.get(self.url, headers, self.token) as response:
                if known and "Range" not in headers and _unchanged(response, known):
                    return Downloaded(None, etag=known.etag, modified=known.modified, bytes=known.bytes)
                return self._receive(response, have if response.status_code == 206 else 0)
        except WebError as error:
            if error.status != 416:  # the part is longer than the file is now
                raise
            self._forget()
            raise WebError(error.message, error.hint, error.status, may_pass=True) from None

    def _receive(self, response: Response, have: int) -> Downloaded:
        if response.status_code == 304:
            raise WebError(f"{self.name} is said not to have changed, which was not asked", hint="try again later")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(f"{self.name} is sent packed although it was asked for as it is", hint="download it by hand and give the file")
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            self._forget()
            raise WebError(f"{self.name} is sent from another place than it was asked for", hint="try again later", may_pass=True)
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        self._check_size(total or have)
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        # A weak tag does not promise the same bytes, so that half of a file cannot be trusted by it.
        strong = etag if etag and not etag.startswith("W/") else modified
        with self.part.open("r+b" if have else "wb") as file:
            start, digest = b"", hashlib.sha256()
            while have and (chunk := file.read(1 << 20)):
                start = start or chunk[:BLOCK_BYTES]
                digest.update(chunk)
            if not have:
                write_durable(self.validators, json.dumps({"validator": strong}).encode())
            got = self._copy(response, file, digest, start, have, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and got != total:
            raise WebError(f"{self.name} broke off after {got:,} of {total:,} bytes", hint="run the same command again: what arrived is kept", may_pass=True)
        self.validators.unlink(missing_ok=True)
        return Downloaded(self.part, digest.hexdigest(), etag, modified, got)

    def _copy(self, response: Response, file: BinaryIO, digest: "hashlib._Hash", start: bytes, have: int, total: int | None) -> int:
        """Write what comes, after the `have` bytes that are there, of which `start` are the first; how many there are then."""
        window_bytes, window_seconds = 0, time.monotonic()
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=self.show, disable=self.show is None)
        with bar, web.failures(web.parse(self.url)):
            for chunk in response.iter_raw():
                have += len(chunk)
                self._check_size(have)
                if len(start) < BLOCK_BYTES and len(start := start + chunk[:BLOCK_BYTES]) >= BLOCK_BYTES:
                    self._check_start(start)
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
                window_bytes += len(chunk)
                if time.monotonic() - window_seconds > SLOW_SECONDS:
                    if window_bytes < SLOW_BYTES:
                        raise WebError(f"{self.name} comes too slowly", hint="run the same command again later: what arrived is kept")
                    window_bytes, window_seconds = 0, time.monotonic()
        if len(start) < BLOCK_BYTES and have == (total or have):
            self._check_start(start)
        return have

    def _check_start(self, start: bytes) -> None:
        try:
            check_start(start, self.name)
        except UserError:
            self._forget()
            raise

    def _check_size(self, size: int) -> None:
        if size > self.limit_bytes:
            self._forget()
            raise too_large(self.name, self.limit_bytes)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _validator(self) -> str:
        try:
            return str(json.loads(self.validators.read_text(encoding="utf-8"))["validator"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.validators.unlink(missing_ok=True)


def too_large(name: str, limit_bytes: int) -> UserError:
    """The error of a file over the limit."""
    hint = f"if it is a LoRA all the same, set {LIMIT_VARIABLE} to a higher limit; a whole model is given with --model"
    return UserError(f"{name} is over {limit_bytes / 1e9:.6g} GB, which is the limit for a LoRA", hint=hint)


def _unchanged(response: Response, known: Known) -> bool:
    """Whether the answer says that the file is what it was; for servers that ignore the question, by what they tell of the file."""
    if response.status_code == 304:
        return True
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if etag or known.etag:
        return bool(etag == known.etag)
    if modified or known.modified:
        return bool(modified == known.modified)
    return False  # files of one size may differ: LoRAs of one rank do
