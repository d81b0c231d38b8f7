"""The entries of a zip or folder that a stranger may have made, read within limits.

Three rules keep it safe: a name in an archive is text and never a path to write to; the bytes that count are those
that come out of the decompressor, not those a header claims; and no entry may lie on top of another, which is how a
small zip becomes a huge one (Python checks that only from 3.11.8 on).
"""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from lorabooth.errors import UserError

ARCHIVE_BYTES_LIMIT = 1 << 30
ENTRIES_LIMIT = 2_000
ENTRY_BYTES_LIMIT = 64 << 20
TOTAL_BYTES_LIMIT = 4 << 30
RATIO_LIMIT = 200
"""Unpacked to packed. Photos hardly pack at all; deflate, which can reach 1032, does so only on bytes made for it."""
RATIO_FREE_BYTES = 1 << 20
"""Entries up to this size may have any ratio: a small drawing on one colour packs that well."""
DIRECTORY_BYTES_LIMIT = ENTRIES_LIMIT << 10
"""Of a zip's table of contents, which zipfile reads whole before anything can be counted: 1 KiB an entry."""

CHUNK_BYTES = 1 << 18
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}

# Deflate alone unpacks in bounded steps; zipfile lets bzip2 and LZMA turn one chunk into gigabytes before we can count.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}

# What zipfile raises on damaged or hostile archives, found by mutating them; struct and Overflow come from absurd zip64 offsets.
ZIP_FAULTS = (
    zipfile.BadZipFile,
    NotImplementedError,
    zlib.error,
    ValueError,
    EOFError,
    RuntimeError,
    OSError,
    struct.error,
    OverflowError,
)

ZIP_START = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30

GIVE_FOLDER = "zip the photos again, or give the folder they are in"


class LeftOut(Exception):
    """One entry that cannot be used while the others can; the text says why, as the end of a sentence about it."""


@dataclass(frozen=True)
class Entry:
    """One file: `name` is text for messages and matching; `read()` returns its bytes or raises LeftOut or UserError."""

    name: str
    read: Callable[[], bytes]


@contextmanager
def entries(source: Path, leave_out: Path) -> Iterator[list[Entry]]:
    """The files of a zip (told by its content) or a folder (with its subfolders, except `leave_out` and finished runs).

    What systems add, such as __MACOSX and hidden files, is not among them. The entries can be read inside the `with`.
    Raises UserError where the source is missing, neither zip nor folder, damaged, encrypted or over a limit.
    """
    if not source.exists():
        raise UserError(f"no such file or folder: {source}", hint="give a zip or a folder of photos")
    if source.is_dir():
        yield _folder_entries(source, leave_out.resolve())
    elif not source.is_file():
        raise UserError(f"{source} is neither a file nor a folder", hint="give a zip or a folder of photos")
    else:
        with _Archive(source) as file:
            with _opened(file, source) as archive:
                yield _zip_entries(archive, file, source)


def is_system_file(name: str) -> bool:
    """Whether an operating system left this file behind, or it is hidden; at any depth."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in parts)


class _Archive(io.FileIO):
    """The zip's file. Refuses the one read by which zipfile would take a table of contents of any size into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_BYTES_LIMIT:
            raise _too_many(Path(os.fsdecode(self.name)))
        return super().read(size) or b""


class _Budget:
    """What may still be unpacked from one source, in bytes."""

    def __init__(self, source: Path):
        self.source = source
        self.left_bytes = TOTAL_BYTES_LIMIT

    def take(self, bytes_: int) -> None:
        self.left_bytes -= bytes_
        if self.left_bytes < 0:
            raise UserError(f"{self.source} holds over {_size(TOTAL_BYTES_LIMIT)}, which is the limit", hint="give only the 10-50 best photos")


@contextmanager
def _faults(source: Path, what: str = "it") -> Iterator[None]:
    """The one place where a damaged zip becomes a sentence."""
    try:
        yield
    except ZIP_FAULTS as error:
        raise UserError(f"{source} is damaged or cut off: {what} cannot be read", hint=f"copy or download it again, {GIVE_FOLDER}") from error


@contextmanager
def _opened(file: _Archive, source: Path) -> Iterator[zipfile.ZipFile]:
    if os.fstat(file.fileno()).st_size > ARCHIVE_BYTES_LIMIT:
        raise UserError(f"{source} is over {_size(ARCHIVE_BYTES_LIMIT)}, which is the limit", hint="zip only the 10-50 best photos")
    with _faults(source):
        start = file.read(len(ZIP_START))
        # The end tells a zip, not the start: an empty one has no entry to start with. A cut one has only the start.
        if not zipfile.is_zipfile(file) and start != ZIP_START:
            raise UserError(f"{source} is not a zip", hint="give a zip of photos, or the folder they are in")
        archive = zipfile.ZipFile(file)
    with archive:
        yield archive


