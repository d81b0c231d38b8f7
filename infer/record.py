"""`Record`: what a picture says of its making, checked, for it may come from anybody."""

from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from infer import picture
from infer.finish_options import FACES_LIMIT
from infer.loras import LORAS_LIMIT
from infer.request import PROMPT_CHARACTERS_LIMIT
from lorabooth.errors import UserError

Prompt = Annotated[str, StringConstraints(max_length=PROMPT_CHARACTERS_LIMIT)]
Side = Annotated[int, Field(ge=0, le=10_000)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BYTES_LIMIT = 200_000_000


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
    fast: bool = False
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
            with Image.open(path) as whole:  # a jpg that is cut short tells its making, and cannot be compared with
                whole.load()
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
