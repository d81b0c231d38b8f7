"""`python -m train encode|fit|export RUN`: one stage of a run, in a process of its own."""

import sys
from pathlib import Path

from lorabooth.cli import guarded
from lorabooth.errors import UserError
from lorabooth.runs import RunDir


def main(arguments: list[str]) -> None:
    """Run the stage named by the first argument on the run named by the second."""
    if len(arguments) != 2 or arguments[0] not in ("encode", "fit", "export"):
        raise UserError("usage: python -m train encode|fit|export RUN")
    stage, folder = arguments
    run_dir = RunDir.open(Path(folder))
    if stage == "encode":
        from train import encode

        encode.run(run_dir)
    elif stage == "fit":
        from train import fit

        fit.run(run_dir)
    else:
        from train import export

        print(export.run(run_dir))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
