"""Options that `generate`, `grid` and their like share: what a picture is to be, and how the engine is to run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageChops

from infer.request import ASPECT_RATIOS, MEGAPIXELS, Request, Source, side_for, size_for, size_like
from infer.settings import Settings
from lorabooth import hub
from lorabooth.arguments import Known, Location
from lorabooth.config import MODELS
from lorabooth.decoder import Decoder
from lorabooth.entry import ENTRY_BYTES_LIMIT, LeftOut
from lorabooth.errors import UserError
from lorabooth.gigabytes import GIGABYTES
from lorabooth.reading import read_limited

Command = Callable[..., None]
CACHES = ("off", "balanced", "max")
SHAPE_TOLERANCE = 0.02
"""By which the shapes of a picture and its mask may differ; smaller copies are rounded to whole pixels."""
MODEL = Known(*MODELS, otherwise="dir")
"""Type of an option that names the base model."""
PRECISIONS = ("auto", "bf16", "int8", "fp8", "nf4")


@dataclass(frozen=True)
class PictureOptions:
    """The options that say what a picture is to be."""

    aspect_ratio: str | None
    megapixels: str
    width: int | None
    height: int | None
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str
    true_cfg_scale: float | None
    image: Path | None
    mask: Path | None
    prompt_strength: float | None

    def request(self, prompt: str, seed: int, num_outputs: int, native_px: int) -> Request:
        """A request like that for a base of that native size; a UserError where the options do not go together."""
        source = self.source
        # A negative prompt is only there to be used.
        scale = self.true_cfg_scale if self.true_cfg_scale is not None else 3.0 if self.negative_prompt else 1.0
        size, steps = self.size(native_px, source), self.num_inference_steps
        return Request(prompt, *size, seed, num_outputs, steps, self.guidance_scale, self.negative_prompt, scale, source)

    def size(self, native_px: int, source: Source | None) -> tuple[int, int]:
        """Width and height in px, as asked for, or like those of the picture to start from. A side that is not given follows the other."""
        like = size_like(source.image, self.megapixels, native_px) if source and not self.aspect_ratio else None
        width, height = like or size_for(self.aspect_ratio or "1:1", native_px, self.megapixels)
        if self.width is None and self.height is not None:
            width = side_for(self.height * width / height)
        elif self.height is None and self.width is not None:
            height = side_for(self.width * height / width)
        return width if self.width is None else self.width, height if self.height is None else self.height

    def check(self, base: str, prompt: str, seed: int, num_outputs: int = 1) -> None:
        """Refuse what can be refused of a request for a base by its name, before the imports, which take seconds; the base's own size is known after them."""
        hub.model_folder(base)
        self.request(prompt, seed, num_outputs, ASPECT_RATIOS["1:1"][0])

    @cached_property
    def source(self) -> Source | None:
        """The picture to start from."""
        if self.image is None:
            if self.mask is not None or self.prompt_strength is not None:
                raise UserError(f"{'--mask' if self.mask else '--prompt-strength'} needs a picture to start from", hint="give one with --image FILE")
            return None
        # What a mask names is drawn anew; without one a picture is to stay recognisable.
        strength = self.prompt_strength if self.prompt_strength is not None else 0.8
        return read_source(self.image, self.mask, strength)


def read_source(image: Path, mask: Path | None, prompt_strength: float) -> Source:
    """A picture to start from, with a mask of its shape, which may be of another size."""
    picture, painted = read_picture(image), read_picture(mask, mask=True) if mask else None
    if painted and painted.size != picture.size:
        shapes = [one.width / one.height for one in (painted, picture)]
        if abs(shapes[0] / shapes[1] - 1) > SHAPE_TOLERANCE:
            raise UserError(f"the mask {mask} has another shape than the picture: width / height is {shapes[0]:.2f} and {shapes[1]:.2f}")
        painted = painted.resize(picture.size, Image.Resampling.BILINEAR)
    return Source(picture, painted, prompt_strength)


