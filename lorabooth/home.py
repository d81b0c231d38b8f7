"""The user's own folders. A container may run programs as a user that has none."""

import errno
import os
import tempfile
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """A path with the home folder for a leading ~ or ~user; as it is where there is no such folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder(name: str) -> Path:
    """`lorabooth/<name>` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache.

    For a user without a home it is in the folder for temporary files, where everybody may make folders: an OSError where somebody else has made this one.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return expanded(given) / "lorabooth" / name
    below = expanded("~/.cache")
    if not below.is_absolute():
        below = Path(tempfile.gettempdir()) / f"lorabooth-{os.getuid()}"
        below.mkdir(mode=0o700, exist_ok=True)
        if below.stat().st_uid != os.getuid():
            raise OSError(errno.EACCES, "it belongs to another user", str(below))
    return below / "lorabooth" / name
