"""Importing torch, diffusers and transformers, which takes seconds."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage meanwhile: the half million objects that libraries make all stay, and walking over them again and again takes a
    tenth of the time. For the same reason the first import sets them apart from all later searches, each of which would take half a second. At a
    terminal a line says meanwhile what is waited for."""
    first, collecting = "torch" not in sys.modules, gc.isenabled()
    shown = first and sys.stderr.isatty()
    if shown:
        print("loading torch, diffusers and transformers, some seconds ...", end="", file=sys.stderr, flush=True)
    gc.disable()
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if first:  # later there may be models among the objects, which must go when they are done with
            gc.freeze()
        if collecting:
            gc.enable()
