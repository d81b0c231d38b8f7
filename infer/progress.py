"""Progress bars over the steps of pictures."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called after each denoising step: steps done, steps in all."""


def advancing(bar: "tqdm[Any]") -> Progress:
    """What moves a bar on by the steps of one piece of work, from where it stands."""
    before = bar.n

    def advance(done: int, _: int) -> None:
        bar.update(before + done - bar.n)

    return advance


def part_of(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """The progress of one of several equal parts, told as that of the whole."""
    return (lambda done, total: progress(part * total + done, parts * total)) if progress else None
