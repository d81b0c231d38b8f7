"""The variables by which a launcher tells each of its processes which one it is. Kubernetes and rented containers leave some behind."""

import os

from lorabooth.errors import UserError
from lorabooth.notes import note

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def alone() -> None:
    """For a training of one process: without these variables, by which it would wait for processes that nobody starts."""
    if found := [name for name in RANKS if name in os.environ]:
        note(f"{', '.join(found)} in the environment: not heeded, for this training is one process; --launch starts several")
    for name in (*RANKS, *MEETING):
        os.environ.pop(name, None)


def check_meeting() -> None:
    """Refuse to be one of several processes that have no place to meet."""
    found = [name for name in RANKS if name in os.environ]
    if found and "MASTER_ADDR" not in os.environ:
        raise UserError(f"{', '.join(found)} in the environment, as of one of several processes, but no MASTER_ADDR", hint=f"unset {' '.join(found)}")
