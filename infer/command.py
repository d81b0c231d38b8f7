"""`lorabooth generate`: a prompt and LoRAs in, pictures out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import click

from infer import loras as lora_store
from infer.filter import content_filter
from infer.finish_options import FinishOptions, finish_options
from infer.named_base import base_of
from infer.options import MODEL, PictureOptions, engine_options, filter_option, picture_options
from infer.prompts import PromptOptions, Prompts, prompt_options
from infer.request import FORMATS, Request, any_seed
from infer.settings import Settings
from lorabooth.arguments import LORA, Location
from lorabooth.imports import heavy_imports
from lorabooth.notes import note
from lorabooth.runs import prepared


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--lora",
    "references",
    type=LORA,
    multiple=True,
    metavar="RUN|FILE|HUB-ID|URL[:WEIGHT]",
    help="LoRA to apply, with a weight from -2 to 3 [default: 1]; may be given several times.",
)
@click.option("--model", type=MODEL, help="Base model. [default: the one the first LoRA was trained on, else black-forest-labs/FLUX.1-dev]")
@click.option("-n", "--num-outputs", type=int, default=1, show_default=True, help="Pictures to make; picture i has seed + i.")
@click.option("--seed", type=int, help="Start of the noise; the same seed gives the same picture. [default: random, printed]")
@click.option("--format", "output_format", type=click.Choice(FORMATS), default="webp", show_default=True, help="File format.")
@click.option("--quality", "output_quality", type=click.IntRange(0, 100), default=80, show_default=True, help="Quality of webp and jpg, 0-100.")
@click.option("--out", type=Location(), default=Path("pictures"), show_default=True, help="Folder for the pictures.")
@click.option("--live", is_flag=True, help="Show the picture that is coming in OUT/live.png, in rough.")
@filter_option
@click.option("--json", "as_json", is_flag=True, help="Print files and seeds as JSON.")
@picture_options
@engine_options
@prompt_options
@finish_options
def generate(
    prompt: str | None, references: tuple[str, ...], model: str | None, num_outputs: int, seed: int | None, output_format: str, output_quality: int,
    out: Path, live: bool, filtered: bool, as_json: bool, prompt_options: PromptOptions, finish_options: FinishOptions,
    picture_options: PictureOptions, settings: Settings, plan_of: Callable[[str], None] | None,
) -> None:  # fmt: skip
    """Make pictures from PROMPT, into which the trigger word of a LoRA is put where it is missing.

    Writes out-0.webp, out-1.webp ... and, for more than one, contact-sheet.png. Each file carries its parameters.
    Pictures that are in the folder already are kept: the numbers go on behind them.

    \b
    Example:
      lorabooth generate "a portrait of TOK in a chef's suit, smiling" --lora runs/TOK-photos -n 4 --seed 7
    Example, two LoRAs with weights, wide:
      lorabooth generate "TOK and a fox" --lora runs/TOK-photos:0.9 --lora owner/foxes:0.6 --aspect-ratio 16:9
    Example, choices that the seed makes, and the built-in portraits:
      lorabooth generate "TOK in a {red|blue} {hat|scarf}" --lora runs/TOK-photos -n 8
      lorabooth generate --template all --lora runs/TOK-photos
    Example, far away and still recognisable:
      lorabooth generate "TOK cycling in the mountains, wide shot" --lora runs/TOK-photos --best-of 8 --detail face
    """
    choices = lora_store.resolve_all(references)
    base = model or base_of(choices)
    if plan_of:
        plan_of(base)
        return
    chosen = any_seed() if seed is None else seed
    prompts = Prompts.read((prompt,) if prompt is not None else (), prompt_options, choices, base == "mini")
    picture_options.check(base, prompts.texts[0], chosen, num_outputs)
    try:
        with heavy_imports():
            from infer.drawing import Drawing
            from infer.engine import Engine
            from infer.finish import Finishing
            from lorabooth.families import load_family

        family = load_family(base)
        request = picture_options.request(prompts.texts[0], chosen, num_outputs, family.native_px)
        finishing = Finishing.read(finish_options, family.native_px, choices, num_outputs)
        requests = prompts.requests(replace(request, num_outputs=finishing.to_draw))
        _notices(family.cut, requests, prompts, seed is None)
        pixels = max(request.width_px * request.height_px, family.native_px**2 if finishing.detail else 0)
        with prepared(out):
            engine = Engine(family, replace(settings, pixels=pixels))
            drawing = Drawing(engine, choices, out, output_format, output_quality, finishing, content_filter() if filtered else None, live)
            files = drawing.draw(requests)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the pictures that were finished are in {out}" if out.exists() else "interrupted; no picture was finished"
        ) from None
    click.echo(json.dumps(files) if as_json else "\n".join(str(file["file"]) for file in files if not file.get("filtered")))
    if drawing.unwritten:
        raise drawing.unwritten


def _notices(cut_off: Callable[[str], str], requests: Sequence[Request], prompts: Prompts, drawn_seed: bool) -> None:
    if drawn_seed:
        click.echo(f"Using seed: {requests[0].seed}", err=True)
    for prompt in dict.fromkeys(request.prompt for request in requests):
        if cut := cut_off(prompt):
            note(f"the prompt is too long for this model; it will not see: {shorten(cut, 100, placeholder=' ...')}")
    for line in prompts.notes():
        note(line)
