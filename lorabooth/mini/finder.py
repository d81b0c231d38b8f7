"""Where drawn people are in a picture, also small ones: for the mini model, whose cartoons a detector of photographed faces misses half of the time.

Two steps. The shape of the skin that heads leave free is correlated with the picture, at many sizes; what stands out is then
compared with drawings, and is a person where the nearest drawing explains the picture much better than the background alone.
It knows python-avatars' drawings on plain backgrounds and nothing else.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorabooth.mini import world
from lorabooth.mini.resemblance import START, Reading, skin_colour

SMALLEST_PX = 24
"""Width of a portrait; in smaller ones eyes and mouth are not to be told apart."""
STEP = 1.08
"""From one size to the next; the second step corrects what lies between."""
HEAD = (24, 12, 104, 108)
"""Left, top, right and bottom of the head with the neck, in a portrait of 128 px."""
GLASSES = (("NONE", "PRESCRIPTION_1", "PRESCRIPTION_2", "ROUND"), ("KURT",), ("SUNGLASSES", "WAYFARERS"), ("EYEPATCH",))
BEARDS = (("NONE", "BEARD_LIGHT", "MOUSTACHE_FANCY"), ("BEARD_MEDIUM", "MOUSTACHE_MAGNUM", "WICK_BEARD"), ("BEARD_MAGESTIC",))
"""Kinds that leave about the same skin free: one shape for each pair."""
PEOPLE_A_SHAPE = 12
TOLERANCE = 40.0
"""Of 255: how far from a skin's colour a pixel may be."""
LEAST_PIXELS = 24
CORRELATION = 0.5
CANDIDATES = 8
EXPLAINED = 0.5
"""A person's drawing leaves at most this share of the difference between the picture and its background."""

SURE = 0.2
"""Drawings where they are have 0.05 to 0.1: what lies within such a one is not looked at again."""
HOPELESS = 1.0
"""After one round, before the frame is moved to where it fits."""
FITTED = ("hair_color", "hair", "glasses", "beard", "clothes", "clothes_color")

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """The square of a drawn portrait in a picture, in px; it may reach beyond the edge."""

    left: float
    top: float
    size: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in whole px."""
        left, top, size = round(self.left), round(self.top), round(self.size)
        return left, top, left + size, top + size

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre, in px."""
        return self.left + self.size / 2, self.top + self.size / 2

    def holds(self, other: "Frame") -> bool:
        """Whether the middle of another lies in it."""
        return all(0 <= place - edge <= self.size for place, edge in zip(other.middle, (self.left, self.top), strict=True))

    def overlaps(self, other: "Frame") -> bool:
        """Whether both are about the same head."""
        return sum(abs(a - b) for a, b in zip(self.middle, other.middle, strict=True)) < (self.size + other.size) / 3


def find(picture: Image.Image) -> list[Frame]:
    """The drawn people in an RGB picture, the largest first."""
    people: list[tuple[float, Frame]] = []
    # First the place where the mini model draws its portraits, in the middle at the bottom.
    size = min(picture.size)
    for frame in (Frame((picture.width - size) / 2, picture.height - size, size), *_candidates(picture)):
        if any(left < SURE and other.holds(frame) for left, other in people):
            continue
        if found := _checked(picture, frame):
            people.append(found)
    kept: list[Frame] = []
    for _, frame in sorted(people, key=lambda pair: pair[0]):
        if not any(frame.holds(other) or other.holds(frame) for other in kept):
            kept.append(frame)
    return sorted(kept, key=lambda frame: -frame.size)


def _checked(picture: Image.Image, frame: Frame) -> tuple[float, Frame] | None:
    """How much the nearest drawing leaves unexplained, and the frame moved to where it leaves least; None where nobody is."""
    reading = Reading(picture.crop(frame.box))
    person: world.Person = START | {"skin": reading.skin()}
    for attribute in FITTED:
        person = person | {attribute: reading.nearest_value(person, attribute)}
    if reading.error(person) > HOPELESS * reading.emptiness():
        return None
    person = reading.fitted(person, FITTED)
    moves = [Frame(frame.left + (1 - s) * frame.size / 2 + x * frame.size, frame.top + (1 - s) * frame.size / 2 + y * frame.size, frame.size * s)
             for s, x, y in product((0.93, 0.97, 1.0, 1.03, 1.07), (-0.03, 0, 0.03), (-0.03, 0, 0.03))]  # fmt: skip
    left, best = min(((_unexplained(picture, move, person), move) for move in moves), key=lambda pair: pair[0])
    return (left, best) if left < EXPLAINED else None


