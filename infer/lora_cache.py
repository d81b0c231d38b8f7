"""LoRA files that were downloaded, kept on the disk up to a limit; those used longest ago go first.

    files/<sha256>/<name>.safetensors   each content once, whatever it was asked for by; its mtime is when it was last used
    records/<key>.json                  which content an address gave, with what is needed to ask whether it is still that
    parts/<key>.part, .json, .lora      downloads that broke off or are not taken in yet, what was told of them, and what is being unpacked of a tar
    locks/<key>.get, <sha256>.use       empty; never deleted, since a deleted lock can be held by two

The kernel frees a lock at the death of the process that holds it, whatever killed it.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from lorabooth.errors import UserError
from lorabooth.runs import NO_LOCKS, publish, sha256_file, sync_folder, write_durable

PART_SECONDS = 7 * 24 * 3600
"""What broke off longer ago than this is not gone on with."""


@dataclass(frozen=True)
class Record:
    """What an address gave. `source` is for people: without query, so that no token or signature is kept."""

    source: str
    sha256: str
    etag: str = ""
    modified: str = ""
    fetched_bytes: int = 0
    """Of what was fetched, which is more than the LoRA where that came in a tar."""


class Kept:
    """A cached file that is not deleted while this is held; `release` may be called from anywhere, more than once."""

    def __init__(self, file: Path, descriptor: int | None = None):
        self.file, self._descriptor = file, descriptor

    def release(self) -> None:
        """Let go."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class LoraCache:
    """The folder. Any number of threads and processes may use it at once."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self.read_only = False
        """Whether the folder is there and cannot be written to, so that nothing can be locked, fetched or deleted in it either; `prepare` finds out."""
        self._verified: set[tuple[str, int, int]] = set()
        self.files, self.records, self.parts, self.locks = (folder / name for name in ("files", "records", "parts", "locks"))

    def prepare(self) -> None:
        """Make the folders, for the owner's eyes only: which LoRAs someone uses is nobody else's business."""
        self.read_only = self.folder.is_dir() and not os.access(self.folder, os.W_OK)
        if self.read_only:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.files, self.records, self.parts, self.locks):
            folder.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def fetching(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Hold the right to download what `key` names; yields whether somebody else had it and was waited for, after `waiting` was called."""
        with _locked(self.locks / f"{key}.get", waiting) as waited:
            yield bool(waited)

    def part(self, key: str) -> Path:
        """Where the download of `key` goes until it is whole."""
        return self.parts / f"{key}.part"

    def forget(self, key: str) -> None:
        """Delete what there is of the download of `key`."""
        for suffix in (".part", ".json", ".lora"):
            self.part(key).with_suffix(suffix).unlink(missing_ok=True)

    def record(self, key: str) -> Record | None:
        """What is known of `key`; None where nothing is, or it cannot be read."""
        try:
            return Record(**json.loads((self.records / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, digest: str) -> Kept | None:
        """The file of this content, marked as used just now and in use until released; None where the cache lacks it, or has it damaged."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            return None
        folder = self.files / digest
        if self.read_only:
            return next((Kept(file) for file in sorted(folder.glob("*.safetensors")) if self._is_whole(file, digest)), None)
        descriptor = self._in_use(digest)
        try:
            # Only now: whoever deletes holds the lock meanwhile.
            for file in sorted(folder.glob("*.safetensors")):
                if self._is_whole(file, digest):
                    os.utime(file)
                    return Kept(file, descriptor)
                file.unlink(missing_ok=True)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _in_use(self, digest: str) -> int:
        """The descriptor of a lock that is shared by all who use this content."""
        descriptor = os.open(self.locks / f"{digest}.use", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _is_whole(self, file: Path, digest: str) -> bool:
        """Whether a file is what its folder says, read once in the life of this object: a server uses one LoRA many times."""
        found = file.stat()
        seen = (digest, found.st_ino, found.st_size)
        if seen not in self._verified and sha256_file(file) != digest:
            return False
        self._verified.add(seen)
        return True

    def put(self, key: str, part: Path, digest: str, name: str, record: Record) -> Kept:
        """Take a whole file in under its content, then make room."""
        descriptor = self._in_use(digest)
        try:
            folder = self.files / digest
            folder.mkdir(mode=0o700, exist_ok=True)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            # Before the file: of a record without one the part is found again, a file without a record is not.
            self.point(key, record)
            publish(part, folder / f"{name}.safetensors")
            sync_folder(self.files)
            os.utime(folder / f"{name}.safetensors")
            kept = Kept(sorted(folder.glob("*.safetensors"))[0], descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.forget(key)
        self.make_room()
        return kept

    def point(self, key: str, record: Record) -> None:
        """Write down what an address gave."""
        write_durable(self.records / f"{key}.json", json.dumps(asdict(record), indent=1).encode())

    def make_room(self) -> None:
        """Delete what was used longest ago and is not in use, until the limit is kept; and downloads that nobody went on with."""
        for file in list(self.parts.iterdir()):
            if time.time() - max(_mtime(file), _mtime(self.part(file.stem))) > PART_SECONDS:
                with _locked(self.locks / f"{file.stem}.get", None) as mine:
                    if mine is not None:
                        self.forget(file.stem)
        # One at a time, or two processes would each delete half of what the other counts.
        with _locked(self.locks / "room"):
            found = sorted((_mtime(file), file, _size(file)) for file in self.files.glob("*/*.safetensors"))
            used = sum(size for _, _, size in found) + sum(_size(part) for part in self.parts.iterdir())
            for _, file, size in found:
                if used <= self.limit_bytes:
                    return
                with _locked(self.locks / f"{file.parent.name}.use", None) as mine:
                    if mine is not None:
                        shutil.rmtree(file.parent, ignore_errors=True)
                        used -= size


def key_of(source: str) -> str:
    """The name of a source in the cache; what is secret in an address cannot be read back from it."""
    return sha256(source.encode()).hexdigest()


@contextmanager
def _locked(file: Path, waiting: Callable[[], None] | None = lambda: None) -> Iterator[bool | None]:
    """Hold a lock file alone. Yields whether it had to be waited for, or None where it is held and not waited for (`waiting` is None)."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                yield None
                return
            waiting()
            _flock(descriptor, fcntl.LOCK_EX)
            yield True
        else:
            yield False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError("the disk of the download cache has no file locks", hint="set XDG_CACHE_HOME to a folder on another disk") from None


def _mtime(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
