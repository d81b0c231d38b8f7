"""Captions: the trigger, prefix and suffix are in every one; what the user wrote is kept."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from captioning.caption import run
from lorabooth.captions import enforce
from lorabooth.config import Subject, load_config
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.photos import Manifest, Photo, ingest
from lorabooth.runs import RunDir
from train import encode

TEMPLATE_NOTE = "the template, 'a photo of TOK, a person': it does not say what is in the photo; write your own, or give --caption-model"


def make_run(folder: Path, captions: list[str | None], **config: object) -> Path:
    """A run with these supplied captions; the template needs no picture files. The model is one without a GPU's captioner."""
    photos = [Photo(f"{i:05d}.png", f"{i}.png", 64, 64, "0" * 64, caption) for i, caption in enumerate(captions, 1)]
    (folder / "manifest.jsonl").write_text(Manifest(tuple(photos), ()).to_jsonl())
    (folder / "config.json").write_text(json.dumps({"trigger_word": "TOK", "model": "mini"} | config))
    return folder


def captions(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((folder / "captions").glob("*.txt"))]


@pytest.mark.parametrize(
    ("text", "prefix", "suffix", "expected"),
    [
        ("a photo of [trigger], a person", "", "", "a photo of TOK, a person"),
        ("a man \n on  a\tbeach ", "", "", "TOK, a man on a beach"),
        ("", "", "", "TOK"),
        ("a man in TOKYO", "", "", "TOK, a man in TOKYO"),
        ("a tok", "", "", "TOK, a tok"),
        ("TOK's dog", "", "", "TOK's dog"),
        ("a man", "a photo of [trigger],", "", "a photo of TOK, a man"),
        ("a photo of TOK, a man", "a photo of TOK, ", "", "a photo of TOK, a man"),
        ("a photo of TOK, a man", "a photo of TOK", "", "a photo of TOK, a man"),
        ("P P a man", "P", "", "P TOK, a man"),
        ("apple", "a", "", "a TOK, apple"),
        ("TOK smiles", "", ", studio light", "TOK smiles, studio light"),
        ("TOK smiles, studio light, studio light", "", ", studio light", "TOK smiles, studio light"),
        ("smiles", "a", "like TOK", "a smiles like TOK"),
        ("", "a", "a", "a TOK a"),
    ],
)
def test_trigger_prefix_and_suffix_are_enforced_once(text: str, prefix: str, suffix: str, expected: str):
    assert enforce(text, "TOK", prefix, suffix) == expected
    assert enforce(expected, "TOK", prefix, suffix) == expected


@pytest.mark.parametrize("trigger", ["TOK", "@tok", "t.k+", "ohwx man", "名"])
def test_any_trigger_is_taken_literally(trigger: str):
    assert enforce("a man", trigger) == f"{trigger}, a man"
    assert enforce(f"a photo of {trigger}, smiling", trigger) == f"a photo of {trigger}, smiling"


def test_photos_without_a_caption_get_the_template_with_prefix_and_suffix(tmp_path: Path):
    make_run(tmp_path, [None, None], autocaption_prefix="best:", autocaption_suffix="indoors")
    [note] = run(tmp_path)
    assert note.startswith("2 captions are the template, 'best: a photo of TOK, a person indoors': it does not say what is in the photo")
    assert captions(tmp_path) == ["best: a photo of TOK, a person indoors"] * 2
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == ["00001.txt", "00002.txt"]


@pytest.mark.parametrize(
    ("subject", "prefix", "expected"),
    [
        ("person", "a drawing of [trigger],", "a drawing of TOK, a person"),
        ("person", "a drawing of TOK", "a drawing of TOK, a person"),
        ("person", "TOK, a person,", "TOK, a person,"),
        ("person", "best", "best a photo of TOK, a person"),
        ("style", "a drawing of [trigger]", "a drawing of TOK"),
    ],
)
def test_a_prefix_with_the_trigger_takes_the_place_of_the_templates_opening(subject: Subject, prefix: str, expected: str, tmp_path: Path):
    make_run(tmp_path, [None], autocaption_prefix=prefix, subject=subject)
    run(tmp_path)
    assert captions(tmp_path) == [expected]


def test_without_autocaption_the_trigger_is_the_caption(tmp_path: Path):
    make_run(tmp_path, [None, "TOK by the sea"], autocaption=False, autocaption_prefix="best:")
    assert run(tmp_path) == []
    assert captions(tmp_path) == ["TOK", "TOK by the sea"]


@pytest.mark.parametrize(
    ("style", "phrase", "expected"),
    [("person", "a man", "a photo of TOK, a man"), ("object", "a cat", "a photo of TOK, a cat"), ("style", "a person", "a picture in the style of TOK")],
)
def test_the_template_says_the_class_phrase_but_for_a_style(tmp_path: Path, style: str, phrase: str, expected: str):
    run(make_run(tmp_path, [None], subject=style, class_phrase=phrase))
    assert captions(tmp_path) == [expected]


