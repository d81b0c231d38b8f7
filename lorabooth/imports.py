"""Importing torch, diffusers and transformers, which takes seconds."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lorabooth.errors import UserError

NO_DOCSTRINGS, WITH_DOCSTRINGS = "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), and transformers needs them", "unset PYTHONOPTIMIZE, or set it to 1"


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage meanwhile: the half million objects that libraries make all stay, and walking over them again and again takes a
    tenth of the time. For the same reason the first import sets them apart from all later searches, each of which would take half a second. At a
    terminal a line says meanwhile what is waited for."""
    if sys.flags.optimize >= 2:
        raise UserError(NO_DOCSTRINGS, hint=WITH_DOCSTRINGS)
    first, collecting = "torch" not in sys.modules, gc.isenabled()
    shown = first and sys.stderr.isatty()
    if shown:
        print("loading torch, diffusers and transformers, some seconds ...", end="", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    except ValueError as error:
        if "torch" in sys.modules or "TORCH_LOGS" not in os.environ:
            raise
        raise UserError(f"torch cannot be imported with TORCH_LOGS={os.environ['TORCH_LOGS']}", hint="unset TORCH_LOGS, or see TORCH_LOGS=help") from error
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if first:  # later there may be models among the objects, which must go when they are done with
            gc.freeze()
        if collecting:
            gc.enable()
