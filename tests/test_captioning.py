"""Captions: the trigger, prefix and suffix are in every one; what the user wrote is kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.caption import enforce, run
from captioning.template import TemplateCaptioner
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, Photo


def make_run(folder: Path, captions: list[str | None], **config: str) -> Path:
    """A run with these supplied captions; the template needs no picture files."""
    photos = [Photo(f"{i:05d}.png", f"{i}.png", 64, 64, "0" * 64, caption) for i, caption in enumerate(captions, 1)]
    (folder / "manifest.jsonl").write_text(Manifest(tuple(photos), ()).to_jsonl())
    (folder / "config.json").write_text(json.dumps({"trigger_word": "TOK"} | config))
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
    assert run(tmp_path) == []
    assert captions(tmp_path) == ["best: a photo of TOK, a person indoors"] * 2
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == ["00001.txt", "00002.txt"]


def test_without_autocaption_the_trigger_is_the_caption(tmp_path: Path):
    make_run(tmp_path, [None, "TOK by the sea"], autocaption=False, autocaption_prefix="best:")
    assert run(tmp_path) == []
    assert captions(tmp_path) == ["TOK", "TOK by the sea"]


def test_the_class_word_is_a_choice(tmp_path: Path):
    run(make_run(tmp_path, [None]), TemplateCaptioner("cat"))
    assert captions(tmp_path) == ["a photo of TOK, a cat"]


def test_supplied_captions_are_kept_and_get_the_trigger_if_they_lack_it(tmp_path: Path):
    make_run(tmp_path, ["  [trigger] by\n the sea \n", "a man", "TOKYO", None], autocaption_prefix="P", autocaption_suffix="S")
    assert run(tmp_path) == ["TOK was put before 2 of 3 supplied captions, which lacked it"]
    assert captions(tmp_path) == ["TOK by\n the sea", "TOK, a man", "TOK, TOKYO", "P a photo of TOK, a person S"]


def test_only_what_is_missing_is_written(tmp_path: Path):
    make_run(tmp_path, [None, "TOK", None])
    run(tmp_path)
    (tmp_path / "captions/00001.txt").write_text("by hand")
    (tmp_path / "captions/00003.txt").unlink()
    run(tmp_path)
    assert captions(tmp_path) == ["by hand", "TOK", "a photo of TOK, a person"]


def test_a_captioner_is_given_the_pictures_in_order_and_must_answer_for_each(tmp_path: Path):
    class Numbered:
        name = "numbered"

        def caption(self, images: list[Path]) -> list[str]:
            return [image.name for image in images]

    class Silent(Numbered):
        def caption(self, images: list[Path]) -> list[str]:
            return []

    make_run(tmp_path, [None] * 20)
    with pytest.raises(ValueError):
        run(tmp_path, Silent())
    run(tmp_path, Numbered())
    assert captions(tmp_path) == [f"TOK, {i:05d}.png" for i in range(1, 21)]


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="is not a lorabooth run"):
        run(tmp_path)
    (tmp_path / "config.json").write_text('{"trigger_word": "TOK"}')
    with pytest.raises(UserError, match="has no photos yet"):
        run(tmp_path)


def test_the_command_prints_notes_and_needs_no_torch(tmp_path: Path):
    make_run(tmp_path, ["a man"])
    code = "import sys; from captioning.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "note: TOK was put before 1 of 1 supplied captions, which lacked it\n")
    done = subprocess.run([sys.executable, "-m", "captioning"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: python -m captioning RUN" in done.stderr
