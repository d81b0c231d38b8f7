"""Who a drawing of the mini model's world shows, found by drawing: the person whose drawing is nearest to it.

Needs no description of the picture, as `likeness` does; so it serves pictures whose truth nobody knows. Knows drawings only.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from lorabooth.mini import world

WORK_PX = 64
"""Drawings are compared at this size: at 128 px each takes two and a half times as long."""
EDGE = 0.06
"""Of the width, at the left and the right, where a portrait shows nothing but its background."""
PHOTOS = 5
"""Read for the identity: the vote of five photos settles what one of them hides."""
START = {a: world.values(a)[0] for a in world.ATTRIBUTES} | {"hair": "SHORT_FLAT", "glasses": "NONE", "beard": "NONE"}
DRAWN = tuple(a for a in ("hair", "hair_color", "glasses", "beard", "skin", "clothes", "clothes_color", "eyes", "mouth") if a in world.ATTRIBUTES)
"""All but the background, what covers most first."""

SKIN_SPOTS = ((0.5, 0.4), (0.33, 0.51), (0.67, 0.51), (0.5, 0.78))
"""Across and down: root of the nose, cheeks, neck. Where hair, beard and glasses seldom are."""

STARTING_COLOURS = ("BROWN", "PLATINUM", "RED", "BLACK")
FITS = 36.0
"""Mean squared difference under which nothing nearer is looked for: 20 drawings have 11 to 34 from their own truth, for they are reduced, not drawn smaller."""
ROUNDS = 3

Pixels = NDArray[np.float32]


class Reading:
    """A square picture, WORK_PX wide, with what lies behind its person: guessed from its edges where it is not known."""

    def __init__(self, frame: Image.Image, behind: Image.Image | None = None):
        self.pixels = _small(frame)
        if behind:
            self.behind = _small(behind)
            return
        edge = round(EDGE * WORK_PX)
        # A colour for each row: behind a small figure there may be sky above and a road below.
        rows = np.median(np.concatenate([self.pixels[:, :edge], self.pixels[:, -edge:]], axis=1), axis=1)
        self.behind = np.broadcast_to(rows[:, None].astype(np.float32), self.pixels.shape)

    def error(self, person: world.Person) -> float:
        """Mean squared RGB difference from a person's drawing."""
        avatar = world.avatar_image(tuple(sorted((a, v) for a, v in person.items() if a != "background")), WORK_PX)
        drawing = np.asarray(avatar.crop((0, 0, WORK_PX, WORK_PX)), dtype=np.float32)
        alpha = drawing[..., 3:] / 255
        return float(np.mean((drawing[..., :3] * alpha + self.behind * (1 - alpha) - self.pixels) ** 2))

    def emptiness(self) -> float:
        """The error of nobody at all: the background's difference from the picture."""
        return float(np.mean((self.behind - self.pixels) ** 2))

    def nearest_value(self, person: world.Person, attribute: str) -> str:
        """The value of one attribute whose drawing is nearest, all else as in `person`."""
        return min(world.values(attribute), key=lambda value: self.error(person | {attribute: value}))

    def skin(self) -> str:
        """The skin nearest to what is seen at most of the spots where skin is."""
        seen = np.stack([self.pixels[round(y * WORK_PX), round(x * WORK_PX)] for x, y in SKIN_SPOTS])
        return min(world.values("skin"), key=lambda value: float(np.median(np.abs(seen - skin_colour(value)).max(axis=1))))

    def nearest(self) -> world.Person:
        """The person whose drawing is nearest. Found from several starts, since a wrong colour of hair can lead to the wrong hair."""
        found: list[tuple[float, world.Person]] = []
        for colour in STARTING_COLOURS:
            person = self.fitted(START | {"skin": self.skin(), "hair_color": colour}, DRAWN)
            found.append((self.error(person), person))
            if found[-1][0] < FITS:
                break
        return min(found, key=lambda pair: pair[0])[1]

    def fitted(self, person: world.Person, attributes: Sequence[str]) -> world.Person:
        """A person made nearer attribute by attribute, until nothing changes."""
        for _ in range(ROUNDS):
            before = dict(person)
            for attribute in attributes:
                person = person | {attribute: self.nearest_value(person, attribute)}
            if person == before:
                break
        return person


def _small(frame: Image.Image) -> Pixels:
    return np.asarray(frame.convert("RGB").resize((WORK_PX, WORK_PX), Image.Resampling.LANCZOS), dtype=np.float32)


def skin_colour(value: str) -> Pixels:
    """RGB of a skin."""
    import python_avatars

    return np.array(ImageColor.getrgb(python_avatars.SkinColor[value].value), dtype=np.float32)


def portrait(picture: Image.Image) -> Image.Image:
    """The square in which the mini model shows its person: as wide as the shorter side, at the bottom, in the middle."""
    size = min(picture.size)
    left = (picture.width - size) // 2
    return picture.crop((left, picture.height - size, left + size, picture.height))


def identity(photos: Iterable[Image.Image]) -> world.Person:
    """What is the same person's in portraits of one person: for each attribute of identity, the value that most of them show."""
    readings = [Reading(portrait(photo)) for photo in list(photos)[:PHOTOS]]
    found = [(reading, reading.nearest()) for reading in readings]
    people = [person for reading, person in found if reading.error(person) < FITS] or [person for _, person in found]
    shown = {a: [person[a] for person in people if a not in world.hidden(person)] or [people[0][a]] for a in world.IDENTITY}
    return {a: Counter(values).most_common(1)[0][0] for a, values in shown.items()}


def share_right(frame: Image.Image, who: world.Person, behind: Image.Image | None = None) -> float:
    """The share of a person's visible attributes of identity that a square portrait shows right."""
    reading = Reading(frame, behind)
    scene = [a for a in DRAWN if a not in world.IDENTITY]
    person = reading.fitted(START | who, scene)
    visible = [a for a in world.IDENTITY if a not in world.hidden(person)]
    return sum(reading.nearest_value(person, a) == who[a] for a in visible) / len(visible)
