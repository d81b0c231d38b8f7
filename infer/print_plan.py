"""What `generate --plan` prints."""

from dataclasses import replace

import click

from infer.engine import plans, steps_of
from infer.options import PictureOptions
from infer.plan import table
from infer.settings import Settings
from lorabooth.device import compute_device
from lorabooth.families import family_to_plan
from lorabooth.gigabytes import check_stated
from lorabooth.sizes import GB
from lorabooth.speed import speed_of


def print_plan(model: str, settings: Settings, vram_gb: float | None, picture_options: PictureOptions) -> None:
    """Print the plan for pictures of a base on this machine's GPU, or on one of that size."""
    check_stated(vram_gb, compute_device().type != "cpu")
    family = family_to_plan(model)
    request = picture_options.request("a picture", 0, 1, family.native_px)
    settings, steps = replace(settings, pixels=request.width_px * request.height_px), steps_of(request)
    gpu_bytes = vram_gb * GB if vram_gb else None
    found = plans(family, settings, compute_device(), gpu_bytes, steps)
    click.echo(table(found, speed_of(gpu_bytes), f"a picture of {request.width_px} x {request.height_px} px in {steps} steps"))