def test_supplied_captions_are_kept_byte_for_byte_and_train_with_the_trigger(tmp_path: Path):
    supplied = ["  [trigger] by\r\n the sea \n", "\ufeffa man", "TOKYO", "TOK\u2028 smiles", "海"]
    make_run(tmp_path, [*supplied, None], autocaption_prefix="P", autocaption_suffix="S")
    assert run(tmp_path)[0] == "3 of 5 supplied captions lack TOK: training puts it before them, the files stay as they are"
    written = [path.read_bytes().decode() for path in sorted((tmp_path / "captions").iterdir())]
    assert written == [*supplied, "P a photo of TOK, a person S"]
    trained = [encode.training_text(RunDir(tmp_path), load_family("mini"), f"{i:05d}") for i in range(1, 7)]
    assert trained == ["TOK by the sea", "TOK, a man", "TOK, TOKYO", "TOK smiles", "TOK, 海", "P a photo of TOK, a person S"]


def test_what_is_written_into_a_caption_by_hand_trains_with_the_trigger_too(tmp_path: Path):
    run(make_run(tmp_path, [None]))
    file = tmp_path / "captions/00001.txt"
    file.write_text("a man\nin a hat")
    assert encode.training_text(RunDir(tmp_path), load_family("mini"), "00001") == "TOK, a man in a hat"
    file.write_bytes("Café".encode("latin-1"))
    with pytest.raises(UserError, match=r"00001\.txt is not UTF-8 text"):
        encode.training_text(RunDir(tmp_path), load_family("mini"), "00001")


def test_a_supplied_caption_that_t5_would_cut_before_the_trigger_keeps_it(tmp_path: Path):
    family = load_family("mini")
    make_run(tmp_path, ["a man in a blue shirt. " * 20 + "This is TOK."])
    run(tmp_path)
    text = encode.training_text(RunDir(tmp_path), family, "00001")
    assert text.startswith("TOK, a man in a blue shirt. a man") and text.endswith("shirt.") and family.cut(text) == ""


def test_captions_of_a_zip_are_kept_to_the_byte(tmp_path: Path):
    supplied = {"a": b"\xef\xbb\xbfTOK  smiles\r\n", "b": "Ünïcode, 雪 \t".encode()}
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i, (name, text) in enumerate(supplied.items()):
            Image.new("RGB", (32, 32), (i * 90, 0, 0)).save(tmp_path / f"{name}.png")
            archive.write(tmp_path / f"{name}.png", f"{name}.png")
            archive.writestr(f"{name}.txt", text)
    folder = tmp_path / "run"
    RunDir.create(folder, load_config(None, {"trigger_word": "TOK", "model": "mini"}))
    ingest(tmp_path / "photos.zip", folder)
    run(folder)
    assert [file.read_bytes() for file in sorted((folder / "captions").iterdir())] == list(supplied.values())


def test_only_what_is_missing_is_written(tmp_path: Path):
    make_run(tmp_path, [None, "TOK", None])
    assert run(tmp_path) == [f"2 captions are {TEMPLATE_NOTE}"]
    (tmp_path / "captions/00001.txt").write_text("by hand")
    (tmp_path / "captions/00003.txt").unlink()
    assert run(tmp_path) == [f"1 caption is {TEMPLATE_NOTE}"]
    assert run(tmp_path) == []
    assert captions(tmp_path) == ["by hand", "TOK", "a photo of TOK, a person"]


def test_a_captioner_is_given_the_pictures_in_order_and_must_answer_for_each(tmp_path: Path):
    class Numbered:
        name, opening, key = "numbered", "", ""

        def caption(self, images: list[Path]) -> list[str]:
            return [f"photo {image.name}" for image in images]

    class Silent(Numbered):
        def caption(self, images: list[Path]) -> list[str]:
            return []

    make_run(tmp_path, [None] * 20)
    with pytest.raises(ValueError):
        run(tmp_path, Silent())
    run(tmp_path, Numbered())
    assert captions(tmp_path) == [f"TOK, photo {i:05d}.png" for i in range(1, 21)]


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="is not a lorabooth run"):
        run(tmp_path)
    (tmp_path / "config.json").write_text('{"trigger_word": "TOK"}')
    with pytest.raises(UserError, match="has no photos yet"):
        run(tmp_path)


def test_the_command_prints_notes_and_needs_no_torch(tmp_path: Path):
    make_run(tmp_path, ["a man"], model="black-forest-labs/FLUX.1-dev")
    code = "import sys; from captioning.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "note: 1 of 1 supplied captions lack TOK: training puts it before them, the files stay as they are\n")
    (tmp_path / "mini").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(make_run(tmp_path / "mini", [None]))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, f"note: 1 caption is {TEMPLATE_NOTE}\n")
    done = subprocess.run([sys.executable, "-m", "captioning"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: python -m captioning RUN" in done.stderr
