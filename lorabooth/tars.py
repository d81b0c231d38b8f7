"""The entries of a tar, plain or packed by gzip, bzip2 or xz.

tarfile reads headers of any size into memory and follows them backwards; here it gets a file that refuses both. A
packed tar is unpacked first, in bounded steps, to a file without a name: entries are wanted in the order of their
names, and a packed stream can only be read in its own.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lorabooth import entry
from lorabooth.entry import CHUNK_BYTES, GIVE_FOLDER, Budget, Entry, LeftOut, bounded, check_ratio, faults, is_system_file, printable, size_text, too_many
from lorabooth.errors import UserError

BLOCK_BYTES = tarfile.BLOCKSIZE
GZIP, BZIP2, XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
XZ_MEMORY_BYTES = 128 << 20
"""What xz may use to unpack; its strongest preset takes 65 MiB, a hostile header asks for 4 GiB."""
HEADERS_BYTES_LIMIT = entry.ENTRIES_LIMIT << 11
"""Of all headers together: 2 KiB an entry, which leaves 1 KiB for a long name."""
HEADER_BYTES_LIMIT = 1 << 16
"""Of one read in them, such as the attributes that macOS writes."""


def is_tar(start: bytes) -> bool:
    """Whether a file's first block is of a tar, or of something packed that may be one."""
    return start.startswith((GZIP, BZIP2, XZ)) or _is_header(start)


@contextmanager
def opened(file: BinaryIO, source: Path, folder: Path | None) -> Iterator[list[Entry]]:
    """The entries of a tar, which can be read inside the `with`; `folder` is where a packed one is unpacked. Raises UserError."""
    file.seek(0)
    start = file.read(len(XZ))
    file.seek(0)
    if not start.startswith((GZIP, BZIP2, XZ)):
        yield _entries(file.fileno(), source)
        return
    with tempfile.TemporaryFile(dir=folder) as plain:
        _unpack(file, start, plain, source)
        yield _entries(plain.fileno(), source)


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _unpack(file: BinaryIO, start: bytes, plain: BinaryIO, source: Path) -> None:
    """Write what comes out of the decompressor to `plain`. Raises UserError where it is damaged, too much or not a tar."""
    budget, chunks, unpacked_bytes = Budget(source), _chunks(file, start, source), 0
    while True:
        with faults(source):  # not around the write: a full disk is no damage
            chunk = next(chunks, b"")
        if not chunk:
            break
        if not unpacked_bytes and not _is_header(chunk[:BLOCK_BYTES]):
            raise UserError(f"{source} is not a zip or a tar, only packed like one", hint="give a zip or a tar of photos, or the folder they are in")
        unpacked_bytes += len(chunk)
        budget.take(len(chunk))
        check_ratio(str(source), unpacked_bytes, file.tell())
        plain.write(chunk)
    plain.flush()


def _chunks(file: BinaryIO, start: bytes, source: Path) -> Iterator[bytes]:
    """What is packed in a file, in pieces of at most CHUNK_BYTES."""
    if start.startswith(XZ):
        yield from _xz_chunks(file, source)
        return
    with gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else bz2.BZ2File(file) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _xz_chunks(file: BinaryIO, source: Path) -> Iterator[bytes]:
    # LZMAFile sets no limit to the memory that a header asks for.
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
    while not decompressor.eof:
        packed = file.read(CHUNK_BYTES) if decompressor.needs_input else b""
        if decompressor.needs_input and not packed:
            raise EOFError
        try:
            chunk = decompressor.decompress(packed, CHUNK_BYTES)
        except lzma.LZMAError as error:
            if "Memory usage limit" not in str(error):
                raise
            raise UserError(f"{source} takes over {size_text(XZ_MEMORY_BYTES)} of memory to unpack, which is the limit", hint=GIVE_FOLDER) from error
        if chunk:
            yield chunk


class _Headers(io.FileIO):
    """The tar's file while its headers are read. Refuses reads that no honest header needs, by which tarfile would fill memory."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, closefd=False)
        self.left_bytes = HEADERS_BYTES_LIMIT

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES_LIMIT:
            raise tarfile.ReadError("a header of impossible size")
        self.left_bytes -= size
        if self.left_bytes < 0:
            raise tarfile.ReadError("too many headers")
        return super().read(size) or b""


def _entries(descriptor: int, source: Path) -> list[Entry]:
    budget = Budget(source)
    with faults(source, "its table of contents"):
        found = members(descriptor, source)
    files = [member for member in found if not member.isdir() and not is_system_file(member.name)]
    return [Entry(member.name, partial(_read_member, descriptor, member, budget)) for member in files]


def members(descriptor: int, source: Path) -> list[tarfile.TarInfo]:
    """All members of a plain tar. Raises UserError where there are too many, and one of ARCHIVE_FAULTS where the tar is damaged."""
    with _Headers(descriptor) as file:
        file.seek(0)
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
            members: list[tarfile.TarInfo] = []
            while member := tar.next():
                members.append(member)
                if len(members) > entry.ENTRIES_LIMIT:
                    raise too_many(source)
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            if os.pread(descriptor, BLOCK_BYTES, tar.offset) != bytes(BLOCK_BYTES):
                raise tarfile.ReadError("no end")
            return members


def _read_member(descriptor: int, member: tarfile.TarInfo, budget: Budget) -> bytes:
    if not member.isreg() or stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
        raise LeftOut("is a link or a device, not a file")
    if member.issparse():
        raise LeftOut("is a file with holes, which no photo is")
    name = printable(member.name)
    with faults(budget.source, name):
        return bounded(_Slice(descriptor, member.offset_data, member.size), budget, name)


class _Slice:
    """The bytes of one member."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self.descriptor, self.offset, self.end = descriptor, offset, offset + size

    def read(self, size: int, /) -> bytes:
        chunk = os.pread(self.descriptor, max(0, min(size, self.end - self.offset)), self.offset)
        if not chunk and self.offset < self.end:
            raise EOFError
        self.offset += len(chunk)
        return chunk
