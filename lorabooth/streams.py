"""Standard output and error: what is said on the latter must not end the work that it is about."""

import io
import os
import sys
from typing import TextIO

BAR_SECONDS = "30"
"""Between redraws of a bar where nobody watches: a log file would otherwise get ten a second, all in one line."""

NUMBERS = {"NCOLS": int, "NROWS": int, "MININTERVAL": float, "MAXINTERVAL": float, "MINITERS": float, "DELAY": float, "SMOOTHING": float}
"""What tqdm's variables must be; its import fails at others."""


class _Muting(io.FileIO):
    """A file that can no longer be written (its reader is gone, the disk full, the terminal closed) becomes the null device, for programs started later too."""

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data) or len(data)  # None where a slow reader of a pipe that does not block has not made room
        except OSError:
            _mute(self.fileno())
            return len(data)


def _mute(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def let_go(stream: TextIO | None) -> None:
    """Drop what a stream still holds and cannot write: Python would try again at its end, complain, and end with a code of its own (120)."""
    if stream is not None:
        try:
            stream.flush()
        except OSError:
            _mute(stream.fileno())


def open_streams() -> None:
    """Standard streams that can be written to. The numbers of those that were closed before the start would go to the next files that are opened, and what is
    said to them; a path that is no text in the terminal's encoding must not end a command whose work is done, nor must a standard error that fails: `tee` dies
    of the same Ctrl-C before the training has saved its state."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is sys.__stderr__:  # None where it was closed; a test puts another in its place
        encoding = sys.stderr.encoding if sys.stderr else None
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Muting(2, "w", closefd=False)), encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def set_up_bars() -> None:
    """Progress bars for a terminal or a log file, by the variables that tqdm reads when it is imported; the user's own win, where tqdm can read them."""
    for name, number in NUMBERS.items():
        try:
            number(os.environ.get(f"TQDM_{name}", "0"))
        except ValueError:
            del os.environ[f"TQDM_{name}"]
    if not sys.stderr.isatty():
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(name, BAR_SECONDS)
