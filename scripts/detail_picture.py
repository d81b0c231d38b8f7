"""`python -m scripts.detail_picture`: what the detail pass does for a far-away person, measured on the mini model, and docs/images/detail.png.

People are drawn small into a drawn landscape, and the pass is to turn them into the person of a LoRA. Two kinds: a stranger, of whom nothing
is right; and a vague figure, which has the person's hair and skin, but no glasses and no beard, or those of another, and is blurred, as
models draw people who are far away. The mini model itself draws portraits only, so the wide picture is composed: this measures the pass,
not a model's skill with far-away people.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.detail import Detail, redraw_faces
from infer.engine import Engine
from infer.likeness import DrawnLikeness
from infer.loras import LoraChoice, resolve
from infer.request import Request
from infer.spots import Spot, drawn_faces
from lorabooth.mini import people, resemblance, world
from train.command import recipe_config, train_run

TRIGGER = "TOK"
SIZE_PX = (320, 192)
PERSON_PX = 56
STRENGTHS = ("subtle", "normal", "strong", "0.95")
KINDS = ("vague", "stranger")
ROWS = {"vague": 2, "stranger": 1}
"""In the picture: the first scenes of a kind in which the finder found somebody."""
BLUR_PX = 28
"""To which a vague figure is reduced before it is enlarged again."""
BETWEEN_PX = 12
SHOWN = 4
"""Times that heads are enlarged in the picture."""


@dataclass(frozen=True)
class Scene:
    """A wide picture with a small stranger; `empty` is the same without them."""

    picture: Image.Image
    empty: Image.Image
    frame: tuple[int, int, int, int]
    prompt: str
    spots: list[Spot]


def landscape(rng: random.Random) -> Image.Image:
    """Sky, mountains, meadow and a road; four times as large and reduced, for smooth edges."""
    width, height = (4 * side for side in SIZE_PX)
    image = Image.new("RGB", (width, height), "#bfe0f2")
    draw = ImageDraw.Draw(image)
    for base, colour, tops in ((0.62, "#9fb6c9", 7), (0.68, "#7d9c86", 5)):
        points = [(i * width / tops, height * (base - rng.uniform(0.08, 0.34) * (i % 2))) for i in range(tops + 1)]
        draw.polygon([(0, height), *points, (width, height)], fill=colour)
    draw.rectangle((0, height * 0.66, width, height), fill="#8fb56a")
    draw.polygon([(0, height * 0.8), (width, height * 0.74), (width, height * 0.88), (0, height * 0.98)], fill="#8a8d91")
    return image.resize(SIZE_PX, Image.Resampling.LANCZOS)


def bicycle(image: Image.Image, middle: int, ground: int) -> None:
    """Two wheels and a frame under the rider."""
    big = image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(big)
    for x in (middle - 17, middle + 17):
        draw.ellipse(tuple(4 * v for v in (x - 11, ground - 22, x + 11, ground)), outline="#22262b", width=6)
    corners = [(middle - 17, ground - 11), (middle - 7, ground - 25), (middle + 11, ground - 25), (middle + 17, ground - 11), (middle, ground - 11)]
    draw.line([(4 * x, 4 * y) for x, y in (*corners, corners[0])], fill="#c8342c", width=8)
    image.paste(big.resize(image.size, Image.Resampling.LANCZOS))


def scene(number: int, who: world.Person, kind: str) -> Scene:
    """The same for the same number, person and kind."""
    rng = random.Random(f"detail/{number}")
    empty = landscape(rng)
    left, top = rng.randrange(20, SIZE_PX[0] - PERSON_PX - 20), 80 + rng.randrange(8)
    bicycle(empty, left + PERSON_PX // 2, top + PERSON_PX + 25)
    other = world.sample_person(rng)
    other["beard"] = rng.choice([v for v in world.values("beard", held_out=False) if v != who["beard"]])
    other["glasses"] = rng.choice([v for v in world.values("glasses", held_out=False) if v != who["glasses"]])
    if kind == "vague":
        other |= {a: who[a] for a in ("hair", "hair_color", "skin")}
    frame = (left, top, left + PERSON_PX, top + PERSON_PX)
    key = tuple(sorted((a, v) for a, v in other.items() if a != "background"))
    avatar = world.avatar_image(key, PERSON_PX).crop((0, 0, PERSON_PX, PERSON_PX))
    if kind == "vague":
        avatar = avatar.resize((BLUR_PX, BLUR_PX), Image.Resampling.LANCZOS).resize(avatar.size, Image.Resampling.BICUBIC)
    picture = empty.copy()
    picture.paste(avatar, frame[:2], avatar)
    said = [a for a in world.SCENE if a != "background"]
    return Scene(picture, empty, frame, world.describe(other, rng, who=TRIGGER, say=said, form=0), drawn_faces(picture))


def identity_right(picture: Image.Image, one: Scene, who: world.Person) -> float:
    """The share of the LoRA's person's attributes that the small person shows, against the true background."""
    return resemblance.share_right(picture.crop(one.frame), who, one.empty.crop(one.frame))


def unchanged_outside(one: Scene, after: Image.Image) -> bool:
    """Whether all but the oval's box is the same to the bit."""
    changed = np.any(np.asarray(one.picture) != np.asarray(after), axis=-1)
    for spot in one.spots[:1]:
        left, top, right, bottom = spot.oval
        changed[max(top, 0) : bottom, max(left, 0) : right] = False
    return not changed.any()


