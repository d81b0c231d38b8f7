"""A transformer's blocks compiled one by one: 57 blocks are two kinds of code, so two compilations do for all (regional compilation)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from lorabooth.attention import in_use
from lorabooth.errors import out_of_memory
from lorabooth.home import cache_folder
from lorabooth.notes import note
from lorabooth.quantized import QuantizedLinear

CACHE = "TORCHINDUCTOR_CACHE_DIR"
VARIANTS = 64
"""Compilations of all kinds of blocks together: shapes of pictures, times what of a batch is preserved, times with and without gradients.
torch stops at 8, and runs what comes then uncompiled, without a word."""


def set_up_for(blocks: list[nn.Module], sparing: bool = False) -> None:
    """Set torch's compiler up for blocks like these, for the thread that calls and no other.

    sparing: they compute cheap things twice instead of keeping them for the backward pass.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    # A quantized weight is made wide in the forward pass and again in the backward pass. The compiler sees one expression written twice and would keep what
    # it gave: each weight of every block in bf16, beside the small one.
    torch._functorch.config.cse = not any(isinstance(module, QuantizedLinear) for block in blocks for module in block.modules())
    # Ours are traced, and what they do is part of the key; else each start would trace every block that has one anew.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch._functorch.config.ban_recompute_materialized_backward = not sparing


def try_compiled(blocks: list[nn.Module], dynamic: bool | None, warm_up: Callable[[], None], otherwise: str, sparing: bool = False) -> bool:
    """Compile blocks and run them once by `warm_up`; where the compiler fails, one line says so, they go on as they were, and False comes back.

    dynamic: whether pictures have several shapes; None: seen when the second comes. otherwise: what goes on without, as the line names it.
    sparing: as of `set_up_for`.
    """
    _choose_cache()
    set_up_for(blocks, sparing)
    for block in blocks:  # not `block.compile`, which would compile the hooks of others around the forward pass as well
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    try:
        warm_up()
    except Exception as error:  # compilers fail in ways of their own: none on the machine, a kernel it cannot build
        if out_of_memory(error):
            raise
        for block in blocks:
            del block.forward  # its class's comes to light again
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note(f"the blocks cannot be compiled here, {otherwise} goes on without ({type(error).__name__}: {reason})")
        return False
    return True


def _choose_cache() -> None:
    """Keep what is compiled on the disk between starts, and not in a folder of /tmp; where the user has named a folder, in that.

    The attention kernel is in the code, and torch finds the code again whichever is chosen by then, so each has a folder of its own.
    """
    folder = cache_folder("compiled")
    given = os.environ.get(CACHE)
    if not given or given == default_cache_dir() or Path(given).parent == folder:  # importing torch's compiler names its default
        os.environ[CACHE] = str(folder / in_use())
