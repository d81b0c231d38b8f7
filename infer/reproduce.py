"""A picture is made again from what is written in it, and compared."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from infer import a1111, picture
from infer import loras as lora_store
from infer.detail import Detail, redraw_faces
from infer.engine import Engine, steps_of
from infer.filter import THRESHOLD, content_filter, notice
from infer.finish import face_bar
from infer.loras import LoraChoice
from infer.named_base import confirmed
from infer.options import read_source
from infer.progress import advancing
from infer.record import LoraRecord, Record, SourceRecord
from infer.request import Request, Source
from infer.settings import Settings
from infer.writing import numbered
from lorabooth import __version__
from lorabooth.errors import UserError
from lorabooth.notes import note
from lorabooth.runs import prepared, write_durable

FORM_OF = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
RUNS = "runs/*/lora.safetensors"


def make_again(
    path: Path, record: Record, references: Sequence[str], image: Path | None, mask: Path | None, model: str | None, out: Path | None, filtered: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Make the picture at `path`, with what it says of its making, again; write it to `out` or beside the old one, and print whether it is the same."""
    file = out or _free(path)
    form = FORM_OF.get(file.suffix.lower())
    if form is None:
        raise UserError(f"{file} ends in {file.suffix or 'nothing'}; a picture ends in {', '.join(FORM_OF)}", hint="name another with --out FILE")
    if file.exists():
        raise UserError(f"{file} is there already", hint="name another with --out FILE")
    choices = find_loras(record.loras, references)
    source = find_source(record.source, image, mask)
    try:
        request = Request(
            record.prompt, record.width, record.height, record.seed, 1, record.num_inference_steps, record.guidance_scale, record.negative_prompt,
            record.true_cfg_scale, source,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: what it says of its making cannot be used: {error.message}") from None
    if record.lorabooth != __version__:
        note(f"made by lorabooth {record.lorabooth}, this is {__version__}; the picture may differ")
    with prepared(file.parent):
        pass  # seen before the work that it can be written
    base, precision = model or confirmed(record.model, "this picture was made"), record.precision if record.precision != "fp32" else None
    engine = Engine(base, Settings(precision or "auto", fast=record.fast, cache=record.cache))
    with tqdm(total=steps_of(request), desc="reproduce", unit="step") as bar:
        [output] = engine.generate(request, choices, advancing(bar))
    made = output.image
    if record.detail:
        detail, decided = Detail(record.detail.strength, record.detail.prompt), {face.box: face.kept == "new" for face in record.detail.faces}
        with face_bar() as progress:
            made = redraw_faces(engine, request, record.seed, made, choices, detail, decided=decided, progress=progress).image
    finished = record.model_dump(include={"detail", "likeness", "output_quality"}, exclude_unset=True)
    making = picture.Making(request, record.seed, engine.family.model, choices, engine.record() | finished)
    kept_back = content_filter() if filtered else None
    if kept_back and (score := kept_back.score(made)) >= THRESHOLD:
        click.echo(json.dumps({"file": None, "filtered": True, "score": round(score, 3)}) if as_json else notice(record.seed, score), err=not as_json)
        return
    difference = largest_difference(path, made, making, record.output_quality)
    write_durable(file, picture.encode(made, making, form, record.output_quality), new=True)
    if as_json:
        click.echo(json.dumps({"file": str(file), "same": difference == 0, "largest_difference": difference}))
        return
    same = "the same picture, to the bit" if difference == 0 else f"not the same: pixels differ by up to {difference} of 255"
    click.echo(f"{same} (another GPU, precision, version or --batch rounds differently)" if difference else same, err=True)
    click.echo(str(file))


def _free(path: Path) -> Path:
    """A name beside a picture that nothing has yet."""
    return next(name for name in numbered(path.with_stem(f"{path.stem}-again"), 2) if not name.exists())


def find_loras(records: Sequence[LoraRecord], references: Sequence[str]) -> tuple[LoraChoice, ...]:
    """The files of a picture's LoRAs, by their hashes; a UserError that says which is not there, or is another one."""
    given = [lora_store.resolve(reference) for reference in references]
    known = {choice.file.sha256: choice.file for choice in given}
    for file in () if {record.sha256 for record in records} <= known.keys() else sorted(Path().glob(RUNS)):
        try:
            choice = lora_store.resolve(str(file))
            known.setdefault(choice.file.sha256, choice.file)
        except UserError:  # a run whose LoRA is damaged is not the one that is looked for
            continue
    found = []
    for record in records:
        if record.sha256 not in known:
            others = f"; {', '.join(f'{c.file.name} has {c.file.sha256[:12]}' for c in given)}" if given else ""
            raise UserError(
                f"the LoRA {a1111.plain(record.name)} with the hash {record.sha256[:12]} is not here{others}",
                hint="say where it is with --lora RUN, FILE or HUB-ID",
            )
        found.append(LoraChoice(known[record.sha256], record.weight))
    return tuple(found)


def find_source(record: SourceRecord | None, image: Path | None, mask: Path | None) -> Source | None:
    """The picture to start from, compared with the hash of the one that was."""
    if record is None:
        if image or mask:
            raise UserError("this picture was not made from another one", hint="leave out --image and --mask")
        return None
    needed = "--image FILE and --mask FILE" if record.masked else "--image FILE"
    if image is None or (record.masked and mask is None):
        raise UserError("this picture was made from another one, which it does not contain", hint=f"give it with {needed}")
    source = read_source(image, mask if record.masked else None, record.prompt_strength)
    if source.sha256 != record.sha256:
        raise UserError(
            f"{image} is not the picture that it was made from: hash {source.sha256[:12]}, not {record.sha256[:12]}", hint=f"give the same files with {needed}"
        )
    return source


def largest_difference(path: Path, made: Image.Image, making: picture.Making, quality: int) -> int:
    """Of any value of any pixel, 0 to 255; 255 where the sizes differ. What a webp or jpg lost, the new one loses first."""
    with Image.open(path) as old:
        form = {"WEBP": "webp", "JPEG": "jpg"}.get(old.format or "", "png")
        before = np.asarray(old.convert("RGB"), dtype=np.int16)
    if before.shape[1::-1] != made.size:
        return 255
    again = made if form == "png" else picture.decoded(picture.encode(made, making, form, quality))
    return int(np.abs(np.asarray(again, dtype=np.int16) - before).max())
