"""A transformer's blocks compiled one by one: 57 blocks are two kinds of code, so two compilations do for all (regional compilation)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lorabooth.attention import in_use
from lorabooth.notes import note


def try_compiled(blocks: list[nn.Module], dynamic: bool | None, warm_up: Callable[[], None], otherwise: str) -> bool:
    """Compile blocks and run them once by `warm_up`; where the compiler fails, one line says so, they go on as they were, and False comes back.

    dynamic: whether pictures have several shapes; None: seen when the second comes. otherwise: what goes on without, as the line names it.
    """
    # What is compiled is kept on the disk between starts, and not in a folder of /tmp. The attention kernel is in it, and torch finds it again whichever
    # is chosen by then, so each has a folder of its own.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorabooth" / "compiled" / in_use()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for block in blocks:
        block.compile(dynamic=dynamic)
    try:
        warm_up()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in ways of their own: none on the machine, a kernel it cannot build
        for block in blocks:
            block._compiled_call_impl = None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note(f"the blocks cannot be compiled here, {otherwise} goes on without ({type(error).__name__}: {reason})")
        return False
    return True
