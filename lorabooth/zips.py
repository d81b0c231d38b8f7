"""The entries of a zip. No entry may lie on top of another, which is how a small zip becomes a huge one (Python
checks that only from 3.11.8 on)."""

import io
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lorabooth import entry
from lorabooth.entry import GIVE_FOLDER, Budget, Entry, LeftOut, bounded, faults, is_system_file, printable, too_many
from lorabooth.errors import UserError

START = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
DIRECTORY_BYTES_LIMIT = entry.ENTRIES_LIMIT << 10
"""Of a zip's table of contents, which zipfile reads whole before anything can be counted: 1 KiB an entry."""

# Deflate alone unpacks in bounded steps; zipfile lets bzip2 and LZMA turn one chunk into gigabytes before we can count.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
UTF8_FLAG = 1 << 11


def has_end(file: BinaryIO, source: Path) -> bool:
    """Whether a file ends as a zip does."""
    with faults(source):
        return zipfile.is_zipfile(file)


@contextmanager
def opened(file: BinaryIO, source: Path) -> Iterator[list[Entry]]:
    """The entries of a zip, which can be read inside the `with`. Raises UserError."""
    with _Archive(file.fileno(), source) as guarded:
        with faults(source):
            archive = zipfile.ZipFile(guarded)
        with archive:
            yield _entries(archive, guarded, source)


class _Archive(io.FileIO):
    """The zip's file. Refuses the one read by which zipfile would take a table of contents of any size into memory."""

    def __init__(self, descriptor: int, source: Path):
        super().__init__(descriptor, closefd=False)
        self.source = source

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_BYTES_LIMIT:
            raise too_many(self.source)
        return super().read(size) or b""


def _entries(archive: zipfile.ZipFile, file: _Archive, source: Path) -> list[Entry]:
    members = archive.infolist()
    if len(members) > entry.ENTRIES_LIMIT:
        raise too_many(source)
    locked = next((member for member in members if member.flag_bits & 1), None)
    if locked:
        raise UserError(f"{source} is encrypted ({printable(_name(locked))})", hint="unzip it and zip it again without a password")
    with faults(source, "its table of contents"):
        _check_overlap(members, file, archive.start_dir)
    budget = Budget(source)
    # Not is_dir(), which fails on a name of no characters.
    files = [member for member in members if not member.filename.endswith("/") and not is_system_file(_name(member))]
    return [Entry(_name(member), partial(_read_member, archive, member, budget)) for member in files]


def _name(member: zipfile.ZipInfo) -> str:
    """The name: UTF-8 where the zip says so, or where it fits though the zip does not say so, as macOS writes it; else cp437, as the format has it."""
    if member.flag_bits & UTF8_FLAG:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


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


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, budget: Budget) -> bytes:
    name = printable(_name(member))
    # The upper half of the attributes is the mode a Unix zip recorded, or 0.
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        raise LeftOut("is a link or a device, not a file")
    if member.compress_type not in METHODS:
        raise UserError(f"{budget.source} packs {name} by a method other than deflate, the only one that is read", hint=GIVE_FOLDER)
    with faults(budget.source, name), archive.open(member) as stream:
        return bounded(stream, budget, name, member.compress_size)
