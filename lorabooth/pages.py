"""HTML pages of one file, which ask no network for anything."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from lorabooth.notes import note
from lorabooth.runs import write_durable


def page(package: str, template: str, **values: Any) -> str:
    """A page from a template beside the modules of a package. What strangers wrote may be in `values`: all of it is escaped."""
    environment = Environment(loader=PackageLoader(package, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(template).render(**values)


def write_page(file: Path, text: str) -> None:
    """Write a page durably; parts of file names that are no text become question marks."""
    write_durable(file, text.encode(errors="replace"))


def thumbnail(file: Path, px: int, form: str = "WEBP") -> str:
    """A picture as a data URI of that format, the longer side at most `px` long; "" and a note where it is damaged."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (px, px))
            small = image.convert("RGB")
        small.thumbnail((px, px))  # of what is very long, one px of the shorter side stays
    except (OSError, SyntaxError) as error:  # the second for a PNG whose parts are broken
        note(f"{file} cannot be shown: {error}")
        return ""
    out = io.BytesIO()
    small.save(out, form, quality=85)
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
