"""`lorabooth reproduce`: a picture is made again from what is written in it."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import click
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from infer import a1111, picture
from infer import loras as lora_store
from infer.detail import FACES_LIMIT, Detail, redraw_faces
from infer.engine import Engine, Settings, steps_of
from infer.filter import THRESHOLD, content_filter, notice
from infer.finish import face_bar
from infer.loras import LoraChoice
from infer.named_base import confirmed
from infer.options import filter_option, read_source
from infer.progress import advancing
from infer.request import PROMPT_CHARACTERS_LIMIT, Request, Source
from lorabooth import __version__
from lorabooth.errors import UserError
from lorabooth.notes import note
from lorabooth.runs import prepared, write_durable

Prompt = Annotated[str, StringConstraints(max_length=PROMPT_CHARACTERS_LIMIT)]
Side = Annotated[int, Field(ge=0, le=10_000)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BYTES_LIMIT = 200_000_000
LORAS_LIMIT = 32
FORM_OF = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
RUNS = "runs/*/lora.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class LoraRecord(_Part):
    """A LoRA of a picture."""

    name: Annotated[str, StringConstraints(max_length=300)]
    sha256: Sha256
    weight: float = Field(ge=-2, le=3)


class SourceRecord(_Part):
    """The picture that a picture was made from."""

    sha256: Sha256
    prompt_strength: float = Field(ge=0, le=1)
    masked: bool


class FaceRecord(_Part):
    """A face that was redrawn: its box, which of the two was kept, and how like the person they were."""

    box: Annotated[tuple[Side, Side, Side, Side], Field(strict=False)]
    kept: Literal["old", "new"]
    likeness: list[float | None] = Field(default=[None, None], max_length=2)


class DetailRecord(_Part):
    """A pass over the faces of a picture."""

    what: Literal["face"]
    strength: Literal["subtle", "normal", "strong"] | Annotated[float, Field(gt=0, le=1)]
    prompt: Prompt | None
    faces: list[FaceRecord] = Field(max_length=FACES_LIMIT)


class LikenessRecord(_Part):
    """How like the person a picture is, and of how many it was chosen."""

    score: float
    by: Annotated[str, StringConstraints(max_length=50)]
    best_of: int = Field(ge=1, le=10_000)


class Record(_Part):
    """What a picture says of its making; it may come from anybody."""

    prompt: Prompt
    negative_prompt: Prompt = ""
    seed: int = Field(ge=0, lt=2**32)
    num_inference_steps: int = Field(ge=1, le=50)
    guidance_scale: float = Field(ge=0, le=10)
    true_cfg_scale: float = Field(default=1.0, ge=1, le=10)
    width: int = Field(ge=1, le=10_000)
    height: int = Field(ge=1, le=10_000)
    model: Annotated[str, StringConstraints(max_length=300)]
    loras: list[LoraRecord] = Field(max_length=LORAS_LIMIT)
    source: SourceRecord | None = None
    precision: Literal["fp32", "bf16", "int8", "fp8", "nf4"] | None = None
    cache: Literal["off", "balanced", "max"] = "off"
    detail: DetailRecord | None = None
    likeness: LikenessRecord | None = None
    output_quality: int = Field(default=80, ge=0, le=100)
    contact_sheet: bool = False
    lorabooth: Annotated[str, StringConstraints(pattern=r"^[\w.+-]{1,50}$")]

    @classmethod
    def of(cls, path: Path) -> "Record":
        """The record in a picture; a UserError where it has none of ours."""
        try:
            if path.stat().st_size > BYTES_LIMIT:
                raise UserError(f"{path} has {path.stat().st_size / 1e6:.0f} MB; the limit is {BYTES_LIMIT / 1e6:.0f} MB")
            found = picture.making_of(path)
        except FileNotFoundError:
            raise UserError(f"there is no file {path}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise UserError(f"{path} is not a picture that can be read") from None
        if not found:
            raise UserError(f"{path} does not say how it was made", hint="pictures of lorabooth do, unless a program or a website has removed it")
        try:
            record = cls.model_validate(found)
            if record.contact_sheet:
                raise UserError(f"{path} shows several pictures", hint="give one of them")
            return record
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: what it says of its making cannot be used: {where}: {first['msg']}") from None


@click.command()
@click.argument("path", metavar="PICTURE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--lora", "references", multiple=True, metavar="RUN|FILE|HUB-ID|URL", help="Where a LoRA of it is. [default: looked for in runs/]")
@click.option("--image", type=click.Path(path_type=Path, dir_okay=False), help="The picture it was made from, where it was made from one.")
@click.option("--mask", type=click.Path(path_type=Path, dir_okay=False), help="The mask that went with it.")
@click.option("--model", help="Where the base model is, where it was a local folder.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. [default: beside PICTURE, as NAME-again.SUFFIX]")
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
    engine = Engine(base, Settings(precision or "auto", cache=record.cache))
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
    click.echo(f"{same} (another GPU, precision or version rounds differently)" if difference else same, err=True)
    click.echo(str(file))


def _free(path: Path) -> Path:
    """A name beside a picture that nothing has yet."""
    names = (path.with_name(f"{path.stem}-again{'' if i == 1 else f'-{i}'}{path.suffix}") for i in count(1))
    return next(name for name in names if not name.exists())


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