def _unexplained(picture: Image.Image, frame: Frame, person: world.Person) -> float:
    reading = Reading(picture.crop(frame.box))
    return reading.error(person) / max(reading.emptiness(), 1.0)


def _candidates(picture: Image.Image) -> list[Frame]:
    """Where the shape of a head stands out most."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    maps = [_near(pixels, skin_colour(value)) for value in world.values("skin")]
    maps = [m for m in maps if (m > 0.5).sum() >= LEAST_PIXELS]
    found: list[tuple[float, Frame]] = []
    size = float(SMALLEST_PX)
    while size <= min(picture.size):
        found += [hit for shape in _shapes() for m in maps if (hit := _best(m, shape, size))]
        size *= STEP
    found.sort(key=lambda pair: -pair[0])
    kept: list[Frame] = []
    for _, frame in found:
        # Of one head, frames of other sizes stay: a shape of skin cannot tell a small head from a part of a large one.
        if len(kept) < CANDIDATES and not any(frame.overlaps(other) and 0.85 < frame.size / other.size < 1.18 for other in kept):
            kept.append(frame)
    return kept


def _best(skin: Map, shape: Map, size: float) -> tuple[float, Frame] | None:
    """The highest normalised correlation of a shape with a map of skin, and where."""
    left, top, right, bottom = (side * size / 128 for side in HEAD)
    width, height = round(right - left), round(bottom - top)
    template = np.asarray(Image.fromarray(shape).resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    template = template - template.mean()
    template /= np.sqrt((template**2).sum())
    product_ = np.fft.irfft2(np.fft.rfft2(skin) * np.conj(np.fft.rfft2(template, skin.shape)), skin.shape)[: 1 - height or None, : 1 - width or None]
    sums, squares = _sums(skin, height, width), _sums(skin**2, height, width)
    # A spread of less than a fiftieth is noise in an even area.
    correlation = product_ / np.sqrt(np.maximum(squares - sums**2 / template.size, 0.02 * template.size))
    y, x = divmod(int(correlation.argmax()), correlation.shape[1])
    return (float(correlation[y, x]), Frame(x - left, y - top, size)) if correlation[y, x] > CORRELATION else None


def _sums(values: Map, height: int, width: int) -> NDArray[np.float64]:
    """Sums over every window of a size."""
    c = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return np.asarray(c[height:, width:] - c[:-height, width:] - c[height:, :-width] + c[:-height, :-width])


def _near(pixels: NDArray[np.float32], colour: NDArray[np.float32]) -> Map:
    """1 where a pixel has a colour, falling to 0."""
    return np.asarray(np.clip(1 - np.abs(pixels - colour).max(axis=-1) / TOLERANCE, 0, 1), dtype=np.float32)


@cache
def _shapes() -> tuple[Map, ...]:
    """How often each pixel of a head is skin, for each pair of glasses and beards; drawn from people in clothes that are not of that colour."""
    shapes = []
    for glasses, beards in product(GLASSES, BEARDS):
        total = np.zeros((128, 128), dtype=np.float32)
        for i in range(PEOPLE_A_SHAPE):
            rng = random.Random(i)
            plain = {"skin": "YELLOW", "hair_color": "BLACK", "clothes_color": "BLUE_03", "background": "BackgroundColor.DEFAULT"}
            person = world.sample_person(rng) | plain | {"glasses": rng.choice(glasses), "beard": rng.choice(beards)}
            total += _near(np.asarray(world.draw(person), dtype=np.float32), skin_colour("YELLOW"))
        left, top, right, bottom = HEAD
        shapes.append(np.asarray(total[top:bottom, left:right] / PEOPLE_A_SHAPE, dtype=np.float32))
    return tuple(shapes)
