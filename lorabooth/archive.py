"""What is in a zip, a tar or a folder of photos: the kind is told by content, never by name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lorabooth import entry, tars, zips
from lorabooth.entry import Budget, Entry, LeftOut, bounded, is_system_file, size_text, too_many
from lorabooth.errors import UserError

GIVE = "give a zip, a tar or a folder of photos"


def check_kind(source: Path) -> None:
    """Refuse what is not there, and what is neither a file nor a folder: a pipe can be read once, a device for ever."""
    if not source.exists():
        raise UserError(f"no such file or folder: {source}", hint=GIVE)
    if not source.is_file() and not source.is_dir():
        raise UserError(f"{source} is neither a file nor a folder", hint=GIVE)


@contextmanager
def entries(source: Path, leave_out: Path) -> Iterator[list[Entry]]:
    """The files of a zip, a tar (packed or not) or a folder (with its subfolders, except `leave_out` and finished runs).

    What systems add, such as __MACOSX and hidden files, is not among them. The entries can be read inside the `with`.
    A packed tar is unpacked to a file without a name on the disk of `leave_out`, where that exists.
    Raises UserError where the source is missing, of another kind, damaged, encrypted or over a limit.
    """
    check_kind(source)
    if source.is_dir():
        yield _folder_entries(source, leave_out.resolve())
    else:
        with source.open("rb", buffering=0) as file, _file_entries(file, source, leave_out) as found:
            yield found


@contextmanager
def _file_entries(file: BinaryIO, source: Path, leave_out: Path) -> Iterator[list[Entry]]:
    if os.fstat(file.fileno()).st_size > entry.ARCHIVE_BYTES_LIMIT:
        raise UserError(f"{source} is over {size_text(entry.ARCHIVE_BYTES_LIMIT)}, which is the limit", hint="zip only the 10-50 best photos")
    start = file.read(tars.BLOCK_BYTES)
    # A zip by its start, then a tar, then a zip by its end: a tar may end with a zip, and an empty zip has no entry to start with.
    if not start.startswith(zips.START) and tars.is_tar(start):
        with tars.opened(file, source, leave_out if leave_out.is_dir() else None) as found:
            yield found
    elif start.startswith(zips.START) or zips.has_end(file, source):
        with zips.opened(file, source) as found:
            yield found
    else:
        raise UserError(f"{source} is not a zip or a tar", hint="give a zip or a tar of photos, or the folder they are in")


def _folder_entries(source: Path, leave_out: Path) -> list[Entry]:
    budget = Budget(source)
    found: list[Entry] = []

    def left_out(folder: Path, reason: str) -> None:
        found.append(Entry(folder.relative_to(source).as_posix(), partial(_refuse, reason)))

    for folder, subfolders, files in os.walk(source, onerror=lambda error: left_out(Path(error.filename), f"cannot be read ({error.strerror})")):
        # A run lies inside the photos with `lorabooth train .`; its pictures are copies of ours.
        subfolders[:] = [name for name in subfolders if not is_system_file(name) and not _is_run(Path(folder, name), leave_out)]
        for linked in [name for name in subfolders if os.path.islink(Path(folder, name))]:
            left_out(Path(folder, linked), "is a link to a folder, which is not followed")
        paths = [Path(folder, name) for name in files if not is_system_file(name)]
        found += [Entry(path.relative_to(source).as_posix(), partial(_read_file, path, budget)) for path in paths]
        if len(found) > entry.ENTRIES_LIMIT:
            raise too_many(source)
    return found


def _refuse(reason: str) -> bytes:
    raise LeftOut(reason)


def _is_run(folder: Path, leave_out: Path) -> bool:
    return os.path.exists(folder / "manifest.jsonl") or folder.resolve() == leave_out  # also where it may not be looked into


def _read_file(path: Path, budget: Budget) -> bytes:
    try:
        # A pipe would wait for a writer, and a device has no end.
        if not path.is_file():
            raise LeftOut("is not a regular file")
        with path.open("rb") as stream:
            return bounded(stream, budget, path.name)
    except OSError as error:
        raise LeftOut(f"cannot be read ({error.strerror})") from error
