"""A training run on disk, and writes that survive a power cut.

Order of a durable write: temporary file, fsync, rename, fsync of the folder. Without the last one a rename can be
lost with the power (seen on ext4). A reader therefore finds either the old file or the whole new one.
"""

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.notes import note
from lorabooth.parts import naming, part_of, sweep

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What network disks and FUSE answer that fsync files only."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What disks without flock answer: NFS without its lock service, Lustre mounted without it, some FUSE."""


def write_durable(path: Path, data: bytes, new: bool = False) -> None:
    """Write `data` to `path` whole or not at all; once it returns, a power cut cannot take it back.

    new: a FileExistsError where `path` is there, whichever process made it, and however late.
    """
    with durable_file(path, new) as file:
        file.write(data)


def write_new(path: Path, data: bytes) -> None:
    """The same for a result of the user's: where it is there already, that will do; a UserError where something else is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_durable(path, data, new=True)
    except FileExistsError:
        check_same(path, data)
        note(f"{path} is there already, the same")


def check_same(path: Path, data: bytes) -> None:
    """Refuse a place for a result of the user's where something else is."""
    if (path.exists() or path.is_symlink()) and (not path.is_file() or path.read_bytes() != data):
        raise UserError(f"there is another {path} already", hint="name another file with --out; nothing is overwritten")


@contextmanager
def durable_file(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """The same for what is too large for memory: a file to write to, which gets its name when the block ends without an exception.

    Makes the folder it lies in, but none above that: a run that was moved away meanwhile is not to be begun anew at its old place.
    """
    path.parent.mkdir(exist_ok=True)
    sweep(path.parent)
    temporary = part_of(path)
    try:
        with naming(path, temporary), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with naming(path, temporary):
            (_publish_new if new else publish)(temporary, path)
    except BaseException:  # a full disk, Ctrl-C: leave no litter
        with suppress(OSError):  # a disk that is read-only says so of this, too
            temporary.unlink()
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder into place and fsync the folder that holds it."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def _publish_new(temporary: Path, path: Path) -> None:
    """The same for a file, under a name that is taken in one step; raises FileExistsError where something has it."""
    try:
        os.link(temporary, path)  # with the content, so that no kill leaves an empty file
        temporary.unlink()  # not renamed: of two names of one file, that would leave both
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        path.touch(exist_ok=False)
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """Make a folder and see whether it can be written to, before the work whose results go there; raises the OSError that would come after it.

    A new folder that is still empty when the work fails goes again.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder, folder), tempfile.TemporaryFile(dir=folder):
            pass
        yield
    except BaseException:
        if new:
            with suppress(OSError):
                folder.rmdir()
        raise


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it are on the disk; a disk that cannot do that has what it can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunDir:
    """The folder of one training run: photos/, captions/, cache/, checkpoints/, samples/, metrics.jsonl, lora.safetensors."""

    def __init__(self, path: Path):
        self.path = path
        self.photos = path / "photos"
        self.others = path / "class"
        """Photos of others, with a manifest of their own."""
        self.captions = path / "captions"
        self.cache = path / "cache"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.metrics = path / "metrics.jsonl"
        self.lora = path / "lora.safetensors"
        self.lora_start = path / "lora-start.safetensors"

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> "RunDir":
        """Open the run at `path`, or start it with this recipe. A run that has another recipe is refused, unless nothing has been made with the old one:
        then the new one replaces it."""
        run = cls(path)
        if (path / "config.json").exists():
            old = run.config
            changed = _changes(old, config)
            if old != config and not (changed and run.begun):
                with run.locked():
                    if changed:
                        (path / "check.json").unlink(missing_ok=True)  # the photos are looked at for the new recipe
                    run._write_config(config)
            elif changed:
                raise UserError(
                    f"the run {path} has another recipe: {'; '.join(changed)}",
                    hint="give those values again to go on with it, or start a new run with --out FOLDER",
                )
            return run
        if path.exists() and (not path.is_dir() or any(file.suffix != ".part" for file in path.iterdir())):
            raise UserError(f"{path} exists and is not a lorabooth run", hint="choose another folder with --out FOLDER")
        path.mkdir(parents=True, exist_ok=True)
        run._write_config(config)
        return run

    @property
    def there(self) -> bool:
        """Whether the run is where it was begun, neither moved nor deleted."""
        return (self.path / "config.json").exists()

    @property
    def begun(self) -> bool:
        """Whether something was made of its photos."""
        return any(part.exists() for part in (self.captions, self.cache, self.checkpoints))

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run; a UserError where there is none."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a lorabooth run: it has no config.json", hint="make one with: lorabooth train PHOTOS --trigger-word TOK")
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        """The recipe this run was started with."""
        try:
            return TrainConfig.model_validate_json((self.path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path / 'config.json'} is damaged or of another version", hint="start a new run with --out FOLDER") from error

    def _write_config(self, config: TrainConfig) -> None:
        write_durable(self.path / "config.json", config.model_dump_json(indent=1).encode())

    def write_json(self, name: str, value: Any) -> None:
        """A durable JSON file in the run folder."""
        if not self.path.is_dir():
            raise self._gone()
        write_durable(self.path / name, json.dumps(value, indent=1).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file in the run folder holds, by name; None where it does not exist, a UserError where it is damaged."""
        file = self.path / name
        if not file.exists():
            return None
        with suppress(ValueError):
            content = json.loads(file.read_bytes())
            if isinstance(content, dict):
                return content
        raise UserError(f"{file} is damaged", hint="delete that file, then run the same command again")

    def log(self, **values: float | int | str) -> None:
        """Append one line to metrics.jsonl. A line torn by a kill is skipped by `history`."""
        with naming(self.metrics), self.metrics.open("a+b") as file:
            # A line torn by a kill must not take this one with it.
            torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(values).encode() + b"\n")

    def history(self) -> list[dict[str, Any]]:
        """All metrics, without lines that are damaged; where a resumed run wrote a step twice, the later line counts."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        if self.metrics.exists():
            for line in self.metrics.read_bytes().splitlines():
                with suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("loss", 0.0), float | int):
                        rows[(str(row.get("event", "step")), row["step"])] = row
        return sorted(rows.values(), key=lambda row: int(row["step"]))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. The kernel frees the lock at death, whatever killed the process.

        What fails because the folder was moved or deleted meanwhile becomes a UserError that says so.
        """
        try:
            with (self.path / ".lock").open("w") as file:
                self._lock(file.fileno())
                yield
        except (FileNotFoundError, UserError) as error:
            if self.there:
                raise
            raise self._gone() from error

    def check_there(self) -> None:
        """A UserError where it is no more, before something is written that would begin it anew at its old place."""
        if not self.there:
            raise self._gone()

    def _gone(self) -> UserError:
        return UserError(f"the run folder {self.path} is gone: it was moved or deleted", hint="if it was moved, go on with --out and its new place")

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another lorabooth process is working on {self.path}", hint="wait for it, or stop it, then run the same command again") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"the disk of {self.path} cannot lock files ({error.strerror}), so that two commands could spoil one run",
                hint="choose another place with --out FOLDER, or have that disk mounted with locks (flock)",
            ) from None


def _changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    before, after = old.recipe(), new.recipe()
    return [f"{name} was {before[name]!r} and is now {after[name]!r}" for name in after if before[name] != after[name]]
