"""Files that a user names, read up to a limit: what is named may be a pipe, a device, or the wrong one of a hundred gigabytes."""

from pathlib import Path

from lorabooth.entry import size_text
from lorabooth.errors import UserError


def read_limited(file: Path, limit_bytes: int) -> bytes:
    """The content of a file or pipe; a UserError where there is none, or more than the limit, of which no more is read."""
    try:
        with file.open("rb") as opened:
            data = opened.read(limit_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, not a file") from None
    if len(data) > limit_bytes:
        raise UserError(f"{file} is over {size_text(limit_bytes)}, which is the limit")
    return data
