"""`python -m train encode|fit|export RUN`: one stage of a run, in a process of its own. `check` reads a recipe (JSON) and says whether it fits."""

import os
import sys
from pathlib import Path

from lorabooth import last_words, stages
from lorabooth.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, guarded
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError, one_line
from lorabooth.notes import say
from lorabooth.runs import RunDir
from train.ranks import check_meeting


def main(arguments: list[str]) -> int | None:
    """Run the stage named by the first argument on the run named by the second; an exit code where it did not end well and has said why."""
    if arguments == ["check"]:
        stages.load("train.export", "check_plan")(TrainConfig.model_validate_json(sys.stdin.read()))
        return None
    raw = arguments[:1] == ["export"] and "--raw" in arguments
    words = [word for word in arguments if not (raw and word == "--raw")]
    if len(words) != 2 or words[0] not in ("encode", "fit", "export"):
        raise UserError("usage: python -m train encode|fit|export RUN, or python -m train export RUN --raw for the weights without averaging")
    stage, folder = words
    run_dir = RunDir.open(Path(folder))
    if stage == "fit":
        check_meeting()
    run = stages.load(f"train.{stage}", "run")
    if stage == "export":
        print(run(run_dir, raw))
        return None
    try:
        run(run_dir)
    except RuntimeError as error:
        if not stages.load("train.several", "lost_others")(error):
            raise
        said = str(error).strip().splitlines()[0]
        say(f"lorabooth: another process of this training has ended, or cannot be reached; the last checkpoint is kept ({one_line(said)})")
        return 1
    return None


def process(arguments: list[str]) -> int:
    """The exit code of this process, for a launcher too."""
    code = None
    try:
        code = guarded(main, arguments)
    finally:
        if code is None:  # a fault of the program: its traceback comes next, and no other words are needed
            last_words.leave("", "", 1)
    # Where no other process has to be ended, the launcher need not know: it would only print a traceback of its own.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return 0 if alone and code in (EXIT_USER_ERROR, EXIT_INTERRUPTED) and last_words.left() else code


if __name__ == "__main__":
    sys.exit(process(sys.argv[1:]))
