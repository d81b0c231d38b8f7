"""Likeness to the training photos, and keeping the best of several pictures."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from infer import best, picture
from infer.album import PHOTOS_LIMIT, Album
from infer.engine import Output
from infer.likeness import DinoLikeness, DrawnLikeness, load_dino
from infer.loras import resolve
from infer.request import Request
from infer.spots import face_crop
from lorabooth.check import faces
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.mini import people, world

GRACE_HOPPER = Path(__file__).parent.parent / "scripts" / "grace_hopper.jpg"
FAST = ("--model", "mini", "--steps", "2", "--width", "64", "--height", "64", "--seed", "5")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights: it tells pictures apart, though not well."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with photos of ada."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, one in enumerate(people.photos("ada", "TOK", 4)):
        one.image().save(folder / f"{i}.png")
    return folder


# DINOv2


def test_a_photo_itself_is_liker_than_another_picture(dino: Path):
    drawn = [one.image() for one in people.photos("ada", "TOK", 4)]
    likeness = DinoLikeness(drawn, dino)
    assert 0 < likeness.own <= 1
    assert likeness.picture(drawn[0]) > likeness.picture(Image.new("RGB", (64, 64), "navy"))
    assert likeness.picture(drawn[0]) == likeness.picture(drawn[0])


def test_photos_that_are_all_the_same_picture_score_one(dino: Path):
    same = [people.photos("ada", "TOK", 1)[0].image()] * 3
    assert DinoLikeness(same, dino).picture(same[0]) == pytest.approx(1, abs=1e-3)
    assert DinoLikeness(same[:1], dino).picture(same[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.skipif(faces.detector() is None, reason="no face detector here")
def test_photos_with_faces_are_compared_by_faces(dino: Path):
    with Image.open(GRACE_HOPPER) as file:
        photo = file.convert("RGB")
    crop = face_crop(photo)
    assert crop and crop.width == crop.height < photo.width
    elsewhere = Image.new("RGB", (1000, 800), "darkgreen")
    elsewhere.paste(photo, (300, 100))
    of_faces = DinoLikeness([photo], dino)
    assert of_faces.of_faces and of_faces.picture(elsewhere) == pytest.approx(1, abs=0.05)
    landscape = Image.new("RGB", (100, 100), "green")
    assert not DinoLikeness([landscape, landscape, photo], dino).of_faces


def test_only_safetensors_are_read(dino: Path, tmp_path: Path):
    shutil.copy(dino / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_dino(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((dino / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_dino(tmp_path)


def test_without_the_model_and_the_network_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_dino()
    assert "facebook/dinov2-small" in caught.value.message and "hf download" in caught.value.hint


# Drawings


def test_a_drawing_is_scored_by_what_is_right(photos: Path):
    likeness = DrawnLikeness(Album.at(photos).photos())
    assert likeness.who == people.HELD_OUT["ada"]
    assert likeness.picture(people.new_scenes("ada", "TOK", 1)[0].image()) == 1
    assert likeness.picture(world.draw(world.sample_person(random.Random(1)))) < 0.5


# Albums


def test_the_photos_of_a_run_are_found_by_its_lora(tiny_run: Path, photos: Path, tmp_path: Path):
    album = Album.for_request(None, (resolve(str(tiny_run)),))
    assert album and album == Album.at(tiny_run) and len(album.photos()) == 3
    assert Album.for_request(photos, (resolve(str(tiny_run)),)) == Album.at(photos)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tiny_run / "lora.safetensors", alone / "TOK.safetensors")
    assert Album.for_request(None, (resolve(str(alone)),)) is None


def test_a_folder_may_hold_other_things(photos: Path):
    (photos / "notes.txt").write_text("x")
    (photos / "broken.jpg").write_bytes(b"x")
    Image.new("L", (8, 8)).save(photos / "0.mask.png")
    assert len(Album.at(photos).photos()) == 4


def test_of_many_photos_some_of_all_are_taken(tmp_path: Path):
    for i in range(PHOTOS_LIMIT + 3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
    found = Album.at(tmp_path).photos()
    assert 25 <= len(found) <= PHOTOS_LIMIT and found[-1].getpixel((0, 0)) == (52, 0, 0)


# Best of N


def test_pictures_are_ranked_in_groups_and_equals_stay_in_order():
    class ByRed:
        name = "red"

        def picture(self, image: Image.Image) -> float:
            return float(image.getpixel((0, 0))[0])  # type: ignore[index]

        face = picture

    request = Request("a", 64, 64, 0)
    drawn = [(request, Output(Image.new("RGB", (1, 1), (red, 0, 0)), seed)) for seed, red in enumerate([3, 9, 9, 1, 2, 5])]
    rows = list(best.ranked(iter(drawn), 3, ByRed()))
    assert [[row.output.seed for row in group] for group in rows] == [[1, 2, 0], [5, 4, 3]]
    assert best.table(rows[0], 1, "red").splitlines()[1:] == ["  * seed 1           9.000", "    seed 2           9.000", "    seed 0           3.000"]


def test_the_best_are_kept_with_their_scores(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompt, out = "a portrait of TOK, {smiling|laughing}", tmp_path / "out"
    assert main(["generate", prompt, "--lora", str(tiny_run), *FAST, "-n", "2", "--best-of", "4", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    files = json.loads(captured.out)
    assert [Path(file["file"]).name for file in files] == ["out-0.webp", "out-1.webp", "contact-sheet.png"]
    scores = [file["likeness"]["score"] for file in files[:2]]
    assert scores == sorted(scores, reverse=True) and all(f["likeness"]["best_of"] == 4 and f["likeness"]["by"] == "drawing" for f in files[:2])
    assert {file["seed"] for file in files[:2]} < {5, 6, 7, 8}
    assert captured.err.count("* seed") == 2 and captured.err.count("  seed") == 2 and "of 4 pictures; 2 kept" in captured.err
    assert picture.making_of(out / "out-0.webp")["likeness"] == files[0]["likeness"]
    # The kept picture is the one that its seed makes by itself.
    seed = str(files[0]["seed"])
    assert main(["generate", prompt, "--lora", str(tiny_run), *FAST[:-1], seed, "--out", str(tmp_path / "one")]) == 0
    with Image.open(out / "out-0.webp") as kept, Image.open(tmp_path / "one" / "out-0.webp") as alone:
        assert kept.tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--best-of", "4"], ["no photos to compare with", "--like FOLDER"]),
        (["--best-of", "1", "--like", "."], ["1", "above --num-outputs"]),
        (["--best-of", "65", "--like", "."], ["65", "64"]),
        (["--best-of", "4", "--like", "nowhere"], ["nowhere", "not a folder"]),
        (["--best-of", "4", "--like", "empty"], ["empty", "no photos"]),
        (["--like", "."], ["--like", "--best-of"]),
    ],
)
def test_without_anything_to_compare_it_is_one_sentence(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["generate", "a portrait", *FAST, *options, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said and not (tmp_path / "out").exists(), said


def test_photos_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert main(["generate", "a portrait", *FAST, "--best-of", "2", "--like", str(tmp_path)]) == 2
    assert "a.jpg" in capsys.readouterr().err