def _zip_entries(archive: zipfile.ZipFile, file: _Archive, source: Path) -> list[Entry]:
    members = archive.infolist()
    if len(members) > ENTRIES_LIMIT:
        raise _too_many(source)
    locked = next((member for member in members if member.flag_bits & 1), None)
    if locked:
        raise UserError(f"{source} is encrypted ({printable(locked.filename)})", hint="unzip it and zip it again without a password")
    with _faults(source, "its table of contents"):
        _check_overlap(members, file, archive.start_dir)
    budget = _Budget(source)
    # Not is_dir(), which fails on a name of no characters.
    files = [member for member in members if not member.filename.endswith("/") and not is_system_file(member.filename)]
    return [Entry(member.filename, partial(_read_member, archive, member, budget)) for member in files]


def _check_overlap(members: Iterable[zipfile.ZipInfo], file: _Archive, directory_offset: int) -> None:
    """Raise BadZipFile where the bytes of two entries overlap, or an entry reaches into the table of contents.

    It also makes the packed size true: an entry that claims more than its own bytes would reach into the next.
    """
    end_offset = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < end_offset:
            raise zipfile.BadZipFile("overlapping entries")
        file.seek(member.header_offset)
        # The last two fields of the local header, the lengths of the name and of the extra field that follow it.
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(LOCAL_HEADER_BYTES))
        end_offset = member.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes + member.compress_size
    if end_offset > directory_offset:
        raise zipfile.BadZipFile("an entry reaches into the table of contents")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, budget: _Budget) -> bytes:
    name = printable(member.filename)
    # The upper half of the attributes is the mode a Unix zip recorded, or 0.
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        raise LeftOut("is a link or a device, not a file")
    if member.compress_type not in METHODS:
        raise UserError(f"{budget.source} packs {name} by a method other than deflate, the only one that is read", hint=GIVE_FOLDER)
    with _faults(budget.source, name), archive.open(member) as stream:
        return _bounded(stream, budget, name, member.compress_size)


def _bounded(stream: IO[bytes], budget: _Budget, name: str, packed_bytes: int | None = None) -> bytes:
    """All bytes of a stream, refused as soon as a limit is passed."""
    data = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        budget.take(len(chunk))
        data += chunk
        if packed_bytes is not None and len(data) > max(RATIO_FREE_BYTES, RATIO_LIMIT * packed_bytes):
            raise UserError(f"{name} in {budget.source} unpacks to over {RATIO_LIMIT} times its size, which no photo does", hint="leave it out of the zip")
        if len(data) > ENTRY_BYTES_LIMIT:
            raise LeftOut(f"is over {_size(ENTRY_BYTES_LIMIT)}, which is the limit for one file")
    return bytes(data)


def _folder_entries(source: Path, leave_out: Path) -> list[Entry]:
    budget = _Budget(source)
    found: list[Entry] = []
    for folder, subfolders, files in os.walk(source):
        # A run lies inside the photos with `lorabooth train .`; its pictures are copies of ours.
        subfolders[:] = [name for name in subfolders if not is_system_file(name) and not _is_run(Path(folder, name), leave_out)]
        paths = [Path(folder, name) for name in files if not is_system_file(name)]
        found += [Entry(path.relative_to(source).as_posix(), partial(_read_file, path, budget)) for path in paths]
        if len(found) > ENTRIES_LIMIT:
            raise _too_many(source)
    return found


def _is_run(folder: Path, leave_out: Path) -> bool:
    return (folder / "manifest.jsonl").exists() or folder.resolve() == leave_out


def _read_file(path: Path, budget: _Budget) -> bytes:
    # A pipe would wait for a writer, and a device has no end.
    if not path.is_file():
        raise LeftOut("is not a regular file")
    try:
        with path.open("rb") as stream:
            return _bounded(stream, budget, path.name)
    except OSError as error:
        raise LeftOut(f"cannot be read ({error.strerror})") from error


def printable(name: str) -> str:
    """A name from an archive made fit for one line of a terminal: no control characters, the end of it where it is long."""
    clean = "".join(character if character.isprintable() else "?" for character in name) or "(no name)"
    return clean if len(clean) <= 100 else "…" + clean[-99:]


def _too_many(source: Path) -> UserError:
    return UserError(f"{source} holds over {ENTRIES_LIMIT:,} files, which is the limit", hint="give only the 10-50 best photos")


def _size(bytes_: int) -> str:
    return f"{bytes_ >> 30} GiB" if bytes_ >> 30 else f"{bytes_ >> 20} MiB"
