"""Stopping a training where it can go on from: after a whole step, and all processes after the same one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from lorabooth.signals import ENDING


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Ctrl-C and the signals that ask to end become entries of the list, so that the step at hand is finished and saved first."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in (signal.SIGINT, *ENDING) if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agreement:
    """Whether any process wants to stop: all must at the same step, or the others would wait for ever.

    Each step's question is answered at the next one. So a GPU is waited for until the end of the step before, not of the step at hand.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def reached(self, wanted: bool) -> bool:
        """Called by every process after each step; wanted: whether this one wants to stop. The same answer in all."""
        if self.accelerator.num_processes == 1:
            return wanted
        before, device = self._asked, self.accelerator.device
        flags = self.accelerator.reduce(torch.full((), float(wanted), device=device), "sum").to("cpu", non_blocking=True)
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._asked = flags, event
        if before is None:
            return False
        if before[1]:
            before[1].synchronize()
        return bool(before[0].item())
