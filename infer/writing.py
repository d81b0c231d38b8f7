"""Pictures filtered, encoded and written in a thread of their own, while the GPU makes the next one."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

from PIL import Image

from infer import picture
from infer.filter import THRESHOLD
from lorabooth.runs import write_durable

AHEAD = 4
"""Pictures that may wait to be written; a slow disk then slows the drawing, and does not fill the memory."""


def numbered(file: Path, start: int = 1) -> Iterator[Path]:
    """The file's own name, then the same with -1 (or what it is to start with), -2 and so on, without end."""
    yield file
    for number in count(start):
        yield file.with_stem(f"{file.stem}-{number}")


class Numbers:
    """out-0, out-1 ... in a folder: names for new pictures, behind those that it has. Other processes may be writing there, too."""

    def __init__(self, folder: Path, form: str):
        self.folder, self.form = folder, form
        numbers = (re.fullmatch(r"out-(\d{1,9})", file.stem) for file in folder.glob("out-*.*"))
        self._next = 1 + max((int(match[1]) for match in numbers if match), default=-1)

    def take(self) -> Path:
        """The next name, whether or not something has it by now."""
        self._next += 1
        return self.folder / f"out-{self._next - 1}.{self.form}"

    def write(self, data: bytes) -> Path:
        """Write a file under the first name that is free."""
        return write_first_free(self.take, data)


def write_first_free(take: Callable[[], Path], data: bytes) -> Path:
    """Write a file under the first name that is free, of those that `take` gives one after the other."""
    while True:
        file = take()
        try:
            write_durable(file, data, new=True)
        except FileExistsError:
            continue
        return file


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

    def put(self, file: Path | Numbers, image: Image.Image, making: picture.Making) -> None:
        """Hand a picture over, for a file that it may replace or for the next number. Raises here what kept an earlier one from being written."""
        for future in self._coming:
            if future.done():
                future.result()
        if len(self._coming) >= AHEAD:
            self._coming[-AHEAD].result()
        self._coming.append(self._thread.submit(self._write, file, image, making))

    def results(self) -> list[Written]:
        """All pictures, when the last is written."""
        return [future.result() for future in self._coming]

    def finished(self) -> list[Written]:
        """Those that could be written, where others could not."""
        return [future.result() for future in self._coming if not future.exception()]

    def _write(self, file: Path | Numbers, image: Image.Image, making: picture.Making) -> Written:
        score = self.score(image) if self.score else 0.0
        if score >= THRESHOLD:
            return Written(file.take() if isinstance(file, Numbers) else file, image, making, score)
        if isinstance(file, Numbers):
            return Written(file.write(picture.encode(image, making, file.form, self.quality)), image, making)
        picture.write(file, image, making, self.quality)
        return Written(file, image, making)
