"""Photos with faults made on purpose, to hold the check against: one set without a fault, and the same with each fault that can be found.

`python -m scripts.faulty_photos FILE.zip` writes a zip with all the faults that a single photo can have. The person is Grace Hopper: her
portrait by James S. Davis for the United States Navy (1984) is in the public domain. Rooms and gardens are drawn.
"""

import io
import sys
import zipfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

PORTRAIT = Path(__file__).parent / "grace_hopper.jpg"
OUTLINE = (
    *((150, 150), (155, 85), (180, 60), (230, 25), (300, 28), (350, 65), (370, 95), (370, 170), (378, 200), (360, 260), (355, 300), (330, 328)),
    *((430, 365), (490, 385), (512, 440), (512, 600), (20, 600), (30, 420), (60, 375), (190, 325), (175, 290), (155, 240)),
)
TRIGGER = "TOK"
RESOLUTION = "512,640"
SIDE_PX = 704

Files = dict[str, bytes]


@dataclass(frozen=True)
class Scene:
    """One drawn place with the person in it."""

    seed: int
    wall: str
    board: str
    scale: float | None
    """Of the portrait, whose face is 211 px high; None: nobody is there."""
    left: float = 0.5
    mirrored: bool = False
    second: float | None = None
    """Place of a second person of the same size."""
    caption: str = ""
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)

    def image(self) -> Image.Image:
        """The photo, without a fault but those of its own numbers."""
        picture = _place(self)
        for left in [self.left, self.second] if self.second else [self.left]:
            if self.scale:
                _stand(picture, self.scale, left, self.mirrored)
        return picture


# Three close-ups, five half bodies, four whole bodies; walls and boards of all colours and brightness.
SCENES = {
    "beach": Scene(1, "#4aa3c7", "#f3e2b0", 1.6, 0.45, caption="TOK laughs at the beach, bright sun"),
    "cellar": Scene(2, "#3a2f2a", "#5b4636", 1.5, 0.62, True, caption="a close view of TOK in a cellar, dim lamp"),
    "snow": Scene(3, "#dfe8ee", "#b9cbd6", 1.7, 0.35, caption="TOK looks up, snow behind her"),
    "kitchen": Scene(4, "#d9b27c", "#f7f1e3", 0.9, 0.5, True, caption="TOK cooks in a kitchen"),
    "library": Scene(5, "#5c3b22", "#2c1d12", 0.8, 0.3, caption="TOK reads in a library, evening"),
    "meadow": Scene(6, "#5f9a3e", "#a8cf6d", 0.75, 0.68, caption="in a meadow stands TOK, smiling"),
    "office": Scene(7, "#9aa0a8", "#e9ecef", 0.85, 0.4, caption="TOK at a desk, neon light"),
    "night": Scene(8, "#141a33", "#26305a", 0.8, 0.6, True, caption="TOK on a street at night"),
    "harbour": Scene(9, "#27566b", "#d8dde0", 0.5, 0.25, caption="TOK waits by a ship"),
    "desert": Scene(10, "#c96f3b", "#f0c48a", 0.48, 0.5, True, caption="small in the desert: TOK"),
    "stage": Scene(11, "#6b1f3a", "#b2456b", 0.5, 0.75, caption="TOK speaks on a stage, red light"),
    "orchard": Scene(12, "#7d8f2f", "#e7e0a0", 0.46, 0.4, caption="TOK picks apples in an orchard"),
}


@cache
def good() -> Files:
    """Twelve photos with captions in which nothing is to be found."""
    return files(SCENES)


def files(scenes: dict[str, Scene]) -> Files:
    """Photos (PNG) and captions (text) by name."""
    photos = {f"{name}.png": encoded(scene.image()) for name, scene in scenes.items()}
    return photos | {f"{name}.txt": scene.caption.encode() for name, scene in scenes.items() if scene.caption}


@cache
def photo_faults() -> dict[str, Files]:
    """Code of a finding -> a photo that has it, to be added to `good()`."""
    whole = {name: scene.image() for name, scene in SCENES.items()}
    other = {name: Scene(seed, wall, board, 0.85, left) for name, seed, wall, board, left in EXTRA}
    return {
        "left_out": {"cut-off.jpg": encoded(whole["office"], "JPEG")[:9000]},
        "duplicate": {"same-beach.png": encoded(whole["beach"])},
        "near_duplicate": {"snow-from-chat.jpg": encoded(whole["snow"].resize((660, 660)), "JPEG", quality=50)},
        "small": {"thumbnail.png": encoded(other["tiny"].image().resize((240, 240), Image.Resampling.LANCZOS))},
        "enlarged": {"medium.png": encoded(other["medium"].image().resize((560, 560), Image.Resampling.LANCZOS))},
        "long": {"panorama.png": encoded(replace(other["long"], size_px=(2048, 600)).image())},
        "blurred": {"shaky.png": encoded(other["blurred"].image().filter(ImageFilter.GaussianBlur(6)))},
        "dark": {"no-flash.png": encoded(other["dark"].image().point(lambda value: value * 0.15))},
        "burnt": {"flash.png": encoded(other["burnt"].image().point(lambda value: value * 2.2 + 60))},
        "flat": {"fog.png": encoded(other["flat"].image().point(lambda value: value * 0.2 + 110))},
        "no_face": {"empty-room.png": encoded(replace(other["empty"], scale=None).image())},
        "several_faces": {"twins.png": encoded(replace(other["twins"], scale=0.7, left=0.25, second=0.75).image())},
        "small_face": {"far-away.png": encoded(replace(other["far"], scale=0.22).image())},
        "no_trigger": {"somebody.png": encoded(other["somebody"].image()), "somebody.txt": b"somebody in a museum"},
    }


