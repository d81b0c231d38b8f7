"""Text files of users with one thing a line: prompts, choices."""

from collections.abc import Iterator
from pathlib import Path

from lorabooth.errors import UserError

BYTES_LIMIT = 4_000_000


def lines_of(file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """The lines that say something and their numbers: not blank ones, nor those that begin with #. At least one, at most `limit`."""
    try:
        if file.stat().st_size > BYTES_LIMIT:
            raise UserError(f"{file} is larger than {BYTES_LIMIT // 1_000_000} MB; it should be text with one line each")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {file}") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, not a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 (byte {error.start + 1})", hint="save it again as UTF-8") from None
    found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{file} has no line that says something; blank ones and those that begin with # do not count")
    if len(found) > limit:
        raise UserError(f"{file} has {len(found):,} lines; the limit is {limit:,}")
    yield from found
