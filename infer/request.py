"""`Request`: what one generation asks for, checked; names, defaults and sizes as the hosted generators have them."""

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from lorabooth.errors import UserError, is_utf8

ASPECT_RATIOS = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216), "4:5": (896, 1088), "5:4": (1088, 896),
    "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344), "9:21": (640, 1536),
}  # fmt: skip
"""Width and height in px at one megapixel."""
MEGAPIXELS = {"1": 1.0, "0.25": 0.5}
"""What the sides are multiplied with."""
FORMATS = ("webp", "png", "jpg")
MULTIPLE_PX = 16
SIDES_PX = 64, 1536
"""Least and most."""
PROMPT_CHARACTERS_LIMIT = 3_000
"""More than T5's 512 tokens; and it must fit in the EXIF of a jpg, 64 kB, twice, with up to 12 bytes a character."""


@dataclass(frozen=True)
class Source:
    """A picture to start from. Where a mask is given, only what is white in it changes.

    prompt_strength: how much may change, from 0 (nothing) to 1 (all); the share of the denoising steps that is done.
    """

    image: Image.Image
    mask: Image.Image | None = None
    prompt_strength: float = 0.8

    def __post_init__(self) -> None:
        _within("prompt_strength", self.prompt_strength, 0, 1)
        if self.mask is not None and self.mask.size != self.image.size:
            raise UserError(
                f"the mask is {self.mask.width} x {self.mask.height} px and the picture {self.image.width} x {self.image.height}; they must be of one size"
            )

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the picture's pixels, and of the mask's."""
        digest = hashlib.sha256(self.image.convert("RGB").tobytes())
        if self.mask is not None:
            digest.update(self.mask.convert("L").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    """One generation: `num_outputs` pictures, output i with seed + i.

    guidance_scale goes into FLUX.1-dev's guidance embedding. true_cfg_scale above 1 is classifier-free guidance (Ho and
    Salimans 2022, arXiv 2207.12598) away from negative_prompt, and doubles the time.
    """

    prompt: str
    width_px: int
    height_px: int
    seed: int
    num_outputs: int = 1
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    negative_prompt: str = ""
    true_cfg_scale: float = 1.0
    source: Source | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("the prompt is empty", hint='say what to draw, such as "a portrait of TOK at a conference"')
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if len(text) > PROMPT_CHARACTERS_LIMIT:
                raise UserError(f"the {name} has {len(text):,} characters; the limit is {PROMPT_CHARACTERS_LIMIT:,}")
            if not is_utf8(text):
                raise UserError(f"the {name} is not valid text in UTF-8")
        if self.negative_prompt and self.true_cfg_scale == 1:
            raise UserError("a negative prompt needs a true_cfg_scale above 1 to do anything", hint="use --true-cfg 3, say; it doubles the time")
        _within("num_outputs (-n)", self.num_outputs, 1, 64)
        _within("num_inference_steps (--steps)", self.num_inference_steps, 1, 50)
        _within("guidance_scale (--guidance)", self.guidance_scale, 0, 10)
        _within("true_cfg_scale (--true-cfg)", self.true_cfg_scale, 1, 10)
        _within("seed", self.seed, 0, 2**32 - 1)
        for name, value in (("width", self.width_px), ("height", self.height_px)):
            _within(name, value, *SIDES_PX)
            if value % MULTIPLE_PX:
                raise UserError(f"{name} is {value} px; it must be a multiple of {MULTIPLE_PX}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        shown = f"{value:,}" if isinstance(value, int) and abs(value) < 10**30 else f"{value:g}" if isinstance(value, float) else "too large"
        raise UserError(f"{name} is {shown}; it must lie from {low:,} to {high:,}")


def size_for(aspect_ratio: str, native_px: int, megapixels: str = "1") -> tuple[int, int]:
    """Width and height in px of a hosted aspect ratio, scaled from 1024 to the model's own size, in multiples of 16."""
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"unknown aspect ratio {aspect_ratio!r}", hint=f"use one of {', '.join(ASPECT_RATIOS)}, or --width and --height")
    width, height = ASPECT_RATIOS[aspect_ratio]
    return _rounded(width, height, native_px / 1024 * MEGAPIXELS[megapixels])


def size_like(image: Image.Image, megapixels: str, native_px: int) -> tuple[int, int]:
    """Width and height in px of a picture's shape with the model's own area, in multiples of 16."""
    scale = native_px / math.sqrt(image.width * image.height) * MEGAPIXELS[megapixels]
    # A panorama becomes smaller, and one that is still too narrow is cut.
    width, height = _rounded(image.width, image.height, min(scale, SIDES_PX[1] / max(image.size)))
    return max(width, SIDES_PX[0]), max(height, SIDES_PX[0])


def side_for(px: float) -> int:
    """The side nearest to a length that a picture can have."""
    return min(max(round(px / MULTIPLE_PX) * MULTIPLE_PX, SIDES_PX[0]), SIDES_PX[1])


def _rounded(width: float, height: float, scale: float) -> tuple[int, int]:
    sides = (max(MULTIPLE_PX, round(side * scale / MULTIPLE_PX) * MULTIPLE_PX) for side in (width, height))
    return next(sides), next(sides)


def any_seed() -> int:
    """A seed for a request that names none."""
    return random.SystemRandom().randrange(2**31)
