"""Importing torch, diffusers and transformers, which takes seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without looking for garbage meanwhile: the half million objects that libraries make all stay, and walking over them again and again takes a
    tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
