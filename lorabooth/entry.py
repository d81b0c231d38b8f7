"""One file of a zip, a tar or a folder that a stranger may have made, and the limits within which it is read.

Two rules keep it safe: a name in an archive is text and never a path to write to, and the bytes that count are those
that come out of a decompressor, not those a header claims.
"""

import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorabooth.errors import UserError, one_line

ARCHIVE_BYTES_LIMIT = 1 << 30
ENTRIES_LIMIT = 2_000
ENTRY_BYTES_LIMIT = 64 << 20
TOTAL_BYTES_LIMIT = 4 << 30
RATIO_LIMIT = 200
"""Unpacked to packed. Photos hardly pack at all; deflate, which can reach 1032, does so only on bytes made for it."""
RATIO_FREE_BYTES = 1 << 20
"""Up to this size any ratio will do: a small drawing on one colour packs that well."""

CHUNK_BYTES = 1 << 18
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}

# What the standard library raises on damaged or hostile archives, found by mutating them; struct and Overflow come from
# absurd zip64 offsets, and a RuntimeError is a recursion through headers that each announce another.
ARCHIVE_FAULTS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    EOFError,
    RuntimeError,
    OSError,
    struct.error,
    OverflowError,
)

GIVE_FOLDER = "zip the photos again, or give the folder they are in"


class LeftOut(Exception):
    """One entry that cannot be used while the others can; the text says why, as the end of a sentence about it."""


@dataclass(frozen=True)
class Entry:
    """One file: `name` is text for messages and matching; `read()` returns its bytes or raises LeftOut or UserError."""

    name: str
    read: Callable[[], bytes]


class Readable(Protocol):
    """What gives bytes until there are none."""

    def read(self, size: int, /) -> bytes: ...


class Budget:
    """What may still be unpacked from one source, in bytes."""

    def __init__(self, source: Path):
        self.source = source
        self.left_bytes = TOTAL_BYTES_LIMIT

    def take(self, bytes_: int) -> None:
        """Count these bytes; a UserError where they are too many."""
        self.left_bytes -= bytes_
        if self.left_bytes < 0:
            raise UserError(f"{self.source} holds over {size_text(TOTAL_BYTES_LIMIT)}, which is the limit", hint="give only the 10-50 best photos")


def check_ratio(what: str, unpacked_bytes: int, packed_bytes: int) -> None:
    """Refuse what unpacks to far more than it is."""
    if unpacked_bytes > max(RATIO_FREE_BYTES, RATIO_LIMIT * packed_bytes):
        raise UserError(f"{what} unpacks to over {RATIO_LIMIT} times its size, which no photo does", hint=f"leave it out: {GIVE_FOLDER}")


def bounded(stream: Readable, budget: Budget, name: str, packed_bytes: int | None = None) -> bytes:
    """All bytes of a stream, refused as soon as a limit is passed."""
    data = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        budget.take(len(chunk))
        data += chunk
        if packed_bytes is not None:
            check_ratio(f"{name} in {budget.source}", len(data), packed_bytes)
        if len(data) > ENTRY_BYTES_LIMIT:
            raise LeftOut(f"is over {size_text(ENTRY_BYTES_LIMIT)}, which is the limit for one file")
    return bytes(data)


@contextmanager
def faults(source: Path, what: str = "it") -> Iterator[None]:
    """The one place where a damaged archive becomes a sentence."""
    try:
        yield
    except ARCHIVE_FAULTS as error:
        raise UserError(f"{source} is damaged or cut off: {what} cannot be read", hint=f"copy or download it again, {GIVE_FOLDER}") from error


def is_system_file(name: str) -> bool:
    """Whether an operating system left this file behind, or it is hidden; at any depth."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in parts)


def printable(name: str) -> str:
    """A name from an archive made fit for one line of a terminal: no control characters, the end of it where it is long."""
    clean = one_line(name) or "(no name)"
    return clean if len(clean) <= 100 else "…" + clean[-99:]


def too_many(source: Path) -> UserError:
    """The error of a source with more files than anyone has good photos."""
    return UserError(f"{source} holds over {ENTRIES_LIMIT:,} files, which is the limit", hint="give only the 10-50 best photos")


def size_text(bytes_: int) -> str:
    """A limit in words."""
    return f"{bytes_ >> 30} GiB" if bytes_ >> 30 else f"{bytes_ >> 20} MiB"
