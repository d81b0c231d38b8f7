"""`lorabooth generate`: a prompt and LoRAs in, pictures out."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import click
from PIL import ImageOps
from tqdm import tqdm

from infer import loras as lora_store
from infer import picture
from infer.engine import Engine, Output, Settings, steps_of
from infer.finish import Finishing, FinishOptions, finish_options
from infer.loras import LoraChoice
from infer.options import PictureOptions, engine_options, picture_options
from infer.prompts import PromptOptions, Prompts, prompt_options
from infer.request import FORMATS, Request, any_seed
from lorabooth.errors import UserError

FULL_SIZE_ON_SHEET = 16
SMALL_PX = 320


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--lora",
    "references",
    multiple=True,
    metavar="RUN|FILE|HUB-ID|URL[:WEIGHT]",
    help="LoRA to apply, with a weight from -2 to 3 [default: 1]; may be given several times.",
)
@click.option("--model", help="Base model. [default: the one the first LoRA was trained on, else black-forest-labs/FLUX.1-dev]")
@click.option("-n", "--num-outputs", type=int, default=1, show_default=True, help="Pictures to make; picture i has seed + i.")
@click.option("--seed", type=int, help="Start of the noise; the same seed gives the same picture. [default: random, printed]")
@click.option("--format", "output_format", type=click.Choice(FORMATS), default="webp", show_default=True, help="File format.")
@click.option("--quality", "output_quality", type=click.IntRange(0, 100), default=80, show_default=True, help="Quality of webp and jpg, 0-100.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("pictures"), show_default=True, help="Folder for the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print files and seeds as JSON.")
@picture_options
@engine_options
@prompt_options
@finish_options
def generate(
    prompt: str | None, references: tuple[str, ...], model: str | None, num_outputs: int, seed: int | None, output_format: str, output_quality: int,
    out: Path, as_json: bool, prompt_options: PromptOptions, finish_options: FinishOptions, picture_options: PictureOptions, settings: Settings,
    plan_of: Callable[[str], None] | None,
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
    choices = tuple(lora_store.resolve(reference) for reference in references)
    if plan_of:
        plan_of(model or base_of(choices))
        return
    engine = Engine(model or base_of(choices), settings)
    chosen = any_seed() if seed is None else seed
    prompts = Prompts.read((prompt,) if prompt is not None else (), prompt_options, choices, engine.family.model == "mini")
    request = picture_options.request(prompts.texts[0], chosen, num_outputs, engine.family.native_px)
    finishing = Finishing.read(finish_options, engine, choices, num_outputs, _say)
    requests = prompts.requests(replace(request, num_outputs=finishing.to_draw))
    _notices(engine, requests, prompts, seed is None)
    files = write_pictures(engine, requests, choices, out, output_format, output_quality, finishing)
    click.echo(json.dumps(files) if as_json else "\n".join(str(file["file"]) for file in files))


def write_pictures(
    engine: Engine, requests: Sequence[Request], choices: tuple[LoraChoice, ...], out: Path, form: str, quality: int = 80, finishing: Finishing | None = None
) -> list[dict[str, Any]]:
    """Generate, finish and write out-0, out-1 ... (after those the folder has) and a contact sheet; the files and their seeds."""
    files: list[dict[str, Any]] = []
    shown = []
    taken = [int(match.group(1)) for file in out.glob(f"out-*.{form}") if (match := re.fullmatch(r"out-(\d+)", file.stem))]
    first = max(taken, default=-1) + 1
    total = sum(request.num_outputs for request in requests)
    finishing = finishing or Finishing()
    engine.read([*requests, *finishing.later(requests, choices, engine.family.model == "mini")], choices)
    for finished in finishing.finish(engine, _drawn(engine, requests, choices), choices, _say):
        file, output = out / f"out-{first + len(files)}.{form}", finished.output
        picture.write(file, output.image, picture.Making(finished.request, output.seed, engine.family.model, choices, finished.more), quality)
        files.append({"file": str(file), "seed": output.seed, **finished.more})
        # Hundreds of full pictures on one sheet nobody can open.
        shown.append((output.image if total <= FULL_SIZE_ON_SHEET else ImageOps.contain(output.image, (SMALL_PX, SMALL_PX)), f"seed {output.seed}"))
    if len(shown) > 1:
        sheet = out / "contact-sheet.png"
        picture.write(sheet, picture.contact_sheet(shown), picture.Making(requests[0], requests[0].seed, engine.family.model, choices))
        files.append({"file": str(sheet), "seed": requests[0].seed})
    return files


def _drawn(engine: Engine, requests: Sequence[Request], choices: tuple[LoraChoice, ...]) -> Iterator[tuple[Request, Output]]:
    """The pictures of all requests, with a progress bar over their steps."""
    with tqdm(total=sum(request.num_outputs * steps_of(request) for request in requests), desc="generate", unit="step") as bar:
        for request in requests:
            before = bar.n

            def advance(done: int, _: int, before: float = before) -> None:
                bar.update(before + done - bar.n)

            for output in engine.generate(request, choices, advance):
                yield request, output


def _say(line: str) -> None:
    """A line on standard error, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)


def base_of(choices: tuple[LoraChoice, ...]) -> str:
    """The base model the LoRAs name; FLUX.1-dev where they name none."""
    named = {choice.file.metadata["lorabooth.base"] for choice in choices if choice.file.metadata.get("lorabooth.base")}
    if len(named) > 1:
        raise UserError(f"these LoRAs are of different base models: {', '.join(sorted(named))}", hint="use LoRAs of one base model")
    base = named.pop() if named else "black-forest-labs/FLUX.1-dev"
    if base != "mini" and "/" not in base:
        raise UserError(f"the LoRA was trained on a local folder named {base!r}", hint="say where it is with --model FOLDER")
    return base


def _notices(engine: Engine, requests: Sequence[Request], prompts: Prompts, drawn_seed: bool) -> None:
    if drawn_seed:
        click.echo(f"Using seed: {requests[0].seed}", err=True)
    for prompt in dict.fromkeys(request.prompt for request in requests):
        cut = engine.family.cut(prompt)
        if cut:
            click.echo(f"note: the prompt is too long for this model; it will not see: {shorten(cut, 100, placeholder=' ...')}", err=True)
    for note in prompts.notes():
        click.echo(f"note: {note}", err=True)
