"""The user's own folders. A container may run programs as a user that has none."""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """A path with the home folder for a leading ~ or ~user; as it is where there is no such folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder(name: str) -> Path:
    """`lorabooth/<name>` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache. Where it is not there, nor can be made, in a folder of this user's among
    those for temporary files."""
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lorabooth" / name
    with suppress(OSError):
        if folder.is_absolute():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return folder
    return _temporary() / "lorabooth" / name


def _temporary() -> Path:
    """A folder that is the user's alone; where somebody else has made that of this name, as anybody may there, one that lasts no longer than the process."""
    own = Path(tempfile.gettempdir()) / f"lorabooth-{os.getuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    found = own.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return own
    return _of_this_process()


@cache
def _of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix="lorabooth-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
