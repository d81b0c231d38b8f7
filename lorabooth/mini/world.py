"""The mini model's world: drawn people and the sentences that describe them.

All facts stand in `world.json`; this module only reads it. A `Person` is a mapping from attribute to
python-avatars' enum name, so another program can draw and describe the same person. Knows no torch.
"""

import io
import json
import random
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lorabooth.errors import UserError

WORLD = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))
ATTRIBUTES = tuple(WORLD["attributes"])
IDENTITY = tuple(WORLD["identity"])
SCENE = tuple(WORLD["scene"])
SIZES_PX = tuple(tuple(size) for size in WORLD["canvas"]["sizes_px"])

Person = dict[str, str]
"""Attribute -> value, for every attribute of `ATTRIBUTES`."""


def values(attribute: str, held_out: bool | None = None) -> list[str]:
    """Values of an attribute: all (None), only those held out of pre-training (True), or only the others."""
    spec = WORLD["attributes"][attribute]
    return [v for v in spec["values"] if held_out is None or (v in spec["held_out"]) == held_out]


def phrase(attribute: str, value: str) -> str:
    """The words for a value; may contain `{hair_color}` or `{clothes_color}`."""
    return WORLD["attributes"][attribute]["values"][value]


def hidden(person: Person) -> set[str]:
    """Attributes that this person's drawing cannot show, by the table `hides`."""
    return {name for a, v in person.items() for name in WORLD["hides"].get(f"{a}={v}", ())}


def sample_person(rng: random.Random, held_out: Iterable[str] = (), fixed: Person | None = None) -> Person:
    """A random person. Attributes named in `held_out` take values the mini model never saw; all others, values it saw."""
    held_out = set(held_out)
    person = {a: rng.choice(values(a, a in held_out)) for a in ATTRIBUTES}
    # Bare faces are half of the world, so that glasses and beards stay something a person has, not a default.
    for a in ("glasses", "beard"):
        if a not in held_out and rng.random() < 0.35:
            person[a] = "NONE"
    return person | (fixed or {})


def describe(person: Person, rng: random.Random, who: str | None = None, say: Iterable[str] | None = None, form: int | None = None) -> str:
    """One sentence about a person.

    who: the subject ("TOK"); default one of the world's subjects. say: the attributes to mention (default all);
    hidden ones are never mentioned. form: index of the sentence form; default drawn from `rng`.
    """
    sentences = WORLD["sentences"]
    said = set(ATTRIBUTES if say is None else say) - hidden(person)
    parts = {name: [words(person, a, said) for a in sentences[name] if a in said] for name in ("looks", "face")}
    for part in parts.values():
        rng.shuffle(part)
    slots = {
        "who": who or rng.choice(sentences["subjects"]),
        "looks": ", ".join(parts["looks"]),
        "face": ", ".join(parts["face"]),
        "clothes": words(person, "clothes", said) if "clothes" in said else "",
        "background": words(person, "background", said) if "background" in said else "",
    }
    template = sentences["forms"][form] if form is not None else rng.choice(sentences["forms"])
    return fill(template, slots)


def fill(template: str, slots: dict[str, str]) -> str:
    """Fill a sentence form; a bracketed piece whose slot is empty is dropped."""

    def piece(match: re.Match[str]) -> str:
        text = match.group(1)
        return text if all(slots[name] for name in re.findall(r"{(\w+)}", text)) else ""

    return re.sub(r"\[([^\]]*)\]", piece, template).format(**slots)


def words(person: Person, attribute: str, said: set[str]) -> str:
    """The phrase of one attribute with its colour filled in, or left out where the colour is not said."""
    text = phrase(attribute, person[attribute])
    for colour in ("hair_color", "clothes_color"):
        name = phrase(colour, person[colour]) if colour in said else ""
        text = re.sub(r"\s+", " ", text.replace("{" + colour + "}", name))
    text = re.sub(r"\ba (?=[aeio])", "an ", text.strip())
    return text


@lru_cache(maxsize=4096)
def avatar_image(key: tuple[tuple[str, str], ...], size_px: int) -> Image.Image:
    """The transparent drawing (RGBA, size_px wide) of the attributes in `key`; cached, since measuring redraws neighbours."""
    try:
        import python_avatars
        import resvg_py
    except ImportError as error:
        raise UserError(f"drawing the mini world needs {error.name}", hint='install it with: pip install "lorabooth[mini]"') from error
    arguments = {"style": python_avatars.AvatarStyle.TRANSPARENT}
    for attribute, value in key:
        spec = WORLD["attributes"][attribute]
        if spec["argument"]:
            arguments[spec["argument"]] = getattr(python_avatars, spec["enum"])[value]
    arguments["facial_hair_color"] = arguments["hair_color"]
    svg = python_avatars.Avatar(**arguments).render()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size_px, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def background_colour(value: str) -> str:
    """`#rrggbb` of a background value such as `ClothingColor.PINK`."""
    import python_avatars

    enum, name = value.split(".")
    return str(getattr(python_avatars, enum)[name].value)


def draw(person: Person, width_px: int = 128, height_px: int = 128) -> Image.Image:
    """The truth: an RGB drawing of a person, width_px x height_px."""
    size = min(width_px, height_px)
    avatar = avatar_image(tuple(sorted((a, v) for a, v in person.items() if a != "background")), size)
    canvas = Image.new("RGB", (width_px, height_px), background_colour(person["background"]))
    avatar = avatar.crop((0, 0, size, size))
    canvas.paste(avatar, ((width_px - size) // 2, height_px - size), avatar)
    return canvas


def read_off(picture: Image.Image, truth: Person, attributes: Iterable[str] = ATTRIBUTES) -> dict[str, str]:
    """What a picture shows: for each visible attribute, the value whose drawing is nearest to it, all else true.

    Nearest is the least mean squared RGB difference. Attributes the truth's drawing cannot show are left out.
    """
    picture = picture.convert("RGB")
    target = np.asarray(picture, dtype=np.float32)
    unseen = hidden(truth)
    shown = {}
    for attribute in attributes:
        if attribute in unseen:
            continue
        drawings = {v: np.asarray(draw(truth | {attribute: v}, *picture.size), dtype=np.float32) for v in values(attribute)}
        shown[attribute] = min(drawings, key=lambda v: float(np.mean((drawings[v] - target) ** 2)))
    return shown
