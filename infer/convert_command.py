"""`lorabooth convert` and `lorabooth export`: LoRA files for other programs, read again and compared before they are called done."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open
from safetensors.torch import save

from infer import loras as lora_store
from infer.loras import LoraChoice
from lorabooth import checkpoints
from lorabooth.comparison import difference
from lorabooth.conversion import DTYPES, FORMATS, TOLERANCE, merged, reduced, written
from lorabooth.entry import printable
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1_dev import Flux1Dev
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora import sorted_header
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, additions
from lorabooth.notes import note
from lorabooth.runs import RunDir, write_durable

RANKS = click.IntRange(1, 1024)
NOT_TRUE_ANY_MORE = ("lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def format_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both commands."""
    for option in reversed((
        click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="Whose names and layers: diffusers', kohya's, or ComfyUI's (BFL's)."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="Precision of the numbers. [default: that of the (first) file]"),
        click.option("--rank", type=RANKS, help="Reduce to at most this rank, by singular values; prints what that loses."),
        click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. [default: NAME-FORMAT.safetensors in this folder]"),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("references", nargs=-1, required=True, metavar="RUN|FILE|HUB-ID|URL[:WEIGHT]...")
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
    write(tuple(lora_store.resolve(reference) for reference in references), form, dtype, rank, out)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--raw", is_flag=True, help="The weights of the last step, without averaging over the steps.")
@format_options
def export(run: Path, raw: bool, form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Write the LoRA of a RUN in another program's format, exactly.

    \b
    Example:
      lorabooth export runs/TOK-photos --format comfyui --out ComfyUI/models/loras/TOK.safetensors
    """
    run_dir = RunDir.open(run)
    if not raw:
        write((lora_store.resolve(str(run)),), form, dtype, rank, out)
        return
    averaged = lora_store.resolve(str(run)).file  # its metadata, and the sentence where the run has not ended
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{run.resolve().name}-raw.safetensors"
        if not any(checkpoints.save_as_lora(run_dir, step, file, raw=True) for step in reversed(checkpoints.folders(run_dir))):
            raise UserError(f"{run} has no whole checkpoint, in which the raw weights would be")
        raw_file = LoraFile.read(file)
        write((LoraChoice(LoraFile(file, averaged.metadata, raw_file.shapes), 1.0),), form, dtype, rank, out)


def write(choices: Sequence[LoraChoice], form: str, dtype: str | None, rank: int | None, out: Path | None) -> None:
    """Read, merge, reduce, write, and read again; a UserError where the new file is not what it should be, and then there is none."""
    first = choices[0].file
    layout, clip, model = layouts(first)
    parts = [(additions(choice.file, layout, clip, model), choice.weight) for choice in choices]
    for (found, _), choice in zip(parts, choices, strict=True):
        if found.left_out:
            note(f"{choice.file.path.name}: left out: {', '.join(map(printable, found.left_out[:5]))}{' ...' * (len(found.left_out) > 5)}")
    wanted, lost = merged(parts), 0.0
    if rank:
        wanted, lost = reduced(wanted, rank)
    wide = next((width for width in DTYPES.values() if str(width).removeprefix("torch.") == _stored(first)), DTYPES["fp32"])
    precision = DTYPES[dtype] if dtype else wide
    file = out or Path(f"{'-'.join(_plain(choice.file.name) for choice in choices)}-{form}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} must end in .safetensors")
    tensors = written(wanted, layout, form, precision)
    data = sorted_header(save(tensors, metadata=_metadata(choices, wanted)))
    if not tensors:
        raise UserError("nothing is left to write: no layer of these files changes anything")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / file.name
        again.write_bytes(data)
        far = difference(wanted, additions(LoraFile.read(again), layout, clip, model))
    if far > TOLERANCE[precision]:
        raise UserError(
            f"the new file would not be the same LoRA: a layer differs by {far:.1%} (numbers too large or too small for {precision})", hint="use --dtype fp32"
        )
    write_durable(file, data)
    reduction = f"; rank {rank} keeps all but {lost:.2%} of the change" if rank else ""
    click.echo(f"{len(wanted.transformer) + len(wanted.clip)} layers, read again: they differ by at most {far:.1e}{reduction}", err=True)
    click.echo(str(file))


def layouts(file: LoraFile) -> tuple[Layout, ClipLayout, str]:
    """The layers of the base that a file was made for; FLUX.1-dev's where it does not name a base that is on this machine."""
    family = load_family("mini") if file.metadata.get("lorabooth.base") == "mini" else Flux1Dev()
    return Layout(sizes_of(family.empty_transformer())), ClipLayout(sizes_of(family.empty_clip())), family.model


def _stored(file: LoraFile) -> str:
    with safe_open(file.path, "pt") as opened:
        return str(opened.get_tensor(next(iter(opened.keys()))).dtype).removeprefix("torch.")


def _plain(name: str) -> str:
    return name.replace("/", "-")


def _metadata(choices: Sequence[LoraChoice], wanted: Additions) -> dict[str, str]:
    """The first file's, without what is no longer true; and of what it was made."""
    kept = {name: text for name, text in choices[0].file.metadata.items() if name not in NOT_TRUE_ANY_MORE}
    ranks = {len(one.down) for part in (wanted.transformer, wanted.clip) for one in part.values()}
    rank = str(max(ranks, default=0))
    made_of: list[dict[str, Any]] = [{"name": choice.file.name, "sha256": choice.file.sha256, "weight": choice.weight} for choice in choices]
    words = " and ".join(dict.fromkeys(choice.file.trigger_word for choice in choices if choice.file.trigger_word))
    phrase = {"modelspec.trigger_phrase": words} if words else {}
    return kept | phrase | {"format": "pt", "ss_network_dim": rank, "ss_network_alpha": rank, "lorabooth.made_of": json.dumps(made_of)}
