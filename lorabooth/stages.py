"""The stages of a run, started by name: this package imports no room, a room's stage is found when it is wanted.

A stage of a big model is a process of its own, so that its exit frees the GPU; a model as small as mini runs all
stages in this process, since importing torch and diffusers costs more than the work.
"""

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from lorabooth.errors import StageFailed
from lorabooth.runs import RunDir

STAGES = {
    "caption": ("captioning.caption", "run", ("captioning",)),
    "encode": ("train.encode", "run", ("train", "encode")),
    "fit": ("train.fit", "run", ("train", "fit")),
    "export": ("train.export", "run", ("train", "export")),
}
"""Stage -> module, function, and the words after `python -m`."""


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
    # Unlike Ctrl-C, a SIGTERM (kill, docker stop) reaches this process only; without passing it on the stage would be an orphan.
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the stage as well; it saves its state first.
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    # Where Ctrl-C meets an `exec` of text (making a dataclass), `python -m` ends by the signal itself, whatever it returns.
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        raise StageFailed(name, code)


def load(module: str, attribute: str) -> Callable[..., Any]:
    """A function of a room, by name."""
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
