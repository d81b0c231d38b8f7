"""`python -m scripts.check_trials FOLDER...`: hold the limits of `lorabooth check` against real photographs, and write the table in docs/photos.md.

Each folder holds sharp photos of one thing at several places, without faces (ours were a dog, a can and a clock of the DreamBooth data set).
Faces are tried on the public-domain portrait of scripts.faulty_photos.
"""

import io
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from lorabooth.check import faces, limits
from lorabooth.check.measures import Measures, measure
from scripts.faulty_photos import PORTRAIT
from scripts.figures import insert

BLUR_SHARE = 0.004
Change = Callable[[Image.Image], Image.Image]


def saved_anew(image: Image.Image) -> Image.Image:
    """The picture after a JPEG of quality 30."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """The picture without these shares of its sides."""
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height)))


COPIES: dict[str, Change] = {
    "saved as a JPEG of quality 30": saved_anew,
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "cut by 3 %": lambda image: cut(image, 0.015, 0.015, 0.015, 0.015),
    "cut by 5 %": lambda image: cut(image, 0.025, 0.025, 0.025, 0.025),
    "shifted by 3 %": lambda image: cut(image, 0.03, 0, 0, 0),
    "turned by 2 degrees": lambda image: image.rotate(2),
}
FACES: dict[str, Change] = {
    "as it is": lambda image: image,
    "turned by 30 degrees": lambda image: image.rotate(30),
    "turned by 45 degrees": lambda image: image.rotate(45),
    "blurred by 2 % of its width": lambda image: image.filter(ImageFilter.GaussianBlur(10)),
    "at 6 % of its brightness": lambda image: image.point(lambda value: value * 0.06),
    "20 px high in a photo of 640 px": lambda image: ImageOps.pad(image.resize((51, 60)), (640, 640), color="gray"),
}


def apart(one: Measures, other: Measures) -> tuple[int, float]:
    """Bits of the hash and mean colour by which two photos differ."""
    return int((one.hash != other.hash).sum()), float(np.abs(one.colours - other.colours).mean())


def best_score(image: Image.Image) -> int:
    """Percent of certainty of the detector's best guess."""
    detect = faces.detector()
    assert detect is not None, "the trials need the face detector"
    small = image.copy()
    small.thumbnail((faces.LONG_SIDE_PX, faces.LONG_SIDE_PX), Image.Resampling.LANCZOS)
    return max((face[4] for face in detect(small.width, small.height, small.tobytes())), default=0)


def blurred(image: Image.Image) -> Image.Image:
    """The picture blurred over a share of its long side (standard deviation)."""
    return image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(image.size)))


def rows(sets: dict[str, list[Image.Image]]) -> Iterator[tuple[str, str, str]]:
    """What was tried, what came out, the limit."""
    images = [image for photos in sets.values() for image in photos]
    measured = {name: [measure(image) for image in photos] for name, photos in sets.items()}
    every = [one for ones in measured.values() for one in ones]
    pairs = [pair for ones in measured.values() for pair in combinations(ones, 2)]
    blur = [measure(blurred(image)).sharpness for image in images]
    yield f"sharpness of {len(every)} sharp photos", f"{min(one.sharpness for one in every):.0f} and more", f"{limits.SHARPNESS:.0f}"
    yield f"the same, blurred over {BLUR_SHARE:.1%} of the long side", f"{max(blur):.0f} and less", f"{limits.SHARPNESS:.0f}"
    limit = f"{limits.HASH_BITS} bits and {limits.HASH_COLOUR:.0f}"
    different = [apart(*pair) for pair in pairs]
    yield (
        f"{len(pairs)} pairs of photos of one thing",
        f"{min(bits for bits, _ in different)} bits and more, colours {min(c for _, c in different):.0f} and more",
        limit,
    )
    for name, change in COPIES.items():
        same = [apart(one, measure(change(image))) for one, image in zip(every, images, strict=True)]
        found = sum(bits <= limits.HASH_BITS and colour <= limits.HASH_COLOUR for bits, colour in same)
        yield (
            f"a photo and itself {name}",
            f"{found} of {len(same)} found; up to {max(b for b, _ in same)} bits, colours up to {max(c for _, c in same):.0f}",
            limit,
        )
    for name, ones in measured.items():
        overlap = max(float(np.minimum(one.background, other.background).sum()) for one, other in combinations(ones, 2))
        yield (
            f"two backgrounds of the {name}",
            f"{overlap:.2f} in common at most",
            f"{limits.BACKGROUND_OVERLAP}, in {limits.SAME_BACKGROUND_SHARE:.0%} of the photos",
        )
    spreads = [float(np.std([one.light for one in ones])) for ones in measured.values()]
    yield "brightness of the photos of one thing", f"spreads by {min(spreads):.0f} to {max(spreads):.0f}", f"{limits.LIGHT_SPREAD:.0f}"
    yield f"best score for a face in {len(images)} photos without one", f"{max(best_score(image) for image in images)} %", f"{limits.FACE_SCORE:.0%}"
    portrait = Image.open(PORTRAIT).convert("RGB")
    for name, change in FACES.items():
        yield f"score of a face {name}", f"{best_score(change(portrait))} %", f"{limits.FACE_SCORE:.0%}"


def main() -> None:
    """Read the folders and write the table."""
    sets = {}
    for folder in map(Path, sys.argv[1:]):
        sets[folder.name] = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in sorted(folder.iterdir())]
    lines = ["| tried | came out | limit |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows(sets))]
    insert(Path("docs/photos.md"), {"trials": "\n".join(lines)})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
