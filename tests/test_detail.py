"""The detail pass: which faces, how strongly, and that nothing else changes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer import picture, spots
from infer.detail import NOISE, Detail, face_prompt, face_seed, oval_mask, redraw_faces
from infer.engine import Engine
from infer.finish import Finishing
from infer.finish_options import FACES_LIMIT, FinishOptions
from infer.loras import LoraChoice, resolve
from infer.request import Request, Source
from infer.spots import Spot
from lorabooth.check import faces
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Flux1
from lorabooth.mini import people, world

GRACE_HOPPER = Path(__file__).parent.parent / "scripts" / "grace_hopper.jpg"
SPOT = Spot((60, 40, 84, 68), (40, 24, 104, 88), (46, 28, 98, 80))
OTHER = Spot((130, 40, 150, 64), (110, 24, 174, 88), (116, 28, 168, 80))
REQUEST = Request("a portrait of TOK, smiling", 128, 128, seed=7, num_inference_steps=4)


class Large(Flux1):
    """FLUX.1-dev's size and schedule."""

    native_px = 1024
    shift_config = {"base_tokens": 256, "max_tokens": 4096, "base_shift": 0.5, "max_shift": 1.15}  # noqa: RUF012


@dataclass
class Fixed:
    """A measure that gives the scores it was given, in turn."""

    scores: list[float]
    name: str = "fixed"

    def picture(self, image: Image.Image) -> float:
        return self.face(image)

    def face(self, crop: Image.Image) -> float:
        return self.scores.pop(0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("mini")


@pytest.fixture(scope="module")
def lora(tiny_run: Path) -> LoraChoice:
    return resolve(str(tiny_run))


def wide() -> Image.Image:
    """A wide picture with texture all over, so that any change shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (112, 192, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.paste(world.draw(people.photos("ada", "TOK")[0].truth, 64, 64), (40, 24))
    return image


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return np.any(np.asarray(before) != np.asarray(after), axis=-1)


def test_strengths_are_levels_of_noise_and_so_other_shares_of_the_steps_at_other_sizes():
    large, small = Large("mini"), Flux1("mini")
    for steps in (10, 20, 28, 50):
        for name, level in NOISE.items():
            for family, tokens in ((large, 4096), (small, 64)):
                share = Detail(name).share(family, steps)
                sigmas = family.sigmas(steps, tokens).tolist()
                done = int(np.ceil(steps * share))
                assert sigmas[steps - done] >= level and (done == 1 or sigmas[steps - done + 1] < level)
    shares = {name: Detail(name).share(large, 50) for name in NOISE}
    assert shares == pytest.approx({"subtle": 0.2, "normal": 0.3, "strong": 0.5}, abs=0.03)
    assert all(Detail(name).share(small, 50) > share for name, share in shares.items())
    assert Detail(0.35).share(large, 28) == 0.35


def test_strengths_are_written_behind_a_colon():
    assert Detail.parse("face") == Detail("normal") and Detail.parse("face:strong").strength == "strong"
    assert Detail.parse("face:0.35", "a face", 2) == Detail(0.35, "a face", 2)


@pytest.mark.parametrize("text", ["hands", "face:much", "face:0", "face:1.5", "face:nan", ""])
def test_other_strengths_are_one_sentence(text: str):
    with pytest.raises(UserError, match=r"--detail"):
        Detail.parse(text)


def test_the_number_of_faces_has_a_limit():
    with pytest.raises(UserError, match="from 1 to 8"):
        Detail.parse("face", faces=FACES_LIMIT + 1)


def test_the_mask_is_an_oval_that_fades():
    mask = np.asarray(oval_mask(SPOT, 64))
    assert mask[30, 32] == 255 and mask[0, 0] == mask[63, 63] == 0
    assert 0 < mask[30, 7] < 255 and not mask[30, :6].any() and not mask[:4].any()
    assert np.asarray(oval_mask(SPOT, 128)).max() == 255


def test_a_square_is_moved_into_the_picture():
    assert spots.inside((-10, 50, 54, 114), (192, 100)) == (0, 36, 64, 100)
    assert spots.inside((10, 10, 210, 210), (192, 100)) == (60, 0, 160, 100)
    spot = spots._spot((2, 3, 20, 27), (192, 112))
    assert spot.crop == (0, 0, 48, 48) and spot.oval[0] < 0


def test_what_a_mask_keeps_is_not_redrawn(engine: Engine, lora: LoraChoice):
    before = wide()
    mask = Image.new("L", before.size)
    mask.paste(255, (0, 0, 72, before.height))  # half of the first face
    request = replace(REQUEST, width_px=192, height_px=112, source=Source(before, mask))
    done = redraw_faces(engine, request, 7, before, (lora,), Detail("strong"), finder=lambda _: [SPOT, OTHER])
    changes = changed(before, done.image)
    assert changes[28:80, 50:72].any() and not changes[:, 72:].any()
    assert [face.face for face in done.faces] == [SPOT.face]


def test_only_the_oval_changes_and_the_same_again_is_the_same(engine: Engine, lora: LoraChoice):
    before = wide()
    done = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail("strong"), finder=lambda _: [SPOT])
    changes = changed(before, done.image)
    left, top, right, bottom = SPOT.oval
    assert changes[top:bottom, left:right].mean() > 0.5
    changes[top:bottom, left:right] = False
    assert not changes.any()
    assert [face.face for face in done.faces] == [SPOT.face] and not done.faces[0].kept
    again = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail("strong"), finder=lambda _: [SPOT])
    other = redraw_faces(engine, REQUEST, 8, before, (lora,), Detail("strong"), finder=lambda _: [SPOT])
    assert again.image.tobytes() == done.image.tobytes() != other.image.tobytes()


def test_without_a_face_nothing_changes(engine: Engine, lora: LoraChoice):
    before = wide()
    done = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail(), finder=lambda _: [])
    assert done.image.tobytes() == before.tobytes() and not done.faces


def test_a_large_face_stays(engine: Engine, lora: LoraChoice):
    large = Spot((40, 20, 86, 66), (0, 0, 112, 112), (30, 10, 96, 76))
    done = redraw_faces(engine, REQUEST, 7, wide(), (lora,), Detail(), finder=lambda _: [large])
    assert done.large == 1 and not done.faces


def test_the_liker_face_is_kept(engine: Engine, lora: LoraChoice):
    before = wide()
    old = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail(), Fixed([0.8, 0.6]), lambda _: [SPOT])
    assert old.faces[0].kept and old.image.tobytes() == before.tobytes()
    assert old.record(Detail())["faces"] == [{"box": [60, 40, 84, 68], "kept": "old", "likeness": [0.8, 0.6]}]
    new = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail(), Fixed([0.6, 0.6]), lambda _: [SPOT])
    assert not new.faces[0].kept and new.image.tobytes() != before.tobytes()


def test_of_a_crowd_the_one_most_like_the_person_is_redrawn(engine: Engine, lora: LoraChoice):
    crowd = [SPOT, OTHER]
    first = redraw_faces(engine, REQUEST, 7, wide(), (lora,), Detail(), finder=lambda _: list(crowd))
    assert [face.face for face in first.faces] == [SPOT.face]
    liker = redraw_faces(engine, REQUEST, 7, wide(), (lora,), Detail(), Fixed([0.1, 0.7, 0.7, 0.9]), lambda _: list(crowd))
    assert [face.face for face in liker.faces] == [OTHER.face]
    both = redraw_faces(engine, REQUEST, 7, wide(), (lora,), Detail(faces=2), finder=lambda _: list(crowd))
    assert len(both.faces) == 2
    assert len({face_seed(7, 0), face_seed(7, 1), face_seed(8, 0), 7, 8}) == 5


def test_the_prompt_of_a_face_has_the_trigger_and_the_old_words(lora: LoraChoice):
    assert face_prompt("TOK on a bike", (lora,)) == "A close-up of the face of TOK. TOK on a bike"
    assert face_prompt("TOK on a bike", (lora,), mini=True) == face_prompt("TOK on a bike", ()) == "TOK on a bike"


@pytest.mark.skipif(faces.detector() is None, reason="no face detector here")
@pytest.mark.parametrize("face_px", [10, 16, 48, 150])
def test_photographed_faces_are_found_far_away(face_px: int):
    with Image.open(GRACE_HOPPER) as file:
        photo = file.convert("RGB")
    whole = faces.find(photo)
    assert whole
    scale = face_px / (whole[0].height * photo.height)
    scene = Image.new("RGB", (1024, 768), (120, 150, 110))
    scene.paste(photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS), (400, 200))
    [spot] = spots.photographed_faces(scene)
    height = spot.face[3] - spot.face[1]
    assert 0.6 * face_px < height < 1.6 * face_px
    side = spot.crop[2] - spot.crop[0]
    assert side % 16 == 0 and spot.crop[0] <= spot.face[0] and spot.face[3] <= spot.crop[3]
    assert spots.finder_for(1024) is spots.photographed_faces and spots.finder_for(128) is spots.drawn_faces


def test_without_a_detector_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faces, "detector", lambda: None)
    with pytest.raises(UserError, match="detector is not there"):
        spots.photographed_faces(wide())


def test_a_drawn_face_in_a_wide_picture_is_redrawn_as_a_portrait(engine: Engine, lora: LoraChoice, capsys: pytest.CaptureFixture[str]):
    before = Image.new("RGB", (144, 96), "#8fb8de")
    avatar = world.draw(people.photos("ada", "TOK")[0].truth | {"background": "BackgroundColor.DEFAULT"}, 48, 48)
    before.paste(avatar, (60, 30))
    [spot] = spots.drawn_faces(before)
    assert max(abs(a - b) for a, b in zip(spot.crop, (60, 30, 108, 78), strict=True)) <= 3
    done = redraw_faces(engine, REQUEST, 7, before, (lora,), Detail("strong"))
    assert changed(before, done.image).any() and [face.face for face in done.faces] == [spot.face]


def test_the_command_records_the_pass_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model", "mini", "--steps", "4", "--seed", "7", "--out", str(tmp_path), "--json"]
    assert main(["generate", "a portrait of a person", "--detail", "face:subtle", *options]) == 0
    captured = capsys.readouterr()
    assert "seed 7: " in captured.err
    [file] = json.loads(captured.out)
    made = picture.making_of(Path(file["file"]))
    assert made["detail"]["strength"] == "subtle" and made["detail"]["faces"] == [] and file["detail"] == made["detail"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--detail", "hands"], "'hands'"),
        (["--detail-prompt", "a face"], "needs --detail"),
        (["--detail", "face", "--detail-prompt", " "], "--detail-prompt"),
        (["--detail", "face", "--detail-faces", "0"], "from 1 to 8"),
    ],
)
def test_a_bad_option_is_one_sentence(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a portrait", "--model", "mini", "--seed", "1", *options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_where_likeness_cannot_be_measured_the_pass_goes_on_with_a_note(lora: LoraChoice, capsys: pytest.CaptureFixture[str]):
    finishing = Finishing.read(FinishOptions(detail="face"), 1024, (lora,), 1)
    [said] = capsys.readouterr().err.splitlines()
    assert finishing.likeness is None and said.startswith("note: ") and "dinov2" in said
