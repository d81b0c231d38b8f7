"""What a user is told beside the result: lines on standard error, above a progress bar where there is one."""

import sys

from lorabooth.errors import one_line


def say(line: str) -> None:
    """Print a line, or several."""
    from tqdm import tqdm  # here, so that it reads the settings that lorabooth.cli makes

    tqdm.write(line, file=sys.stderr)


def note(text: str) -> None:
    """Print a remark on one line; what files of strangers say may be in it."""
    say(f"note: {one_line(text)}")
