"""`lorabooth grid`: prompts beside weights of a LoRA, or beside the checkpoints of a training run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from infer import loras as lora_store
from infer.columns import DEFAULT_WEIGHTS, Column, checkpoint_columns, weight_columns, weights_of
from infer.filter import content_filter
from infer.named_base import base_of
from infer.options import MODEL, PictureOptions, engine_options, filter_option, picture_options
from infer.prompts import PromptOptions, Prompts, prompt_options
from infer.settings import Settings
from lorabooth.arguments import LORA, Location
from lorabooth.errors import UserError
from lorabooth.imports import heavy_imports
from lorabooth.notes import note
from lorabooth.runs import RunDir, prepared


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--lora", "references", type=LORA, multiple=True, metavar="RUN|FILE|HUB-ID|URL", help="LoRA whose weights are compared; further ones keep theirs."
)
@click.option("--weights", help=f"Weights by commas, or from..to+step such as 0..1.2+0.2. [default: {DEFAULT_WEIGHTS}]")
@click.option("--checkpoints", "run", type=Location(), metavar="RUN", help="Compare the checkpoints of this run instead of weights.")
@click.option("--model", type=MODEL, help="Base model. [default: the one the LoRA was trained on]")
@click.option("--seed", type=int, default=42, show_default=True, help="Start of the noise, the same for all pictures.")
@click.option("--out", type=Location(), default=Path("grid"), show_default=True, help="Folder for the grid.")
@filter_option
@picture_options
@engine_options
@prompt_options
def grid(
    prompts: tuple[str, ...], references: tuple[str, ...], weights: str | None, run: Path | None, model: str | None, seed: int, out: Path, filtered: bool,
    prompt_options: PromptOptions, picture_options: PictureOptions, settings: Settings, plan_of: Callable[[str], None] | None,
) -> None:  # fmt: skip
    """Compare PROMPTs (rows) at several weights of a LoRA, or at the checkpoints of a run (columns); the first column is without a LoRA.

    Writes index.html, grid.png and grid.json into the folder, the full pictures beside them. The same command again
    makes only the pictures that are missing.

    \b
    Example:
      lorabooth grid "a portrait of TOK" "TOK as a chef" --lora runs/TOK-photos
    Example, which checkpoint is best, on the built-in portraits:
      lorabooth grid --template all --checkpoints runs/TOK-photos
    """
    columns, notes, base = _weights(references, weights) if run is None else _checkpoints(run, references, weights, out)
    base = model or base
    if plan_of:
        plan_of(base)
        return
    asked = Prompts.read(prompts, prompt_options, [choice for column in columns for choice in column.loras], base == "mini")
    picture_options.check(base, asked.texts[0], seed)
    with heavy_imports():
        from infer import grid_page
        from infer.engine import Engine
        from infer.grid import Grid
        from lorabooth.families import load_family

    family = load_family(base)
    rows = asked.requests(request := picture_options.request(asked.texts[0], seed, 1, family.native_px))
    for line in (*notes, *asked.notes()):
        note(line)
    title = f"{columns[-1].loras[0].file.name if run is None else run.resolve().name}, seed {seed}"
    with prepared(out):
        engine = Engine(family, replace(settings, pixels=request.width_px * request.height_px))
        made = Grid(rows, columns, engine.family.model, out, engine.record())
        count = made.make(engine, content_filter() if filtered else None)
        files = [grid_page.write_html(made, title), grid_page.write_png(made, title), made.write_record()]
    kept = len(made.cells) - count
    click.echo(f"{count} pictures made" + (f", {kept} were there" if kept else ""), err=True)
    click.echo("\n".join(map(str, files)))


def _weights(references: tuple[str, ...], weights: str | None) -> tuple[list[Column], list[str], str]:
    if not references:
        raise UserError("a grid needs a LoRA", hint="give --lora RUN, or --checkpoints RUN to compare its checkpoints")
    wanted = weights_of(DEFAULT_WEIGHTS if weights is None else weights)
    choices = lora_store.resolve_all(references)
    if choices[0].weight != 1:
        raise UserError(f"the weight of {references[0]} is what a grid varies", hint=f"name it without one, and give --weights {choices[0].weight:g}")
    return weight_columns(choices, wanted), [], base_of(choices)


def _checkpoints(run: Path, references: tuple[str, ...], weights: str | None, out: Path) -> tuple[list[Column], list[str], str]:
    if references or weights is not None:
        raise UserError("--checkpoints does not go together with --lora and --weights", hint="make two grids")
    run_dir = RunDir.open(run)
    columns, damaged = checkpoint_columns(run_dir, out / "loras")
    return columns, [f"{name} is damaged and left out" for name in damaged], run_dir.config.model
