"""What a user sees instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

FULL = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "cublasCreate", "unable to find an engine")
"""What the messages say: CUDA's and Triton's; cuBLAS's; cuDNN's since version 9; cuBLAS's where it has no room to begin; cuDNN's again, which leaves out each
kernel that has no room until none is left."""


class UserError(Exception):
    """A problem the user can solve. `message` says what is wrong and the limit, `hint` how to go on.

    The command line prints both on standard error and exits with code 2; the server answers 4xx. Both are one line each: control
    characters, which names in files of strangers may hold, become question marks.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = one_line(message)
        self.hint = one_line(hint)

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


def one_line(text: str) -> str:
    """A text with question marks for what is not to be printed: line ends, control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def is_utf8(text: str) -> bool:
    """Whether a text came from bytes in UTF-8; others Python passes on as half characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out. torch has a type for its own allocator only, and known by its name here, for nothing here imports torch; what the
    libraries below it ask for beside that fails as some RuntimeError."""
    return isinstance(error, RuntimeError) and (type(error).__name__ == "OutOfMemoryError" or any(sign in str(error) for sign in FULL))


@contextmanager
def unless_out_of_memory() -> Iterator[None]:
    """Leave the block where a GPU's memory runs out in it; what comes behind it is done when the exception's frames, and what they held, are gone."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise


class StageFailed(Exception):
    """A stage's process ended with this exit code (negative: killed by that signal); it has already said why."""

    def __init__(self, stage: str, code: int):
        super().__init__(f"the stage {stage} ended with exit code {code}")
        self.code = code
