"""What is measured of one photo: figures, small arrays and a thumbnail, so that the photo itself need not be kept."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorabooth.check import faces, limits
from lorabooth.check.faces import Face

Array = NDArray[np.float32]
Box = tuple[int, int, int, int]

THUMBNAIL_PX = 320
HASH_PX = 32
HASH_SIDE = 8
BACKGROUND_PX = 64
BORDER_PX = 10
"""Of 64: the outer sixth at the top and, above the shoulders, at the sides is taken for background."""
SIDES_PX = 48


@dataclass(frozen=True, eq=False)
class Measures:
    """Figures of one photo. Luma is 0-255."""

    faces: tuple[Face, ...] | None
    """None where there is no detector."""
    sharpness: float
    """Variance of the Laplacian of the face, or of the sharpest parts."""
    bright: float
    """Luma that a twentieth of the subject exceeds."""
    light: float
    """Mean luma of the whole photo."""
    burnt: float
    """Share of the subject that is pure white."""
    contrast: float
    """Luma between the darkest and the brightest hundredth of the whole photo."""
    hash: NDArray[np.bool_]
    """63 bits that survive resizing and compression."""
    colours: Array
    """8 x 8 x 3: the photo at its coarsest."""
    background: Array
    """64 shares of the border's colours, which sum to 1."""
    thumbnail: bytes
    """A JPEG."""

    @property
    def face(self) -> Face | None:
        """The main face, the highest one."""
        return self.faces[0] if self.faces else None

    def figures(self) -> dict[str, float | int | None]:
        """The figures that a person or program can read."""
        named = {"sharpness": self.sharpness, "bright": self.bright, "light": self.light, "burnt": self.burnt, "contrast": self.contrast}
        return {"faces": None if self.faces is None else len(self.faces)} | {name: round(value, 3) for name, value in named.items()}


def measure(image: Image.Image) -> Measures:
    """All figures of an upright RGB picture."""
    found = faces.find(image)
    small = image.copy()
    small.thumbnail((limits.WORK_PX, limits.WORK_PX), Image.Resampling.LANCZOS)
    luma = np.asarray(small.convert("L"), np.float32)
    box = _box(found[0] if found else None, small.size)
    subject = luma[box[1] : box[3], box[0] : box[2]]
    low, high = np.percentile(luma, (1, 99))
    return Measures(
        faces=found,
        sharpness=_sharpness(luma, box if found else None),
        bright=float(np.percentile(subject, 95)),
        light=float(luma.mean()),
        burnt=float((subject >= limits.BURNT_LUMA).mean()),
        contrast=float(high - low),
        hash=_hash(image),
        colours=np.asarray(image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), np.float32),
        background=_background(image),
        thumbnail=_thumbnail(small),
    )


def _box(face: Face | None, size: tuple[int, int]) -> Box:
    """Where the subject is: the face, or the middle half; left, top, right, bottom in px, at least 1 px each way."""
    width, height = size
    left, top, right, bottom = (face.left, face.top, face.left + face.width, face.top + face.height) if face else (0.25, 0.25, 0.75, 0.75)
    x, y = min(int(left * width), width - 1), min(int(top * height), height - 1)
    return x, y, max(x + 1, round(right * width)), max(y + 1, round(bottom * height))


def _sharpness(luma: Array, face: Box | None) -> float:
    """Sharpness of the face, or where it is too small or missing, of the sharpest parts of the photo."""
    if face and face[3] - face[1] >= limits.FACE_WORK_PX:
        return float(_laplacian(luma[face[1] : face[3], face[0] : face[2]]).var())
    detail = _laplacian(luma)
    if min(detail.shape) < limits.TILES:
        return float(detail.var())
    parts = [tile for row in np.array_split(detail, limits.TILES) for tile in np.array_split(row, limits.TILES, axis=1)]
    return float(sorted(tile.var() for tile in parts)[-limits.SHARP_TILES])


def _laplacian(luma: Array) -> Array:
    """The second differences of luma (h, w) stretched to 0-255, so that a dark or flat photo is not taken for a blurred one."""
    low, high = np.percentile(luma, (1, 99))
    full = np.pad(np.clip((luma - low) * np.float32(255 / max(high - low, 1)), 0, 255), 1, mode="edge")
    detail: Array = 4 * full[1:-1, 1:-1] - full[:-2, 1:-1] - full[2:, 1:-1] - full[1:-1, :-2] - full[1:-1, 2:]
    return detail


def _hash(image: Image.Image) -> NDArray[np.bool_]:
    """The signs of the 63 lowest frequencies against their median (pHash, Zauner 2010).

    A library for it, ImageHash, would bring SciPy and PyWavelets along for these four lines.
    """
    luma = np.asarray(image.convert("L").resize((HASH_PX, HASH_PX), Image.Resampling.LANCZOS), np.float64)
    cosines = np.cos(np.pi / (2 * HASH_PX) * np.outer(np.arange(HASH_SIDE), 2 * np.arange(HASH_PX) + 1))
    waves = (cosines @ luma @ cosines.T).ravel()[1:]
    bits: NDArray[np.bool_] = waves > np.median(waves)
    return bits


def _background(image: Image.Image) -> Array:
    """Histogram (64,) of the border's colours, four steps each of red, green and blue."""
    pixels = np.asarray(image.resize((BACKGROUND_PX, BACKGROUND_PX), Image.Resampling.BOX))
    border = np.zeros(pixels.shape[:2], bool)
    border[:BORDER_PX] = border[:SIDES_PX, :BORDER_PX] = border[:SIDES_PX, -BORDER_PX:] = True
    steps = pixels[border].astype(np.intp) // 64
    counts = np.bincount(steps @ np.array([16, 4, 1]), minlength=64)
    return (counts / counts.sum()).astype(np.float32)


def _thumbnail(image: Image.Image) -> bytes:
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