def read_picture(path: Path, mask: bool = False) -> Image.Image:
    """Any picture that a phone makes, upright and in sRGB; as a mask in grey. A UserError where it is none."""
    data = read_limited(path, ENTRY_BYTES_LIMIT)
    try:
        with Decoder() as decoder:
            decoded = decoder.decode(path.name, data)
    except LeftOut as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    if not mask:
        return decoded.image
    grey = decoded.image.convert("L")
    grey = ImageChops.multiply(grey, decoded.opacity) if decoded.opacity is not None else grey
    if not grey.getbbox():
        raise UserError(f"the mask {path} is all black, so nothing would change", hint="paint white what is to change")
    return grey


def picture_options(command: Command) -> Command:
    """Add those options to a command, which gets them as `picture_options`."""
    names = tuple(PictureOptions.__dataclass_fields__)

    @wraps(command)
    def gathered(*arguments: Any, **given: Any) -> None:
        command(*arguments, picture_options=PictureOptions(**{name: given.pop(name) for name in names}), **given)

    path = Location(dir_okay=False)
    return _with(
        gathered,
        click.option("--aspect-ratio", type=Known(*ASPECT_RATIOS), help=f"One of {', '.join(ASPECT_RATIOS)}. [default: 1:1, or that of --image]"),
        click.option("--megapixels", type=click.Choice(MEGAPIXELS), default="1", show_default=True, help="Size for a base of 1024 px; 0.25 halves the sides."),
        click.option("--width", type=int, help="Width in px, a multiple of 16. Without --height, that follows by the aspect ratio."),
        click.option("--height", type=int, help="Height in px, a multiple of 16. Without --width, that follows by the aspect ratio."),
        click.option("--steps", "num_inference_steps", type=int, default=28, show_default=True, help="Denoising steps, 1-50."),
        click.option("--guidance", "guidance_scale", type=float, default=3.5, show_default=True, help="How closely to follow the prompt, 0-10."),
        click.option("--negative", "negative_prompt", default="", help="What the picture should not show; doubles the time."),
        click.option("--true-cfg", "true_cfg_scale", type=float, help="How far to go away from --negative, 1-10. [default: 3 with it]"),
        click.option("--image", type=path, help="Picture to start from: JPEG, PNG, WebP, HEIC, AVIF, TIFF."),
        click.option("--mask", type=path, help="Black and white picture; only where it is white --image changes."),
        click.option("--prompt-strength", type=float, help="How much of --image may change, 0-1. [default: 0.8]"),
    )  # fmt: skip


def engine_options(command: Command) -> Command:
    """Add the options of the engine to a command, which gets them as `settings`; with --plan, `plan_of` prints it for a base's name.

    The command has picture_options, too.
    """

    @wraps(command)
    def gathered(
        *arguments: Any, precision: str, swapped: int | None, batch: int, fast: bool, cache: str, show_plan: bool, vram_gb: float | None,
        picture_options: PictureOptions, **given: Any,
    ) -> None:  # fmt: skip
        settings = Settings(precision, swapped, batch, mixed=False, fast=fast, cache=cache)

        def plan_of(model: str) -> None:
            from infer.print_plan import print_plan

            print_plan(model, settings, vram_gb, picture_options)

        command(*arguments, settings=settings, plan_of=plan_of if show_plan or vram_gb else None, picture_options=picture_options, **given)

    return _with(
        gathered,
        click.option("--fast", is_flag=True, help="Compile the blocks (a minute or two, once), and compute in fp8 where the GPU does."),
        click.option("--cache", type=click.Choice(CACHES), default="off", show_default=True, help="Leave out what hardly changes between steps; loses detail."),
        click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="How the base is stored."),
        click.option("--blocks-to-swap", "swapped", type=click.IntRange(0, 57), help="Blocks that live in host memory. [default: as many as must]"),
        click.option("--batch", type=click.IntRange(1, 16), default=1, show_default=True, help="Pictures made at once; faster for small ones."),
        click.option("--plan", "show_plan", is_flag=True, help="Print how it fits the GPU, and end."),
        click.option("--vram-gb", type=GIGABYTES, help="The same for a GPU with this much free memory."),
    )  # fmt: skip


def filter_option(command: Command) -> Command:
    """Add the switch of the content filter."""
    return click.option("--filter/--no-filter", "filtered", default=True, show_default=True, help="Keep back pictures that are not safe for work.")(command)


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
