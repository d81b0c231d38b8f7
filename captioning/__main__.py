"""`python -m captioning RUN`: write the captions that a run's photos still lack."""

import sys
from pathlib import Path

from captioning.caption import run
from lorabooth.cli import guarded
from lorabooth.errors import UserError


def main(arguments: list[str]) -> None:
    """Caption the photos of the run named by the only argument."""
    if len(arguments) != 1:
        raise UserError("usage: python -m captioning RUN")
    for note in run(Path(arguments[0])):
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
