"""Names for what is written aside until it is whole, and what becomes of it when its writer was killed."""

import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

LEFT_SECONDS = 24 * 3600
"""Nobody takes so long for a file: whatever machine a part was written on, its writer is gone."""

STEM_BYTES = 80
"""Of the file's own name: with what follows it still fits where 143 bytes are the limit (eCryptfs), however long the file's may be."""


def part_of(file: Path) -> Path:
    """Where this thread writes `file` until it is whole."""
    stem = os.fsencode(file.name)[:STEM_BYTES].decode(errors="ignore")
    return file.with_name(f".{stem}.{_place()}-{os.getpid()}-{threading.get_native_id()}.part")


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Have an OSError name what was to be written: where there is no room it names nothing, and a temporary file or folder is nobody's."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM if error.filename is None else temporary and Path(error.filename).is_relative_to(temporary):
            error.filename = str(path)
        raise


@cache
def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder; once in the life of a process, for it looks at every name. A part of a writer that lives stays: on this
    machine its process tells, and of another one only what is old goes."""
    try:
        names = os.listdir(folder)
    except OSError:  # a folder that may be written to and not read
        return
    for name in names:
        match = re.fullmatch(r"\..*\.([0-9a-f]{16})-(\d{1,9})-\d+\.part", name, re.DOTALL)
        if match and _left(folder / name, match[1], int(match[2])):
            with suppress(OSError):  # another process was first, or it is another user's
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def _left(part: Path, place: str, process: int) -> bool:
    """Whether the writer of a part is gone for certain."""
    if place != _place():
        try:
            return time.time() - part.lstat().st_mtime > LEFT_SECONDS
        except OSError:
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        pass
    return False


@cache
def _place() -> str:
    """Where a process is known by its number: since this start of the machine, among the processes that this one sees, which a container has of its own."""
    try:
        boot, seen = Path("/proc/sys/kernel/random/boot_id").read_text()[:8], os.stat("/proc/self/ns/pid").st_ino
        return f"{boot}{seen % (1 << 32):08x}"
    except OSError:  # no /proc: then nobody is told from others
        return secrets.token_hex(8)