def all_photo_faults() -> Files:
    """The good photos and those with a fault."""
    return {name: data for part in (good(), *photo_faults().values()) for name, data in part.items()}


EXTRA = (
    ("tiny", 21, "#8c5fa8", "#d7c3e6", 0.55),
    ("medium", 22, "#2f7f6f", "#9adbc9", 0.35),
    ("long", 23, "#b8860b", "#3f5f9f", 0.6),
    ("blurred", 24, "#a03c28", "#e8b0a0", 0.65),
    ("dark", 25, "#446688", "#aabbcc", 0.3),
    ("burnt", 26, "#777733", "#aaaa66", 0.5),
    ("flat", 27, "#229988", "#dd8844", 0.4),
    ("empty", 28, "#cc9966", "#336699", 0.5),
    ("twins", 29, "#556b2f", "#f0e68c", 0.5),
    ("far", 30, "#87738f", "#4b3f57", 0.5),
    ("somebody", 31, "#c0c060", "#604020", 0.6),
)


def set_fault(code: str) -> Files:
    """A set of photos that has this finding about the whole set."""
    if code == "few_photos":
        return files({name: SCENES[name] for name in ("beach", "cellar", "kitchen", "harbour", "night", "stage")})
    if code == "same_light":
        return {name: _even_light(data) if name.endswith(".png") else data for name, data in good().items()}
    return files({name: _changed(scene, code) for name, scene in SCENES.items()})


SET_FAULTS = ("few_photos", "no_faces", "same_framing", "same_background", "same_light", "same_caption", "fused_word")


def _changed(scene: Scene, code: str) -> Scene:
    """The scene as it is in a set with a fault."""
    if code == "no_faces":
        return replace(scene, scale=None)
    if code == "same_framing":
        return replace(scene, scale=0.7 + scene.seed / 50)
    if code == "same_background":
        return replace(scene, wall="#8fa0a8", seed=1)
    if code == "same_caption":
        return replace(scene, caption=SCENES["office"].caption) if scene == SCENES["night"] else scene
    assert code == "fused_word", f"no set has {code}"
    return replace(scene, caption=f"{scene.caption}, in uniform")


def as_zip(content: Files) -> bytes:
    """A zip of these files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """A picture's bytes in a format."""
    file = io.BytesIO()
    image.save(file, kind, **({"compress_level": 1} if kind == "PNG" else {}), **options)
    return file.getvalue()


def _even_light(data: bytes) -> bytes:
    """The photo with a mean luma of 120."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for _ in range(4):  # clipping takes some of the change away again
        change = 120 - float(np.asarray(image.convert("L")).mean())
        image = image.point(lambda value, change=change: value + change)
    return encoded(image)


def _place(scene: Scene) -> Image.Image:
    """A wall with a board in the middle, lit from one side, and as grainy as a photo."""
    width, height = scene.size_px
    random = np.random.default_rng(scene.seed)
    picture = Image.new("RGB", (width, height), scene.wall)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width * 0.2, height * 0.2, width * 0.8, height), fill=scene.board)
    for x, y, side in random.uniform((0.2, 0.25, 0.03), (0.75, 0.9, 0.12), (9, 3)):
        colour = tuple(int(value) for value in random.integers(30, 220, 3))
        draw.rectangle((x * width, y * height, (x + side) * width, (y + side) * height), fill=colour)
    light = np.linspace(0.92, 1.06, width)[None, :, None] if scene.seed % 2 else np.linspace(1.05, 0.9, height)[:, None, None]
    pixels = np.asarray(picture, np.float32) * light + random.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _stand(picture: Image.Image, scale: float, left: float, mirrored: bool) -> None:
    """Put the person into the picture, at the bottom edge; `left` is the place of her middle as a share of the width."""
    person = ImageOps.mirror(_person()) if mirrored else _person()
    person = person.resize((round(person.width * scale), round(person.height * scale)), Image.Resampling.LANCZOS)
    # Close to, the head matters, not the uniform.
    top = max(picture.height - person.height, round(picture.height * 0.02))
    picture.paste(person, (round(left * picture.width - person.width / 2), top), person)


@cache
def _person() -> Image.Image:
    """The portrait without its background."""
    portrait = Image.open(PORTRAIT).convert("RGB")
    mask = Image.new("L", portrait.size)
    ImageDraw.Draw(mask).polygon(OUTLINE, fill=255)
    portrait.putalpha(mask.filter(ImageFilter.GaussianBlur(2)))
    return portrait


def main() -> None:
    """Write the zip."""
    Path(sys.argv[1]).write_bytes(as_zip(all_photo_faults()))


if __name__ == "__main__":
    main()
