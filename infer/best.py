"""Best of N: several pictures are drawn, and the ones most like the training photos are kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from infer.engine import Output
from infer.likeness import Likeness
from infer.request import Request
from lorabooth.errors import UserError

LIMIT = 64
"""As of the pictures of one request."""
NOTHING_TO_COMPARE = UserError(
    "--best-of has no photos to compare with: no LoRA here lies in its run's folder",
    hint="give photos of the person with --like FOLDER, or the run they were trained in with --like RUN",
)


@dataclass(frozen=True)
class Scored:
    """A picture, the request it was drawn for, and how like the photos it is."""

    request: Request
    output: Output
    score: float


def check(best_of: int, num_outputs: int) -> None:
    """A UserError where there would be nothing to choose."""
    if not num_outputs < best_of <= LIMIT:
        raise UserError(f"--best-of is {best_of}; it must lie above --num-outputs, which is {num_outputs}, and at most at {LIMIT}")


def ranked(drawn: Iterable[tuple[Request, Output]], group: int, likeness: Likeness) -> Iterator[list[Scored]]:
    """Each `group` pictures in the order they come, the most like first; of equals, the first."""
    scored: list[Scored] = []
    for request, output in drawn:
        scored.append(Scored(request, output, likeness.picture(output.image)))
        if len(scored) == group:
            yield sorted(scored, key=lambda one: -one.score)
            scored = []
    assert not scored, "a prompt has as many pictures as were asked for"


def table(rows: Sequence[Scored], keep: int, name: str) -> str:
    """The scores of one prompt's pictures for the terminal, those kept with a mark."""
    lines = [f"likeness ({name}) of {len(rows)} pictures; {keep} kept"]
    lines += [f"  {'*' if i < keep else ' '} seed {row.output.seed:<10}  {row.score:.3f}" for i, row in enumerate(rows)]
    return "\n".join(lines)
