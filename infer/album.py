"""`Album`: the photos that pictures are compared with: those a LoRA was trained on, or a folder of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from infer.loras import LoraChoice
from lorabooth.decoder import Decoder
from lorabooth.decoding import PICTURE_SUFFIXES
from lorabooth.entry import LeftOut
from lorabooth.errors import UserError
from lorabooth.photos import Manifest

PHOTOS_LIMIT = 50
"""More say nothing new; of a longer list, photos from all of it are taken."""


@dataclass(frozen=True)
class Album:
    """Where the photos are."""

    folder: Path
    files: tuple[Path, ...]

    @classmethod
    def of_run(cls, run: Path) -> "Album | None":
        """The photos of a run of ours; None where the folder is none, or its photos are gone."""
        if not (run / "manifest.jsonl").is_file():
            return None
        files = tuple(run / "photos" / photo.file for photo in Manifest.load(run).photos)
        return cls(run, files) if files and all(file.is_file() for file in files) else None

    @classmethod
    def at(cls, folder: Path) -> "Album":
        """The photos of a run or of any folder; a UserError where it has none."""
        run = cls.of_run(folder)
        if run:
            return run
        if not folder.is_dir():
            raise UserError(f"--like {folder} is not a folder", hint="give a run, or a folder with photos of the person")
        files = sorted(file for file in folder.iterdir() if file.suffix.casefold() in PICTURE_SUFFIXES and ".mask." not in file.name)
        if not files:
            raise UserError(f"--like {folder} holds no photos", hint="give a run, or a folder with photos of the person")
        return cls(folder, tuple(files))

    @classmethod
    def for_request(cls, like: Path | None, choices: Sequence[LoraChoice]) -> "Album | None":
        """What --like says, else the photos of the first LoRA that is in its run's folder; None where neither is there."""
        if like:
            return cls.at(like)
        return next((album for choice in choices if (album := cls.of_run(choice.file.path.parent))), None)

    def photos(self) -> list[Image.Image]:
        """The photos, upright and in RGB; a UserError where none can be read."""
        step = -(-len(self.files) // PHOTOS_LIMIT)
        found, reason = [], ""
        with Decoder() as decoder:
            for file in self.files[::step]:
                try:
                    found.append(decoder.decode(file.name, file.read_bytes()).image)
                except LeftOut as error:
                    reason = f"{file.name} {error}"
        if not found:
            raise UserError(f"no photo in {self.folder} can be read: {reason}")
        return found
