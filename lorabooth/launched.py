"""A stage that a launcher of several processes starts (accelerate, torchrun, srun), and how it is stopped.

The launcher gets a process group of its own, so that a terminal's Ctrl-C comes to `lorabooth train` alone, which passes it on: to the processes that train,
where they are on this machine, past the launcher. For accelerate's launcher of one process dies of a SIGTERM and leaves them behind, and torchrun prints a
traceback.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

import psutil

from lorabooth import last_words
from lorabooth.errors import StageFailed, UserError
from lorabooth.notes import note, say
from lorabooth.runs import RunDir
from lorabooth.signals import ENDING, passed_on

# Nobody asks anything, and to read from the terminal would stop a group that is in the background.
APART: dict[str, Any] = {"process_group": 0, "stdin": subprocess.DEVNULL}
FROM_TERMINALS = (signal.SIGINT, signal.SIGQUIT)
UNTRAINED_SECONDS = 10
"""How long a launcher may take to end where no step can be lost: it may wait for another machine, and sees no signal then."""
SAVING_SECONDS = 60
"""How long what was trained may take to be saved when the launcher has ended already."""


class Launched:
    """A launcher at work on a stage of a run. stage: the last words of its command, `-m train fit RUN`."""

    def __init__(self, launcher: subprocess.Popen[Any], stage: list[str], run_dir: RunDir):
        self.launcher, self.stage, self.run = launcher, stage, run_dir
        self.asked: list[int] = []
        self._end = 0.0
        self._metrics_bytes = self._size()

    def stop(self, number: int) -> None:
        """Ask the stage to end; kill it where Ctrl-C comes after another request, or Ctrl-\\."""
        at_once = number == signal.SIGQUIT or (number == signal.SIGINT and bool(self.asked))
        self.asked.append(number)
        if at_once:
            return self._kill()
        if len(self.asked) == 1:
            with suppress(OSError):  # the terminal was closed
                say("stopping after the step at hand; Ctrl-C once more kills it")
            self._end = time.monotonic() + UNTRAINED_SECONDS
        below = self._below()
        for process in [one for one in below if self._trains(one)] or below[:1]:
            with suppress(psutil.Error):
                process.send_signal(passed_on(number))

    def wait(self) -> int:
        """The launcher's exit code, once nobody works on the run any more."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = self.launcher.wait(0.5)
                break
            if self.asked and time.monotonic() > self._end and self._size() == self._metrics_bytes:
                self._kill()
        if code or self.asked:
            self._wait_for_lock()
        return code

    def raise_end(self, name: str, code: int) -> None:
        """Raise why the stage ended, where it did not reach its end."""
        self.run.check_there()
        if words := last_words.take(self.run.path):
            last_words.raise_them(words)
            raise StageFailed(name, code or words.code)
        # Before the first step there are no last words: a signal's own code, and what shells and srun make of it. torchrun makes it 1.
        if code in (130, -signal.SIGINT, *(-number for number in ENDING), *(128 + number for number in ENDING)) or (code and self.asked):
            raise KeyboardInterrupt
        if code:
            raise UserError(
                f"the launcher of the stage {name} ended with exit code {code}, and none of its processes said why",
                hint="if nothing above says it, memory may have run out: lower the resolution or the batch size; then run the command again",
            )

    def _below(self) -> list[psutil.Process]:
        """The launcher and all that it has started on this machine."""
        with suppress(psutil.Error):
            launcher = psutil.Process(self.launcher.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []

    def _trains(self, process: psutil.Process) -> bool:
        """Whether a process is the stage itself: Python with nothing but options before `-m`."""
        with suppress(psutil.Error):
            words = process.cmdline()
            return words[-len(self.stage) :] == self.stage and all(word.startswith("-") for word in words[1 : -len(self.stage)])
        return False

    def _kill(self) -> None:
        for process in self._below():
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)

    def _size(self) -> int:
        """Of metrics.jsonl, whose first new line comes before the first step."""
        return self.run.metrics.stat().st_size if self.run.metrics.exists() else 0

    def _wait_for_lock(self) -> None:
        end = time.monotonic() + SAVING_SECONDS
        while self.run.there:
            with suppress(UserError), self.run.locked():
                return
            if time.monotonic() > end:
                return note(f"a process of the training still works on {self.run.path}")
            time.sleep(0.2)
