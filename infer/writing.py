"""Pictures filtered, encoded and written in a thread of their own, while the GPU makes the next one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from PIL import Image

from infer import picture
from infer.filter import THRESHOLD

AHEAD = 4
"""Pictures that may wait to be written; a slow disk then slows the drawing, and does not fill the memory."""


@dataclass(frozen=True)
class Written:
    """A picture that is on the disk; or, with `score`, one that the content filter kept back."""

    file: Path
    image: Image.Image
    making: picture.Making
    score: float | None = None

    @property
    def filtered(self) -> bool:
        """Whether it was kept back, and no file was written."""
        return self.score is not None


class Writer:
    """Writes pictures in the order they come; to be used in a `with`, which waits for the last. score: the content filter's, if there is one."""

    def __init__(self, quality: int, score: Callable[[Image.Image], float] | None = None):
        self.quality, self.score = quality, score
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._coming: list[Future[Written]] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)  # what was drawn is written, also where the drawing broke off

    def put(self, file: Path, image: Image.Image, making: picture.Making) -> None:
        """Hand a picture over. Raises here what kept an earlier one from being written."""
        for future in self._coming:
            if future.done():
                future.result()
        if len(self._coming) >= AHEAD:
            self._coming[-AHEAD].result()
        self._coming.append(self._thread.submit(self._write, file, image, making))

    def results(self) -> list[Written]:
        """All pictures, when the last is written."""
        return [future.result() for future in self._coming]

    def _write(self, file: Path, image: Image.Image, making: picture.Making) -> Written:
        score = self.score(image) if self.score else 0.0
        if score >= THRESHOLD:
            return Written(file, image, making, score)
        picture.write(file, image, making, self.quality)
        return Written(file, image, making)
