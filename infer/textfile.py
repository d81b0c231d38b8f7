"""Text files of users with one thing a line: prompts, choices."""

from collections.abc import Iterator
from pathlib import Path

from lorabooth.errors import UserError
from lorabooth.reading import read_limited

BYTES_LIMIT = 4 << 20


def lines_of(file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """The lines that say something and their numbers: not blank ones, nor those that begin with #. At least one, at most `limit`."""
    try:
        text = read_limited(file, BYTES_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 (byte {error.start + 1})", hint="save it again as UTF-8") from None
    found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{file} has no line that says something; blank ones and those that begin with # do not count")
    if len(found) > limit:
        raise UserError(f"{file} has {len(found):,} lines; the limit is {limit:,}")
    yield from found
