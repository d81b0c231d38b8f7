"""The stages of a run, started by name: this package imports no room, a room's stage is found when it is wanted.

A stage of a big model is a process of its own, so that its exit frees the GPU; a model as small as mini runs all
stages in this process, since importing torch and diffusers costs more than the work.
"""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lorabooth import last_words
from lorabooth.errors import StageFailed, UserError
from lorabooth.imports import heavy_imports
from lorabooth.launched import APART, FROM_TERMINALS, Launched
from lorabooth.notes import note
from lorabooth.runs import RunDir
from lorabooth.signals import ENDING, passed_on

STAGES = {
    "caption": ("captioning.caption", "run", ("captioning",)),
    "encode": ("train.encode", "run", ("train", "encode")),
    "fit": ("train.fit", "run", ("train", "fit")),
    "export": ("train.export", "run", ("train", "export")),
}
"""Stage -> module, function, and the words after `python -m`."""


def run_stage(name: str, run_dir: RunDir, launch: str = "") -> None:
    """Run one stage of a run to its end. Raises what the stage raises, or StageFailed where it was a process.

    launch: what starts the training stage in place of this Python, such as `accelerate launch --num_processes 2`.
    """
    with _timed(name, run_dir):
        _run(name, run_dir, launch)


@contextmanager
def _timed(name: str, run_dir: RunDir) -> Iterator[None]:
    """Add the time that a stage takes to those of the run; each session of one that was interrupted counts."""
    start = time.monotonic()
    try:
        yield
    finally:
        times = seconds_of(run_dir)
        with suppress(OSError, UserError):  # a full disk, or a run that was moved away: what the stage said of it counts
            run_dir.write_json("timings.json", times | {name: round(times.get(name, 0) + time.monotonic() - start, 1)})


def seconds_of(run_dir: RunDir) -> dict[str, float]:
    """What each stage of a run has taken so far. Nobody depends on it: where it is damaged it begins anew."""
    with suppress(UserError):
        return {name: float(value) for name, value in (run_dir.read_json("timings.json") or {}).items() if isinstance(value, float | int)}
    return {}


def check_launch(launch: str) -> None:
    """Refuse a --launch that cannot start anything, before the photos are read."""
    try:
        words = shlex.split(launch)
    except ValueError:
        raise UserError(f"--launch {launch}: a quote in it is not closed", hint="it must be a command, such as 'accelerate launch'") from None
    if words and not shutil.which(words[0]):
        raise UserError(f"--launch {launch}: there is no command {words[0]}", hint="it must be one that is installed, such as 'accelerate launch'")


def _run(name: str, run_dir: RunDir, launch: str) -> None:
    module, function, words = STAGES[name]
    launch = launch if name == "fit" else ""
    if run_dir.config.model == "mini" and not launch:
        stage = load(module, function)
        if name == "caption":
            for line in stage(run_dir.path):
                note(line)
        else:
            stage(run_dir)
        return
    starter, work = shlex.split(launch) or [sys.executable], ["-m", *words, str(run_dir.path)]
    # torchrun and accelerate kill what has not ended half a minute after a SIGTERM; a step and a checkpoint may take longer.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"} | os.environ
    if launch:
        last_words.forget(run_dir.path)
        environment |= last_words.environment(run_dir.path)
    process: subprocess.Popen[bytes] | None = None
    launched: Launched | None = None
    asked: list[int] = []

    def pass_on(number: int, _: FrameType | None = None) -> None:
        asked.append(number)
        if launched:
            launched.stop(number)
        elif process:
            process.send_signal(passed_on(number))

    # Unlike Ctrl-C, what kill and docker stop send reaches this process only; without passing it on the stage would be an orphan. A launcher's group is not the
    # terminal's, so that Ctrl-C does not reach it either. All before it is started: what comes meanwhile is passed on afterwards.
    before = {number: signal.getsignal(number) for number in (*ENDING, *(FROM_TERMINALS if launch else ()))}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup's
            signal.signal(number, pass_on)
    try:
        process = _start([*starter, *work], environment, name, launch)
        launched = Launched(process, work, run_dir) if launch else None
        for number in asked.copy():
            pass_on(number)
        code = launched.wait() if launched else process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the stage as well; it saves its state first.
        if process:
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if launched:
        return launched.raise_end(name, code)
    # Where Ctrl-C meets an `exec` of text (making a dataclass), `python -m` ends by the signal itself, whatever it returns.
    if code in (130, -signal.SIGINT, *(-number for number in ENDING)) or (code and asked):
        raise KeyboardInterrupt
    if code:
        raise StageFailed(name, code)


def _start(command: list[str], environment: dict[str, str], name: str, launch: str) -> subprocess.Popen[bytes]:
    # What a stage prints is for who runs it by hand; here it would stand in the answer of --json. Export's path is known, and a closed pipe must not end it.
    stdout = subprocess.DEVNULL if name == "export" else 2
    try:
        return subprocess.Popen(command, env=environment, stdout=stdout, **(APART if launch else {}))
    except OSError as error:
        raise UserError(f"--launch {launch}: {error.strerror or error}", hint="it must be a command that is installed, such as 'accelerate launch'") from None


def load(module: str, attribute: str) -> Callable[..., Any]:
    """A function of a room, by name."""
    with heavy_imports():
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
