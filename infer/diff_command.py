"""`lorabooth diff`: whether two LoRAs are the same function, whatever their formats, and if not, where they differ."""

import json

import click

from lorabooth.arguments import LORA
from lorabooth.imports import heavy_imports

EXIT_DIFFERENT = 1


@click.command()
@click.argument("a", type=LORA, metavar="A")
@click.argument("b", type=LORA, metavar="B")
@click.option("--top", type=click.IntRange(0, 10_000), default=10, show_default=True, help="How many layers to list, those that differ most first.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def diff(context: click.Context, a: str, b: str, top: int, as_json: bool) -> None:
    """Compare two LoRAs, A and B: any that --lora takes, in any formats, each by its weight.

    Exit code: 0 where they are the same function but for the rounding of their numbers, 1 where they are not, 2 where it cannot be told.

    \b
    Example:
      lorabooth diff runs/TOK-photos TOK-comfyui.safetensors
    Example, how far two versions are from each other:
      lorabooth diff owner/name@v1 owner/name@v2 --top 3
    """
    with heavy_imports():
        from infer.diff import as_json_value, between, described
        from infer.loras import resolve

    choices = resolve(a), resolve(b)
    found = between(*choices)
    click.echo(json.dumps(as_json_value(choices, found), indent=1) if as_json else described(choices, found, top))
    context.exit(0 if found.same else EXIT_DIFFERENT)
