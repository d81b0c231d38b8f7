"""HTML pages of one file, which ask no network for anything."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from lorabooth.notes import note


def page(package: str, template: str, **values: Any) -> str:
    """A page from a template beside the modules of a package. What strangers wrote may be in `values`: all of it is escaped."""
    environment = Environment(loader=PackageLoader(package, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(template).render(**values)


def thumbnail(file: Path, px: int, form: str = "WEBP") -> str:
    """A picture as a data URI of that format, the longer side at most `px` long; "" and a note where it is damaged."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (px, px))
            small = ImageOps.contain(image.convert("RGB"), (px, px)) if max(image.size) > px else image.convert("RGB")
    except (OSError, SyntaxError) as error:  # the second for a PNG whose parts are broken
        note(f"{file} cannot be shown: {error}")
        return ""
    out = io.BytesIO()
    small.save(out, form, quality=85)
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
