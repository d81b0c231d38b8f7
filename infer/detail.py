"""The detail pass: small faces are cut out, redrawn with the LoRA at the model's native size, and put back.

A face of 60 px has 16 of FLUX's patches; nobody can be recognised in so few. Enlarged to the size of a portrait it has hundreds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from infer.engine import Engine, fitted
from infer.finish_options import FACES_LIMIT
from infer.likeness import Likeness
from infer.loras import LoraChoice
from infer.progress import Progress, part_of
from infer.request import Request, Source
from infer.spots import Box, Finder, Spot, finder_for
from infer.trigger import triggers_of
from lorabooth.errors import UserError
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX, Flux1

NOISE = {"subtle": 0.44, "normal": 0.58, "strong": 0.76}
"""Noise level (sigma) that redrawing starts at. By level, not by share of the steps: FLUX's schedule is shifted by the picture's size, and a
third of the steps is .45 at 512 px and .58 at 1024. These are 0.2, 0.3 and 0.5 of them at 1024; Stable Diffusion's usual 0.4 is like 0.2."""
LARGE = 0.1
"""Share of a picture of native size. The square around such a face would be enlarged by 1 / (2 * sqrt(0.1)), 1.6 times: little is gained."""
FEATHER = 0.2
"""Of the oval's radius, over which the new face fades into the old picture."""


