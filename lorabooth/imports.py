"""Importing torch, diffusers and transformers, which takes seconds."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage meanwhile: the half million objects that libraries make all stay, and walking over them again and again takes a
    tenth of the time. For the same reason the first import sets them apart from all later searches, each of which would take half a second."""
    first, collecting = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:  # later there may be models among the objects, which must go when they are done with
            gc.freeze()
        if collecting:
            gc.enable()
