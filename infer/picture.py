"""Picture files that carry how they were made, and the mark that they are AI-generated."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from infer import a1111
from infer.loras import LoraChoice
from infer.request import Request
from lorabooth import __version__, xmp
from lorabooth.hub import display_name
from lorabooth.runs import write_durable

OURS = "lorabooth"
EXIF_BYTES = 65_000
"""What a jpg has room for, nearly."""
SHEET_COLUMNS = 4
CAPTION_PX = 18


@dataclass(frozen=True)
class Making:
    """How a picture was made: everything that makes it again."""

    request: Request
    seed: int
    model: str
    loras: tuple[LoraChoice, ...]
    more: dict[str, Any] = field(default_factory=dict)
    """What was done after drawing, as plain JSON (infer/finish.py)."""

    def record(self) -> dict[str, Any]:
        """Plain JSON; LoRAs by name, hash and weight, never by path."""
        r = self.request
        source = {"sha256": r.source.sha256, "prompt_strength": r.source.prompt_strength, "masked": r.source.mask is not None} if r.source else None
        return {
            "prompt": r.prompt, "negative_prompt": r.negative_prompt, "seed": self.seed, "num_inference_steps": r.num_inference_steps,
            "guidance_scale": r.guidance_scale, "true_cfg_scale": r.true_cfg_scale, "width": r.width_px, "height": r.height_px,
            "model": display_name(self.model), "loras": [{"name": c.file.name, "sha256": c.file.sha256, "weight": c.weight} for c in self.loras],
            **({"source": source} if source else {}), "lorabooth": __version__, **self.more,
        }  # fmt: skip

    def parameters(self) -> str:
        """The text AUTOMATIC1111 and its relatives read."""
        return a1111.parameters(self.record(), [choice.file.tensors_sha256 for choice in self.loras], __version__)

    def xmp(self) -> str:
        """The XMP packet."""
        r = self.request
        return xmp.packet(r.prompt, r.negative_prompt, display_name(self.model), __version__, r.source is not None)


def encode(image: Image.Image, making: Making, form: str, quality: int = 80) -> bytes:
    """The bytes of a webp, png or jpg file with its making inside."""
    out = io.BytesIO()
    if form == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", making.parameters())
        info.add_text(OURS, json.dumps(making.record()))
        info.add_itxt("XML:com.adobe.xmp", making.xmp())
        image.save(out, "PNG", pnginfo=info)
        return out.getvalue()
    exif = Image.Exif()
    # Bytes, for pillow makes question marks of letters that are not ASCII.
    exif[ExifTags.Base.ImageDescription] = json.dumps(making.record(), ensure_ascii=False).encode()
    comment = b"UNICODE\0" + making.parameters().encode("utf-16-be")
    if len(exif.tobytes()) + len(comment) < EXIF_BYTES:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    image.save(out, {"webp": "WEBP", "jpg": "JPEG"}[form], quality=quality, exif=exif, xmp=making.xmp().encode())
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    """The picture in a file's bytes, in RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def write(path: Path, image: Image.Image, making: Making, quality: int = 80) -> None:
    """Write one picture durably; its format is the file's ending."""
    write_durable(path, encode(image, making, path.suffix[1:], quality))


def making_of(path: Path) -> dict[str, Any]:
    """The record inside a picture of ours; empty where there is none, or none that can be read."""
    with Image.open(path) as image:
        png, in_exif = image.info.get(OURS), image.getexif().get(ExifTags.Base.ImageDescription, "{}")
    try:
        found = json.loads(png or in_exif.encode("latin-1").decode("utf-8"))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def contact_sheet(pictures: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures side by side, each with a line of text under it."""
    width, height = pictures[0][0].size
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + CAPTION_PX)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (picture, text) in enumerate(pictures):
        x, y = (i % columns) * width, (i // columns) * (height + CAPTION_PX)
        sheet.paste(picture, (x, y))
        draw.text((x + 2, y + height + 1), text, fill="black", font=font)
    return sheet