@dataclass(frozen=True)
class Detail:
    """What the pass is to do. strength: a name of NOISE, or the share of the steps from 0 to 1; faces: at most so many."""

    strength: str | float = "normal"
    prompt: str | None = None
    faces: int = 1

    @classmethod
    def parse(cls, text: str, prompt: str | None = None, faces: int = 1) -> "Detail":
        """`face`, `face:strong` or `face:0.35`."""
        what, _, strength = text.partition(":")
        if what != "face":
            raise UserError(f"--detail {text!r} is unknown", hint=f"use face, face:{', face:'.join(NOISE)}, or a number such as face:0.35")
        if not 1 <= faces <= FACES_LIMIT:
            raise UserError(f"--detail-faces is {faces}; it must lie from 1 to {FACES_LIMIT}")
        if not strength or strength in NOISE:
            return cls(strength or "normal", prompt, faces)
        try:
            number = float(strength)
        except ValueError:
            number = float("nan")
        if not 0 < number <= 1:
            raise UserError(f"the strength of --detail is {strength!r}; it must be one of {', '.join(NOISE)} or a number above 0, up to 1")
        return cls(number, prompt, faces)

    def share(self, family: Flux1, steps: int) -> float:
        """The share of the steps that is done: the fewest that begin at the named level of noise or above it."""
        if isinstance(self.strength, float):
            return self.strength
        sigmas = family.sigmas(steps, (family.native_px // BUCKET_MULTIPLE_PX) ** 2).tolist()
        done = next((k for k in range(1, steps) if sigmas[steps - k] >= NOISE[self.strength]), steps)
        return (done - 0.5) / steps  # the middle, so that rounding up gives `done` whatever the division gave


@dataclass(frozen=True)
class Redrawn:
    """What became of one face; the scores are likeness before and after, None where there is nothing to compare with."""

    face: Box
    before: float | None
    after: float | None

    @property
    def kept(self) -> bool:
        """Whether the old face stayed, since it was the liker one."""
        return self.before is not None and self.after is not None and self.before > self.after


@dataclass(frozen=True)
class Detailed:
    """The picture after the pass, and each face that was redrawn; `large` faces were left as they were."""

    image: Image.Image
    faces: tuple[Redrawn, ...]
    large: int = 0

    def record(self, detail: Detail) -> dict[str, Any]:
        """Plain JSON for the picture's making."""
        rows = [{"box": list(f.face), "kept": "old" if f.kept else "new", "likeness": [f.before, f.after]} for f in self.faces]
        return {"what": "face", "strength": detail.strength, "prompt": detail.prompt, "faces": rows}


def redraw_faces(
    engine: Engine, request: Request, seed: int, image: Image.Image, loras: tuple[LoraChoice, ...], detail: Detail,
    likeness: Likeness | None = None, finder: Finder | None = None, decided: dict[Box, bool] | None = None, progress: Progress | None = None,
) -> Detailed:  # fmt: skip
    """Run the pass on a picture that `request` made with `seed`. Outside the ovals it stays the same to the bit, and where a mask keeps it.

    decided: the faces to redraw, and whether to take the new ones, where that was decided before.
    """
    found = (finder or finder_for(engine.family.native_px))(image)
    mask = fitted(request.source, request).mask if request.source else None
    found = [spot for spot in found if mask is None or mask.crop(spot.oval).getbbox()]
    spots = [spot for spot in found if spot.face_area <= LARGE * engine.family.native_px**2]
    large = len(found) - len(spots)
    if decided is not None:
        known = {spot.face: spot for spot in spots}
        spots = [known[face] for face in decided if face in known]
    elif likeness and len(spots) > detail.faces:
        # Of a crowd, the one most like the person; everybody who is redrawn becomes that person.
        spots.sort(key=lambda spot: -likeness.face(image.crop(spot.crop)))
    spots = spots if decided is not None else spots[: detail.faces]
    done = []
    for i, spot in enumerate(spots):
        old = image.crop(spot.crop)
        new = _redrawn(engine, request, face_seed(seed, i), old, spot, loras, detail, part_of(progress, i, len(spots)))
        pasted = Image.composite(new, old, oval_mask(spot, old.width))
        scores = (likeness.face(old), likeness.face(pasted)) if likeness else (None, None)
        done.append(Redrawn(spot.face, *scores))
        if not done[-1].kept if decided is None else decided[spot.face]:
            redrawn = image.copy()
            redrawn.paste(pasted, spot.crop[:2])
            image = Image.composite(redrawn, image, mask) if mask else redrawn
    return Detailed(image, tuple(done), large)


def _redrawn(
    engine: Engine, request: Request, seed: int, old: Image.Image, spot: Spot, loras: tuple[LoraChoice, ...], detail: Detail, progress: Progress | None
) -> Image.Image:
    """The square around a face, drawn anew within the oval; at the old one's size."""
    side = engine.family.native_px
    enlarged = old.resize((side, side), Image.Resampling.LANCZOS)
    # Everything that shows at all is redrawn in full: fading here and again at the end would leave a rim of the old face.
    mask = oval_mask(spot, side).point(lambda value: 255 if value else 0)
    source = Source(enlarged, mask, detail.share(engine.family, request.num_inference_steps))
    prompt = detail.prompt or face_prompt(request.prompt, loras, engine.family.model == "mini")
    wanted = replace(request, prompt=prompt, width_px=side, height_px=side, seed=seed, num_outputs=1, source=source)
    drawn = next(iter(engine.generate(wanted, loras, progress))).image
    return drawn.resize(old.size, Image.Resampling.LANCZOS)


def face_prompt(prompt: str, loras: Sequence[LoraChoice], mini: bool = False) -> str:
    """The close-up of what was asked for. The old prompt stays in it: it says helmet, light and expression.

    The mini model draws nothing but portraits, and knows no word for closeness.
    """
    people = [trigger for trigger in triggers_of(loras) if trigger.subject != "style"]
    return prompt if mini or not people else f"A close-up of the face of {people[0].phrase}. {prompt}"


def face_seed(seed: int, index: int) -> int:
    """The seed of a face: by the picture's and its place, so that the same picture is made again. Not seed + i, which other pictures have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/face/{index}".encode()).digest()[:4], "big")


def oval_mask(spot: Spot, side: int) -> Image.Image:
    """The oval of a spot in its square, `side` px wide: white within, fading to black at its edge."""
    scale = side / (spot.crop[2] - spot.crop[0])
    left, top, right, bottom = ((v - spot.crop[i % 2]) * scale for i, v in enumerate(spot.oval))
    x, y = np.arange(side) + 0.5, (np.arange(side) + 0.5)[:, None]
    radius = np.hypot((x - (left + right) / 2) / ((right - left) / 2), (y - (top + bottom) / 2) / ((bottom - top) / 2))
    t = np.clip((1 - radius) / FEATHER, 0, 1)
    return Image.fromarray((t * t * (3 - 2 * t) * 255).round().astype(np.uint8))
