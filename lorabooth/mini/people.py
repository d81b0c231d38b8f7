"""People the mini model has never seen: their photos to train on, new scenes to ask for, and the truth of both."""

import io
import random
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorabooth.mini import world

DEMO_ZIP = Path(__file__).parent / "demo.zip"
PHOTOS = 12

HELD_OUT: dict[str, world.Person] = {
    "ada": {"hair": "BIG_HAIR", "hair_color": "RED", "skin": "LIGHT", "glasses": "ROUND", "beard": "NONE"},
    "bo": {"hair": "ELVIS", "hair_color": "BLACK", "skin": "BROWN", "glasses": "ROUND", "beard": "BEARD_MAGESTIC"},
    "cy": {"hair": "MOWGLI", "hair_color": "BLONDE_GOLDEN", "skin": "PALE", "glasses": "NONE", "beard": "MOUSTACHE_FANCY"},
}
"""Identities made with values held out of pre-training."""
MORE: dict[str, world.Person] = {
    "di": {"hair": "BUN", "hair_color": "SILVER_GRAY", "skin": "TANNED", "glasses": "KURT", "beard": "NONE"},
    "ed": {"hair": "EINSTEIN_HAIR", "hair_color": "PLATINUM", "skin": "LIGHT", "glasses": "NONE", "beard": "MOUSTACHE_MAGNUM"},
    "fay": {"hair": "CURVY", "hair_color": "AUBURN", "skin": "DARK_BROWN", "glasses": "ROUND", "beard": "NONE"},
    "gus": {"hair": "SHAGGY_MULLET", "hair_color": "BROWN", "skin": "YELLOW", "glasses": "KURT", "beard": "BEARD_MEDIUM"},
    "hal": {"hair": "BUN", "hair_color": "BLACK", "skin": "BLACK", "glasses": "NONE", "beard": "BEARD_MAGESTIC"},
}
"""Others like them, for what needs more people than a test has time for."""


@dataclass(frozen=True)
class Scene:
    """A person in clothes, with an expression, before a background; and the caption that says the scene but not the person."""

    truth: world.Person
    caption: str

    def image(self) -> Image.Image:
        """The drawing of it, 128 x 128 px."""
        return world.draw(self.truth)


def photos(name: str, who: str, count: int = PHOTOS) -> list[Scene]:
    """Scenes to photograph a held-out person in; deterministic."""
    return _scenes(name, who, count, new=False)


def new_scenes(name: str, who: str, count: int) -> list[Scene]:
    """Scenes of which no part (clothes, colour, mouth, eyes, background) stands in any of the person's photos."""
    return _scenes(name, who, count, new=True)


def _scenes(name: str, who: str, count: int, new: bool) -> list[Scene]:
    rng = random.Random(f"{name}/{new}")
    split = {a: _split(a, name)[new] for a in world.SCENE}
    # Each value comes up as often as the others, so that twelve photos show the person in everything of their half.
    rows = {a: [v for _ in range(-(-count // len(pool))) for v in rng.sample(pool, len(pool))] for a, pool in split.items()}
    people = [(HELD_OUT | MORE)[name] | {a: rows[a][i] for a in world.SCENE} for i in range(count)]
    return [Scene(person, world.describe(person, rng, who=who, say=world.SCENE, form=0)) for person in people]


def _split(attribute: str, name: str) -> tuple[list[str], list[str]]:
    """An attribute's trained values in two halves by the person's name: those in the photos, and those for new scenes."""
    pool = world.values(attribute, held_out=False)
    shuffled = random.Random(f"{name}/{attribute}").sample(pool, len(pool))
    cut = (len(pool) + 1) // 2
    return shuffled[:cut], shuffled[cut:]


def write_zip(path: Path, scenes: Iterable[Scene]) -> None:
    """Photos and captions as a user would bring them: photo-01.png, photo-01.txt ..."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, scene in enumerate(scenes, 1):
            buffer = io.BytesIO()
            scene.image().save(buffer, "PNG")
            for suffix, data in ((".png", buffer.getvalue()), (".txt", scene.caption.encode())):
                # A fixed date: the same photos give the same bytes.
                archive.writestr(zipfile.ZipInfo(f"photo-{i:02d}{suffix}", (2026, 1, 1, 0, 0, 0)), data)
