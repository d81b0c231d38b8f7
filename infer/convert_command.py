"""`lorabooth convert` and `lorabooth export`: LoRA files for other programs."""

from collections.abc import Callable
from pathlib import Path

import click

from lorabooth import keys
from lorabooth.arguments import LORA, Location
from lorabooth.imports import heavy_imports
from lorabooth.runs import prepared

RANKS = click.IntRange(1, 1024)


def format_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both commands."""
    for option in reversed((
        click.option("--format", "form", type=click.Choice(keys.WRITTEN), required=True, help="Whose names and layers: diffusers', kohya's, ComfyUI's."),
        click.option("--dtype", type=click.Choice(keys.PRECISIONS), help="Precision of the numbers. [default: that of the (first) file]"),
        click.option("--rank", type=RANKS, help="Reduce to at most this rank, by singular values; prints what that loses."),
        click.option("--out", type=Location(dir_okay=False), help="File to write. [default: NAME-FORMAT.safetensors in this folder]"),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("references", type=LORA, nargs=-1, required=True, metavar="RUN|FILE|HUB-ID|URL[:WEIGHT]...")
@format_options
def convert(references: tuple[str, ...], form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Write a LoRA in another program's format; several are merged into one, each by its weight.

    Exact: the new file is read again, and every layer must give what it gave before.

    \b
    Example:
      lorabooth convert owner/name --format comfyui
    Example, two made one, of rank 32:
      lorabooth convert runs/TOK-photos:0.9 style.safetensors:0.5 --format kohya --rank 32 --out both.safetensors
    """
    with prepared((out or Path()).parent):
        with heavy_imports():
            from infer.convert import write
            from infer.loras import resolve

        write(tuple(resolve(reference) for reference in references), form, dtype, rank, out)


@click.command()
@click.argument("run", type=Location(file_okay=False))
@click.option("--raw", is_flag=True, help="The weights of the last step, without averaging over the steps.")
@format_options
def export(run: Path, raw: bool, form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Write the LoRA of a RUN in another program's format, exactly.

    \b
    Example:
      lorabooth export runs/TOK-photos --format comfyui --out ComfyUI/models/loras/TOK.safetensors
    """
    with prepared((out or Path()).parent):
        with heavy_imports():
            from infer.convert import export_run

        export_run(run, raw, form, dtype, rank, out)
