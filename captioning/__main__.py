"""`python -m captioning RUN`: write the captions that a run's photos still lack."""

import sys
from pathlib import Path

from lorabooth.cli import guarded
from lorabooth.errors import UserError
from lorabooth.notes import note


def main(arguments: list[str]) -> None:
    """Caption the photos of the run named by the only argument."""
    if len(arguments) != 1:
        raise UserError("usage: python -m captioning RUN")
    from captioning.caption import run  # here, so that tqdm reads the settings of `guarded`

    for line in run(Path(arguments[0])):
        note(line)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
