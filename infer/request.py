"""`Request`: what one generation asks for, checked; names, defaults and sizes as the hosted generators have them."""

import random
from dataclasses import dataclass

from lorabooth.errors import UserError

ASPECT_RATIOS = {
    "1:1": (1024, 1024), "16:9": (1344, 768), "21:9": (1536, 640), "3:2": (1216, 832), "2:3": (832, 1216), "4:5": (896, 1088), "5:4": (1088, 896),
    "3:4": (896, 1152), "4:3": (1152, 896), "9:16": (768, 1344), "9:21": (640, 1536),
}  # fmt: skip
"""Width and height in px at one megapixel."""
FORMATS = ("webp", "png", "jpg")
MULTIPLE_PX = 16
PROMPT_CHARACTERS_LIMIT = 3_000
"""More than T5's 512 tokens; and it must fit in the EXIF of a jpg, 64 kB, twice, with up to 12 bytes a character."""


@dataclass(frozen=True)
class Request:
    """One generation: `num_outputs` pictures, output i with seed + i."""

    prompt: str
    width_px: int
    height_px: int
    seed: int
    num_outputs: int = 1
    num_inference_steps: int = 28
    guidance_scale: float = 3.5

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("the prompt is empty", hint='say what to draw, such as "a portrait of TOK at a conference"')
        if len(self.prompt) > PROMPT_CHARACTERS_LIMIT:
            raise UserError(f"the prompt has {len(self.prompt):,} characters; the limit is {PROMPT_CHARACTERS_LIMIT:,}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):  # how Python passes on bytes that are not UTF-8
            raise UserError("the prompt is not valid text in UTF-8")
        _within("num_outputs", self.num_outputs, 1, 64)
        _within("num_inference_steps", self.num_inference_steps, 1, 50)
        _within("guidance_scale", self.guidance_scale, 0, 10)
        _within("seed", self.seed, 0, 2**32 - 1)
        for name, value in (("width", self.width_px), ("height", self.height_px)):
            _within(name, value, 64, 1536)
            if value % MULTIPLE_PX:
                raise UserError(f"{name} is {value} px; it must be a multiple of {MULTIPLE_PX}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value:g}; it must lie from {low:g} to {high:g}")


def size_for(aspect_ratio: str, native_px: int) -> tuple[int, int]:
    """Width and height in px of a hosted aspect ratio, scaled from 1024 to the model's own size, in multiples of 16."""
    if aspect_ratio not in ASPECT_RATIOS:
        raise UserError(f"unknown aspect ratio {aspect_ratio!r}", hint=f"use one of {', '.join(ASPECT_RATIOS)}, or --width and --height")
    width, height = (max(MULTIPLE_PX, round(side * native_px / 1024 / MULTIPLE_PX) * MULTIPLE_PX) for side in ASPECT_RATIOS[aspect_ratio])
    return width, height


def any_seed() -> int:
    """A seed for a request that names none."""
    return random.SystemRandom().randrange(2**31)
