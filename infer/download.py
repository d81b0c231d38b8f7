"""One file by HTTP: resumed where it broke off, bounded in size, with a progress bar and its SHA-256."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from httpx2 import Response
from tqdm import tqdm

from infer.formats import check_start
from lorabooth import web
from lorabooth.errors import UserError
from lorabooth.patience import SLOW_BYTES
from lorabooth.runs import write_durable
from lorabooth.web import BrokenOff, Web, WebError

BLOCK_BYTES = 512
"""By which the kind of a file can be told: the first block of a tar."""
COPY_BYTES = 1 << 20
LIMIT_VARIABLE = "LORABOOTH_LORA_LIMIT_GB"


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


@dataclass(frozen=True)
class Told:
    """What a server said of a file: kept beside the part of it that came, which is gone on with only where it says the same again."""

    etag: str = ""
    modified: str = ""
    total_bytes: int | None = None

    @property
    def validator(self) -> str:
        """By what to ask for the rest of the same file; "" where that cannot be."""
        # A weak tag does not promise the same bytes, so that half of a file cannot be trusted by it.
        return self.modified if self.etag.startswith("W/") else self.etag or self.modified

    def is_same(self, now: "Told") -> bool:
        """Whether an answer with a part is of this file, for a server may ignore what was asked. A tag it must repeat, a date it need not."""
        tags = (self.etag,) if self.validator == self.etag else ("", self.etag)
        dated = self.validator == self.etag or now.modified in ("", self.modified)
        return now.etag in tags and dated and (None in (self.total_bytes, now.total_bytes) or self.total_bytes == now.total_bytes)


class Arrived:
    """What there is of a file: its size, its hash and its first block."""

    def __init__(self) -> None:
        self.bytes, self.digest, self.start = 0, hashlib.sha256(), b""

    def add(self, chunk: bytes) -> None:
        """More of it came."""
        self.bytes += len(chunk)
        self.digest.update(chunk)
        if len(self.start) < BLOCK_BYTES:
            self.start += chunk[:BLOCK_BYTES]


class Download:
    """One file, from `url` to `part`. `show` names it on the bar, None for no bar; a broken-off `part` of the same file is gone on with.

    A whole part stays, with what was told of it, until somebody takes it in: a kill before that costs one byte.
    """

    def __init__(self, fetcher: Web, url: str, part: Path, token: str, limit_bytes: int, show: str | None):
        self.web, self.url, self.part, self.token = fetcher, url, part, token
        self.limit_bytes, self.show = limit_bytes, show
        self.name = web.shown(web.parse(url))
        self.beside = part.with_suffix(".json")

    def run(self, known: Known | None = None) -> Downloaded:
        """Fetch it; a UserError says why that cannot be. Where a copy is known there is no second attempt: that will do.

        The count of failures begins again with each attempt that brings more than was ever there, and not just some bytes.
        """
        failed, most = 0, self._have()
        while True:
            try:
                return self._attempt(known)
            except WebError as error:
                failed = 1 if self._have() >= most + SLOW_BYTES else failed + 1
                most = max(most, self._have())
                if known or not self.web.pause(error, failed):
                    if isinstance(error, BrokenOff) and self._have() and self._told().validator:
                        error.hint += ": what arrived is kept"
                    raise

    def _attempt(self, known: Known | None) -> Downloaded:
        told = self._told()
        have = self._have() if told.validator else 0
        # Of a part that may be whole the last byte is asked for again: it comes with the word that the file is the same.
        have = max(0, min(have, (told.total_bytes or have) - 1))
        arrived = self._read(have)
        try:
            with self.web.get(self.url, {"Accept": "*/*"} | _question(have, told, known), self.token) as response:
                now, begin = _told_by(response), _begin(response)
                if known and not have and _unchanged(response, known):
                    return Downloaded(None, etag=known.etag, modified=known.modified, bytes=known.bytes)
                if begin == 0:
                    return self._receive(response, Arrived(), now)
                if have and begin == have and told.is_same(now):
                    return self._receive(response, arrived, replace(told, total_bytes=told.total_bytes or now.total_bytes))
                if not have:
                    raise WebError(f"{self.name} is not sent from its beginning, as it was asked for", hint="try again later", may_pass=True)
        except WebError as error:
            if error.status != 416 or not have:
                raise
        self._forget()  # the part is of another file, or longer than the file is now
        return self._attempt(known)

    def _receive(self, response: Response, arrived: Arrived, told: Told) -> Downloaded:
        """Write what comes behind what arrived."""
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise WebError(f"{self.name} is sent packed although it was asked for as it is", hint="download it by hand and give the file")
        self._check_size(told.total_bytes or 0)
        with self.part.open("r+b" if arrived.bytes else "wb") as file:
            file.truncate(file.seek(arrived.bytes))
            self._write_down(told)
            self._copy(response, file, arrived, told.total_bytes)
            file.flush()
            os.fsync(file.fileno())
        if told.total_bytes not in (None, arrived.bytes):
            raise BrokenOff(f"{self.name} broke off after {arrived.bytes:,} of {told.total_bytes:,} bytes")
        return Downloaded(self.part, arrived.digest.hexdigest(), told.etag, told.modified, arrived.bytes)

    def _copy(self, response: Response, file: BinaryIO, arrived: Arrived, total: int | None) -> None:
        bar = tqdm(total=total, initial=arrived.bytes, unit="B", unit_scale=True, unit_divisor=1024, desc=self.show, disable=self.show is None)
        with bar:
            for chunk in web.body(web.parse(self.url), response):
                unknown = len(arrived.start) < BLOCK_BYTES
                arrived.add(chunk)
                self._check_size(arrived.bytes)
                if unknown and len(arrived.start) >= BLOCK_BYTES:
                    self._check_start(arrived.start)
                file.write(chunk)
                bar.update(len(chunk))
        if len(arrived.start) < BLOCK_BYTES and total in (None, arrived.bytes):
            self._check_start(arrived.start)

    def _check_start(self, start: bytes) -> None:
        try:
            check_start(start, self.name)
        except UserError as error:
            self._forget()
            raise WebError(error.message, error.hint) from None  # as a refusal is: a page that asks for a login comes in place of the file

    def _check_size(self, size: int) -> None:
        if size > self.limit_bytes:
            self._forget()
            raise too_large(self.name, self.limit_bytes)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _read(self, have: int) -> Arrived:
        """The first `have` bytes of the part. They are read before the server is asked: no server waits for a slow disk."""
        arrived = Arrived()
        if have:
            with self.part.open("rb") as file:
                while chunk := file.read(min(COPY_BYTES, have - arrived.bytes)):
                    arrived.add(chunk)
        return arrived

    def _told(self) -> Told:
        try:
            told = json.loads(self.beside.read_text(encoding="utf-8"))
            return Told(str(told["etag"]), str(told["modified"]), told["total_bytes"] and int(told["total_bytes"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Told()

    def _write_down(self, told: Told) -> None:
        if told != self._told():
            write_durable(self.beside, json.dumps(asdict(told)).encode())

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.beside.unlink(missing_ok=True)


def too_large(name: str, limit_bytes: int) -> UserError:
    """The error of a file over the limit."""
    hint = f"if it is a LoRA all the same, set {LIMIT_VARIABLE} to a higher limit; a whole model is given with --model"
    return UserError(f"{name} is over {limit_bytes / 1e9:.6g} GB, which is the limit for a LoRA", hint=hint)


def _question(have: int, told: Told, known: Known | None) -> dict[str, str]:
    """What to ask beside the file: for the rest of it, or only for another than is known."""
    if have:
        return {"Range": f"bytes={have}-", "If-Range": told.validator}
    if known and known.etag:
        return {"If-None-Match": known.etag}
    return {"If-Modified-Since": known.modified} if known and known.modified else {}


def _told_by(response: Response) -> Told:
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() and len(length) < 20 else None
    if response.status_code == 206:  # whose length is that of what is sent
        total = int(whole) if (whole := _range(response)[1]) else None
    return Told(response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""), total)


def _begin(response: Response) -> int | None:
    """At which byte of the file an answer begins; None where it brings nothing of it, or does not say."""
    if response.status_code == 206:
        return int(first) if (first := _range(response)[0]) else None
    return 0 if response.status_code == 200 else None


def _range(response: Response) -> tuple[str, str]:
    """The first byte and the size of the whole file, by a Content-Range; "" for what it does not say."""
    match = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(?:(\d{1,19})|\*)", response.headers.get("Content-Range", ""), re.ASCII)
    return (match[1], match[2] or "") if match else ("", "")


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
