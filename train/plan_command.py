"""`lorabooth plan`: how a training would fit, before anything loads."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lorabooth.arguments import Location
from lorabooth.gigabytes import GIGABYTES, check_stated
from lorabooth.hub import model_folder
from lorabooth.imports import heavy_imports
from train.command import config_options, recipe_config


@click.command()
@click.option("--recipe", type=Location(), help="YAML file of settings; options given here win over it. [default: none]")
@click.option("--vram-gb", type=GIGABYTES, help="Free memory of the GPU in GB. [default: what is free on the first one]")
@click.option("--ram-gb", type=GIGABYTES, help="Free memory of the host in GB. [default: what is free here]")
@click.option("--json", "as_json", is_flag=True, help="Print every plan that fits as JSON, the fastest first; bytes and seconds.")
@config_options
def plan(recipe: Path | None, vram_gb: float | None, ram_gb: float | None, as_json: bool, **values: Any) -> None:
    """Show the fastest way to train that fits a GPU: memory by item, seconds a step, and the next cheaper way. Nothing is loaded but configs.

    \b
    Example:
      lorabooth plan --vram-gb 12 --resolution 768
    """
    values["preview_prompts"] = values["preview_prompts"] or None
    values["trigger_word"] = values["trigger_word"] or "TOK"  # it changes nothing here
    config = recipe_config(recipe, values)
    model_folder(config.model)  # a name that is none is refused before seconds of imports

    with heavy_imports():
        from lorabooth.device import compute_device, free_gpu_bytes
        from lorabooth.families import family_to_plan
        from lorabooth.machine import pinnable_bytes
        from lorabooth.sizes import GB
        from lorabooth.speed import speed_of
        from train.plan import choose, table
        from train.planning import shapes_of

    device = compute_device()
    check_stated(vram_gb, device.type != "cpu")
    stated_bytes = vram_gb * GB if vram_gb else None
    gpu_bytes = stated_bytes or free_gpu_bytes(device)
    host_bytes = ram_gb * GB if ram_gb else pinnable_bytes()
    speed = speed_of(stated_bytes)
    estimates = choose(shapes_of(config, family_to_plan(config.model)), config, speed, gpu_bytes, host_bytes)
    if as_json:
        rows = [asdict(e) | {"bytes": e.bytes} for e in estimates]
        click.echo(json.dumps({"gpu_bytes": gpu_bytes, "host_bytes": host_bytes, "speed": asdict(speed), "plans": rows}, indent=1))
    else:
        click.echo(table(estimates, config, speed))
