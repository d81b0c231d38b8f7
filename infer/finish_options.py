"""The options of `generate` that say what is done with its pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from lorabooth.arguments import Location

FACES_LIMIT = 8
"""Faces of a picture that are redrawn, at most."""


@dataclass(frozen=True)
class FinishOptions:
    """The options of a command that say what is done with its pictures."""

    detail: str | None = None
    detail_prompt: str | None = None
    detail_faces: int | None = None
    best_of: int | None = None
    like: Path | None = None


def finish_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add those options to a command, which gets them as `finish_options`."""

    @wraps(command)
    def gathered(
        *arguments: Any, detail: str | None, detail_prompt: str | None, detail_faces: int | None, best_of: int | None, like: Path | None, **others: Any
    ) -> None:
        command(*arguments, finish_options=FinishOptions(detail, detail_prompt, detail_faces, best_of, like), **others)

    strengths = "face, or with a strength: face:subtle, face:normal, face:strong, face:0.35"
    added = (
        click.option("--detail", metavar="face[:STRENGTH]", help=f"Redraw small faces with the LoRA, at full size: {strengths}."),
        click.option("--detail-prompt", metavar="TEXT", help="What to draw there. [default: a close-up of the LoRA's person, and PROMPT]"),
        click.option("--detail-faces", type=int, help="Faces a picture to redraw; each becomes the LoRA's person. [default: 1]"),
        click.option("--best-of", type=int, metavar="N", help="Draw N pictures a prompt and keep the -n most like the photos."),
        click.option("--like", type=Location(), metavar="RUN|FOLDER", help="Photos to compare with. [default: those of the LoRA's run]"),
    )
    for option in reversed(added):
        option(gathered)
    return gathered
