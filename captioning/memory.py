"""Captions that a model has written, kept for other runs: the same photo, model and prompt are never paid for twice."""

from hashlib import sha256
from pathlib import Path

from lorabooth.home import cache_folder
from lorabooth.runs import write_durable


class Memory:
    """What models said, one small text file each, for its owner's eyes only. It may be deleted at any time, and where it cannot be used nothing fails."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or cache_folder("captions")

    def get(self, photo: str, captioner: str) -> str | None:
        """What a captioner (by its key) said of a photo (by its SHA-256), as it said it."""
        try:
            return self._file(photo, captioner).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def put(self, photo: str, captioner: str, text: str) -> None:
        """Remember it; a disk that is full or read-only only means that it is asked again."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durable(self._file(photo, captioner), text.encode("utf-8", "replace"))
        except OSError:
            pass

    def _file(self, photo: str, captioner: str) -> Path:
        digest = sha256(f"{photo} {captioner}".encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.txt"