def measure(name: str, run: Path, scenes: list[Scene], engine: Engine) -> tuple[dict[str, object], list[Image.Image]]:
    """One person in one kind of scenes: shares right before and after, by strength; and the pictures of the strong pass."""
    loras: tuple[LoraChoice, ...] = (resolve(str(run)),)
    who = people.HELD_OUT[name]
    likeness = DrawnLikeness([photo.image() for photo in people.photos(name, TRIGGER)])
    before = [identity_right(one.picture, one, who) for one in scenes]
    row: dict[str, object] = {"before": round(float(np.mean(before)), 3), "found": sum(bool(one.spots) for one in scenes)}
    shown: list[Image.Image] = []
    for strength in STRENGTHS:
        detail = Detail.parse(f"face:{strength}")
        after, old, same = [], 0, True
        for i, one in enumerate(scenes):
            request = Request(one.prompt, 128, 128, seed=i, num_inference_steps=20)
            done = redraw_faces(engine, request, i, one.picture, loras, detail, likeness, lambda _, spots=one.spots: list(spots))
            after.append(identity_right(done.image, one, who))
            old += sum(face.kept for face in done.faces)
            same &= unchanged_outside(one, done.image)
            if strength == "strong":
                shown.append(done.image)
        worse = sum(a < b for a, b in zip(after, before, strict=True))
        row[strength] = {"after": round(float(np.mean(after)), 3), "worse": worse, "old_kept": old, "outside_same": same}
    return row, shown


def sheet(scenes: list[Scene], after: list[Image.Image], photo: Image.Image) -> Image.Image:
    """Rows of before, after, and both heads enlarged; the photo of the person in the corner of the first."""
    big = PERSON_PX * SHOWN
    width, height = SIZE_PX[0] * 3 // 2, SIZE_PX[1] * 3 // 2
    columns = [("before", width), ("after: --detail face:strong", width), ("before, enlarged", big), ("after, enlarged", big), ("a training photo", big)]
    page = Image.new("RGB", (sum(w for _, w in columns) + BETWEEN_PX * 6, 30 + len(scenes) * (height + BETWEEN_PX)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    for row, (one, new) in enumerate(zip(scenes, after, strict=True)):
        x, y = BETWEEN_PX, 30 + row * (height + BETWEEN_PX)
        heads = [image.crop(one.frame).resize((big, big), Image.Resampling.LANCZOS) for image in (one.picture, new)]
        wide = [image.resize((width, height), Image.Resampling.LANCZOS) for image in (one.picture, new)]
        for (title, column), image in zip(columns, [*wide, *heads, photo.resize((big, big), Image.Resampling.LANCZOS)], strict=True):
            if row == 0:
                draw.text((x, 5), title, fill="black", font=font)
            page.paste(image, (x, y))
            x += column + BETWEEN_PX
    return page


def main() -> None:
    """Train where need be, measure each person, write the JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m scripts.detail_picture", description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=Path("build/likeness"), help="folder of trained runs by name, as scripts.likeness makes them; what is missing is trained"
    )
    parser.add_argument("--people", nargs="*", default=list(people.HELD_OUT), choices=list(people.HELD_OUT))
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/detail.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/detail.png"))
    a = parser.parse_args()
    engine = Engine("mini")
    results: dict[str, dict[str, object]] = {}
    rows: list[tuple[Scene, Image.Image]] = []
    for name in a.people:
        if not (a.runs / name / "lora.safetensors").exists():
            a.runs.mkdir(parents=True, exist_ok=True)
            people.write_zip(a.runs / f"{name}.zip", people.photos(name, "[trigger]"))
            train_run(a.runs / f"{name}.zip", recipe_config(None, {"model": "mini", "trigger_word": TRIGGER}), a.runs / name)
        results[name] = {}
        for kind in KINDS:
            scenes = [scene(i, people.HELD_OUT[name], kind) for i in range(a.scenes)]
            results[name][kind], after = measure(name, a.runs / name, scenes, engine)
            print(name, kind, json.dumps(results[name][kind]), flush=True)
            if name == a.people[0]:
                rows += [(one, new) for one, new in zip(scenes, after, strict=True) if one.spots][: ROWS[kind]]
    a.picture.parent.mkdir(parents=True, exist_ok=True)
    page = sheet([one for one, _ in rows], [after for _, after in rows], people.photos(a.people[0], TRIGGER)[0].image())
    page.quantize(256).save(a.picture, optimize=True)
    a.result.parent.mkdir(parents=True, exist_ok=True)
    a.result.write_text(json.dumps({"scenes": a.scenes, "person_px": PERSON_PX, "people": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
