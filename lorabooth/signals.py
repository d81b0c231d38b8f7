"""The signals that ask a program to end; Ctrl-C's apart, for Python raises that itself."""

import signal

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""kill and docker stop; a terminal that was closed; and what clusters and submitit send some time before a job's is over."""


def passed_on(number: int) -> int:
    """What to send a launcher in place of a signal: srun and torchrun pass on, or die of, those that are for a user; all know SIGTERM."""
    return number if number in (signal.SIGTERM, signal.SIGHUP) else signal.SIGTERM
