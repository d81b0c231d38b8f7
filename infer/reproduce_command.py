"""`lorabooth reproduce`: a picture is made again from what is written in it."""

from pathlib import Path

import click

from infer.options import MODEL, filter_option
from infer.record import Record
from lorabooth.arguments import LORA, Location
from lorabooth.imports import heavy_imports


@click.command()
@click.argument("path", metavar="PICTURE", type=Location(dir_okay=False))
@click.option("--lora", "references", type=LORA, multiple=True, metavar="RUN|FILE|HUB-ID|URL", help="Where a LoRA of it is. [default: looked for in runs/]")
@click.option("--image", type=Location(dir_okay=False), help="The picture it was made from, where it was made from one.")
@click.option("--mask", type=Location(dir_okay=False), help="The mask that went with it.")
@click.option("--model", type=MODEL, help="Where the base model is, where it was a local folder.")
@click.option("--out", type=Location(dir_okay=False), help="File to write. [default: beside PICTURE, as NAME-again.SUFFIX]")
@filter_option
@click.option("--json", "as_json", is_flag=True, help="Print the file and the comparison as JSON.")
def reproduce(
    path: Path, references: tuple[str, ...], image: Path | None, mask: Path | None, model: str | None, out: Path | None, filtered: bool, as_json: bool
) -> None:
    """Make PICTURE again from what is written in it, and say whether it is the same.

    A png is compared to the bit. A webp or jpg has lost something, so the new picture loses the same first.

    \b
    Example:
      lorabooth reproduce pictures/out-3.png
    Example, a picture of somebody else:
      lorabooth reproduce portrait.webp --lora runs/TOK-photos
    """
    record = Record.of(path)
    with heavy_imports():
        from infer.reproduce import make_again

    make_again(path, record, references, image, mask, model, out, filtered, as_json)
