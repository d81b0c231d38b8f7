"""Picture files that carry how they were made, and the mark that they are AI-generated."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from infer.loras import LoraChoice
from infer.request import Request
from lorabooth import __version__
from lorabooth.hub import display_name
from lorabooth.runs import write_durable

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
        """Plain JSON; LoRAs by name, hash of the base they were made for, and weight, never by path."""
        r = self.request
        return {
            "prompt": r.prompt, "seed": self.seed, "num_inference_steps": r.num_inference_steps, "guidance_scale": r.guidance_scale,
            "width": r.width_px, "height": r.height_px, "model": display_name(self.model),
            "loras": [{"name": c.file.name, "sha256": c.file.sha256, "weight": c.weight} for c in self.loras], "lorabooth": __version__,
            **self.more,
        }  # fmt: skip

    def parameters(self) -> str:
        """The text AUTOMATIC1111 and its relatives read; both names of FLUX's guidance, since readers differ."""
        r = self.record()
        loras = ", ".join(f"{lora['name']}: {lora['sha256'][:12]}" for lora in r["loras"])
        tail = f', Lora hashes: "{loras}"' if loras else ""
        return (
            f"{r['prompt']}\nSteps: {r['num_inference_steps']}, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: {r['guidance_scale']}, "
            f"Seed: {r['seed']}, Size: {r['width']}x{r['height']}, Model: {r['model']}{tail}, Version: lorabooth {__version__}"
        )


def encode(image: Image.Image, making: Making, form: str, quality: int = 80) -> bytes:
    """The bytes of a webp, png or jpg file with its making inside."""
    out = io.BytesIO()
    if form == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", making.parameters())
        info.add_text("lorabooth", json.dumps(making.record()))
        info.add_itxt("XML:com.adobe.xmp", _xmp())
        image.save(out, "PNG", pnginfo=info)
        return out.getvalue()
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + making.parameters().encode("utf-16-be")
    exif[ExifTags.Base.ImageDescription] = json.dumps(making.record())
    image.save(out, {"webp": "WEBP", "jpg": "JPEG"}[form], quality=quality, exif=exif, xmp=_xmp().encode())
    return out.getvalue()


def write(path: Path, image: Image.Image, making: Making, quality: int = 80) -> None:
    """Write one picture durably; its format is the file's ending."""
    write_durable(path, encode(image, making, path.suffix[1:], quality))


def making_of(path: Path) -> dict[str, Any]:
    """The record inside a picture of ours; empty where there is none."""
    with Image.open(path) as image:
        text = image.info.get("lorabooth") or image.getexif().get(ExifTags.Base.ImageDescription, "{}")
    return json.loads(text)


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


def _xmp() -> str:
    """XMP that says the picture is made by a trained algorithm (IPTC digital source type)."""
    source = escape("http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia")
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{source}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
