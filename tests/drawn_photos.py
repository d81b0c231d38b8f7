"""Small pictures to take in, and what becomes of them."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from lorabooth.photos import Manifest, Photo, ingest


def corners(mode: str = "RGB", size: tuple[int, int] = (32, 20)) -> Image.Image:
    """Four corners of four colours, so that every turn and mirror shows."""
    image = Image.new("RGB", size, "white")
    for place, colour in (((0, 0), "red"), ((size[0] // 2, 0), "lime"), ((0, size[1] // 2), "blue")):
        image.paste(colour, (*place, place[0] + size[0] // 2, place[1] + size[1] // 2))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ingested(tmp_path: Path, files: dict[str, bytes], run: str = "run") -> tuple[Manifest, list[Image.Image]]:
    """The manifest of a zip of these files, and the pictures in the run."""
    source = tmp_path / "photos.zip"
    with zipfile.ZipFile(source, "w") as new:
        for name, data in files.items():
            new.writestr(name, data)
    manifest = ingest(source, tmp_path / run)
    return manifest, [Image.open(tmp_path / run / "photos" / photo.file) for photo in manifest.photos]


def one(tmp_path: Path, data: bytes, name: str = "a.png") -> Image.Image:
    """The picture that one file becomes."""
    _, (image,) = ingested(tmp_path, {name: data})
    assert image.mode == "RGB"
    return image


def half(size: tuple[int, int] = (32, 20)) -> Image.Image:
    """White on the left, black on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def mask_of(tmp_path: Path, photo: Photo, run: str = "run") -> np.ndarray:
    file = tmp_path / run / "photos" / photo.mask_file
    assert hashlib.sha256(file.read_bytes()).hexdigest() == photo.mask_sha256
    return np.asarray(Image.open(file))
