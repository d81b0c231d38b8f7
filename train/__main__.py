"""`python -m train encode|fit|export RUN`: one stage of a run, in a process of its own. `check` reads a recipe (JSON) and says whether it fits."""

import sys
from pathlib import Path

from lorabooth import stages
from lorabooth.cli import guarded
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.runs import RunDir
from train.ranks import check_meeting


def main(arguments: list[str]) -> None:
    """Run the stage named by the first argument on the run named by the second."""
    if arguments == ["check"]:
        stages.load("train.export", "check_plan")(TrainConfig.model_validate_json(sys.stdin.read()))
        return
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
    else:
        run(run_dir)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
