"""The stages of a run, started by name: this package imports no room, a room's stage is found when it is wanted.

A stage of a big model is a process of its own, so that its exit frees the GPU; a model as small as mini runs all
stages in this process, since importing torch and diffusers costs more than the work.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from lorabooth.runs import RunDir

STAGES = {
    "caption": ("captioning.caption", "run", ("captioning",)),
    "encode": ("train.encode", "run", ("train", "encode")),
    "fit": ("train.fit", "run", ("train", "fit")),
    "export": ("train.export", "run", ("train", "export")),
}
"""Stage -> module, function, and the words after `python -m`."""


class StageFailed(Exception):
    """A stage's process ended with this exit code; it has already said why."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


def run_stage(name: str, run_dir: RunDir) -> None:
    """Run one stage of a run to its end. Raises what the stage raises, or StageFailed where it was a process."""
    module, function, words = STAGES[name]
    if run_dir.config.model == "mini":
        stage = load(module, function)
        if name == "caption":
            for note in stage(run_dir.path):
                print(f"note: {note}", file=sys.stderr)
        else:
            stage(run_dir)
        return
    process = subprocess.Popen([sys.executable, "-m", words[0], *words[1:], str(run_dir.path)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the stage as well; it saves its state first.
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise StageFailed(code)


def load(module: str, attribute: str) -> Callable[..., Any]:
    """A function of a room, by name."""
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
