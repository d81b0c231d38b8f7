"""Bad input to `lorabooth train`, by the real command line: one sentence, exit code 2, nothing broken, and a good command goes on."""

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from lorabooth.cli import main
from lorabooth.families.flux1 import tiny
from lorabooth.mini import people
from lorabooth.runs import RunDir

ONE_STEP = ("--trigger", "TOK", "--model", "mini", "--steps", "1", "--batch-size", "1", "--lora-rank", "1", "--resolution", "64", "--preview-every", "0")

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run `lorabooth train` with arguments it must refuse; the sentence it says, after the progress bars."""

    def check(*arguments: str) -> str:
        capfd.readouterr()
        assert main(["train", *arguments]) == 2
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err and not captured.out
        # A bar ends with a carriage return or a line of its own; a stage in a process of its own says its sentence itself.
        lines = [
            line
            for line in captured.err.replace("\r", "\n").splitlines()
            if line.strip() and not re.search(r"\d%\||file/s\]", line) and not line.startswith(("note: ", "check: "))
        ]
        assert len(lines) in (1, 2) and lines[0].startswith("lorabooth"), captured.err
        assert len(lines) == 1 or lines[1].startswith("  "), captured.err
        return "\n".join(lines)

    return check


def goes_on(*arguments: str) -> None:
    """A good command works now."""
    assert main(["train", *arguments]) == 0
    assert RunDir.open(Path(arguments[arguments.index("--out") + 1])).lora.exists()


def write_zip(file: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("_", "."), data)
    return file


def demo_picture(number: int = 1) -> bytes:
    with zipfile.ZipFile(people.DEMO_ZIP) as demo:
        return demo.read(f"photo-{number:02d}.png")


def test_no_zip_then_bad_ones_then_a_good_one(tmp_path: Path, refused: Refused):
    file, out = tmp_path / "photos.zip", tmp_path / "run"
    command = [str(file), *ONE_STEP, "--out", str(out)]
    assert "no such file or folder" in refused(*command)
    assert not out.exists()
    file.write_bytes(b"")
    assert "not a zip" in refused(*command)
    write_zip(file)
    assert "is empty" in refused(*command)
    write_zip(file, a_txt=b"words", b_txt=b"more words")
    assert "no photo that can be used, only 2 text files" in refused(*command)
    write_zip(file, a_jpg=b"no picture")
    assert "a.jpg" in refused(*command)
    write_zip(file, a_png=demo_picture())
    file.write_bytes(file.read_bytes()[:-30])
    assert "damaged or cut off" in refused(*command)
    assert not (out / "photos").exists() and not (out / "manifest.jsonl").exists() and not list(out.glob("*.part"))
    write_zip(file, a_png=demo_picture())
    goes_on(*command)


def test_one_photo_is_noted_and_a_corrupted_one_among_good_ones_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = demo_picture(2)
    write_zip(tmp_path / "photos.zip", good_png=demo_picture(), broken_png=broken[: len(broken) // 2])
    goes_on(str(tmp_path / "photos.zip"), *ONE_STEP, "--out", str(tmp_path / "run"))
    notes = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("note: ")]
    assert "note: broken.png is damaged or not a picture: left out" in notes
    assert [note for note in notes if "only 1 photo" in note]
    assert [file.name for file in (tmp_path / "run" / "photos").iterdir()] == ["00001.png"]


def test_a_missing_or_bad_trigger_is_refused_before_anything_is_written(demo_photos: Path, tmp_path: Path, refused: Refused):
    out = tmp_path / "run"
    assert "--trigger-word TOK" in refused(str(demo_photos), "--model", "mini", "--out", str(out))
    for trigger in ("", "  ", "a\nb"):
        assert "trigger_word" in refused(str(demo_photos), "--trigger", trigger, "--model", "mini", "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("learning_rat: 0.1\n", "did you mean 'learning_rate'"),
        ("steps: [\n", "is not valid YAML"),
        ("steps: 0\n", "steps: should be greater than or equal to 1 (got '0')"),
        ("- steps\n", "'name: value' lines"),
        ("7: 3\n", "unknown setting '7'"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_written(recipe: str, words: str, demo_photos: Path, tmp_path: Path, refused: Refused):
    (tmp_path / "recipe.yaml").write_text(recipe)
    said = refused(str(demo_photos), "--trigger", "TOK", "--model", "mini", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "words"), [("--recipe", "folder"), ("--seed", "seed")])
def test_a_value_of_the_wrong_kind_is_refused_before_anything_is_written(option: str, words: str, demo_photos: Path, tmp_path: Path, refused: Refused):
    value = {"--recipe": str(tmp_path), "--seed": "9" * 30}[option]
    assert words in refused(str(demo_photos), *ONE_STEP, option, value, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused_and_the_right_one_may_follow(demo_photos: Path, tmp_path: Path, refused: Refused):
    command = [str(demo_photos), *ONE_STEP, "--out", str(tmp_path / "run")]
    assert "unknown model 'mni'" in refused(*command, "--model", "mni")
    goes_on(*command)


def test_layers_that_the_model_lacks_are_refused_and_the_right_ones_may_follow(demo_photos: Path, tmp_path: Path, refused: Refused):
    command = [str(demo_photos), *ONE_STEP, "--out", str(tmp_path / "run")]
    assert "'nothing' matches no layer" in refused(*command, "--targets", "nothing")
    assert "is not a regular expression" in refused(*command, "--targets", "(")
    goes_on(*command)


def test_a_stage_that_fails_in_a_process_of_its_own_is_one_sentence(demo_photos: Path, tmp_path: Path, refused: Refused):
    # Any model but 'mini' trains in processes of its own: this is how FLUX.1-dev says that it is gated.
    model = tiny(tmp_path / "model")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    said = refused(str(demo_photos), *ONE_STEP, "--model", str(model), "--out", str(tmp_path / "run"))
    assert "its vae cannot be loaded" in said


def test_photos_and_run_in_one_folder_are_refused_and_the_photos_stay(demo_photos: Path, tmp_path: Path, refused: Refused):
    photos = tmp_path / "photos"
    photos.mkdir()
    with zipfile.ZipFile(demo_photos) as archive:
        archive.extractall(photos)
    before = sorted(file.name for file in photos.iterdir())
    assert "is not a lorabooth run" in refused(str(photos), *ONE_STEP, "--out", str(photos))
    assert sorted(file.name for file in photos.iterdir()) == before
    # Inside the photos is fine, and the run's own copies are not taken for photos.
    goes_on(str(photos), *ONE_STEP, "--out", str(photos / "run"))
    goes_on(str(photos), *ONE_STEP, "--out", str(photos / "run"))
    assert len(list((photos / "run" / "photos").iterdir())) == 3


def test_a_run_of_other_photos_or_another_recipe_is_refused_and_kept(
    demo_photos: Path, tiny_command: list[str], tiny_run: Path, tmp_path: Path, refused: Refused
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    other = write_zip(tmp_path / "other.zip", a_png=demo_picture(9))
    assert "was started from" in refused(str(other), *tiny_command[2:], "--out", str(run))
    assert "steps was 4 and is now 5" in refused(*tiny_command[1:], "--steps", "5", "--out", str(run))
    # The run's own copies are not the photos it was started from.
    assert "was started from" in refused(str(run / "photos"), *tiny_command[2:], "--out", str(run))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("gone", [("manifest.jsonl",), ("source.json",), ("manifest.jsonl", "source.json")], ids=" and ".join)
def test_a_deleted_record_does_not_let_other_photos_in(
    gone: tuple[str, ...], demo_photos: Path, tiny_command: list[str], tiny_run: Path, tmp_path: Path, refused: Refused
):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    photos = tmp_path / demo_photos.name
    write_zip(photos, a_png=demo_picture(7), b_png=demo_picture(8), c_png=demo_picture(9))
    (run / "source.json").write_text((run / "source.json").read_text().replace(str(demo_photos.parent), str(tmp_path)))
    for name in gone:
        (run / name).unlink()
    assert "has changed since the run" in refused(str(photos), *tiny_command[2:], "--out", str(run))
    shutil.copyfile(demo_photos, photos)
    if len(gone) == 1:
        goes_on(str(photos), *tiny_command[2:], "--out", str(run))


def test_an_archive_of_another_name_is_the_same_photos(demo_photos: Path, tmp_path: Path, refused: Refused):
    command = [*ONE_STEP, "--out", str(tmp_path / "run")]
    goes_on(str(demo_photos), *command)
    for name in ("renamed.zip", "again.zip"):
        renamed = Path(shutil.copyfile(demo_photos, tmp_path / name))
        goes_on(str(renamed), *command)
    write_zip(renamed, a_png=demo_picture())
    assert "has changed since the run" in refused(str(renamed), *command)


def test_names_that_are_no_text_and_photos_like_threads_are_trained_on(tmp_path: Path, refused: Refused):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / os.fsdecode(b"f\xe9te.png")).write_bytes(demo_picture())
    Image.new("RGB", (2048, 3), "teal").save(photos / "thread.png")
    goes_on(str(photos), *ONE_STEP, "--out", str(tmp_path / "run"))
    assert "is not text in UTF-8" in refused(str(photos), *ONE_STEP, "--out", str(tmp_path / os.fsdecode(b"r\xfcn")))


def test_what_is_neither_a_file_nor_a_folder_is_not_read(tmp_path: Path, refused: Refused):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        assert f"{place} is neither a file nor a folder" in refused(str(place), *ONE_STEP, "--out", str(tmp_path / "run"))


def test_a_rank_that_pissa_cannot_have_is_refused_before_the_run_is_bound(demo_photos: Path, tmp_path: Path, refused: Refused):
    out = ("--lora-init", "pissa", "--out", str(tmp_path / "run"))
    said = refused(str(demo_photos), *ONE_STEP, "--targets", "all-linear", "--lora-rank", "225", *out)
    assert "lora_rank is 225; with lora_init pissa it is at most 224" in said and not (tmp_path / "run").exists()
    # Nor by photos that were taken in and not used.
    assert "none is left to train on" in refused(str(demo_photos), *ONE_STEP, "--validation-photos", "3", *out)
    assert "it is at most 224" in refused(str(demo_photos), *ONE_STEP, "--targets", "all-linear", "--lora-rank", "225", *out)
    goes_on(str(demo_photos), *ONE_STEP, "--lora-rank", "2", *out)
    (start,) = (tmp_path / "run").glob("lora-start*")
    before = start.read_bytes()
    start.write_bytes(before[:100])
    (tmp_path / "run" / "lora.safetensors").unlink()
    assert f"{start} is damaged\n  start a new run" in refused(str(demo_photos), *ONE_STEP, "--lora-rank", "2", *out)
    start.unlink()
    assert f"{start} is gone, with which the LoRA began" in refused(str(demo_photos), *ONE_STEP, "--lora-rank", "2", *out)
    # Before the first checkpoint it can be made again.
    start.write_bytes(before[:100])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert f"{start} is damaged\n  delete that file" in refused(str(demo_photos), *ONE_STEP, "--lora-rank", "2", *out)
    start.unlink()
    goes_on(str(demo_photos), *ONE_STEP, "--lora-rank", "2", *out)
    assert start.read_bytes() == before


def test_photos_that_were_deleted_from_a_run_are_named_with_what_brings_them_back(demo_photos: Path, tmp_path: Path, refused: Refused):
    run, command = tmp_path / "run", [str(demo_photos), *ONE_STEP, "--out", str(tmp_path / "run")]
    goes_on(*command)
    for name in ("photos", "cache", "checkpoints"):
        shutil.rmtree(run / name)
    assert "is gone\n  delete" in refused(*command)
    (run / "manifest.jsonl").unlink()
    goes_on(*command)


def test_a_trigger_word_longer_than_the_encoder_sees_is_named(tmp_path: Path, refused: Refused):
    file = write_zip(tmp_path / "photos.zip", a_png=demo_picture())
    assert "the trigger word is too long: the text encoder sees 48 tokens" in refused(
        str(file), *ONE_STEP, "--trigger", "ab " * 33, "--out", str(tmp_path / "run")
    )


@pytest.mark.parametrize("word", ["{a|b}", "a|b", "a}", "a\\_b", "__a__"])
def test_a_trigger_that_a_prompt_would_read_as_a_wildcard_is_refused_for_a_new_run(word: str, demo_photos: Path, tmp_path: Path, refused: Refused):
    said = refused(str(demo_photos), *ONE_STEP, "--trigger", word, "--out", str(tmp_path / "run"))
    assert "which are wildcards in prompts" in said and not (tmp_path / "run").exists()


def test_a_recipe_that_nothing_was_made_with_does_not_bind_the_run(demo_photos: Path, tmp_path: Path, refused: Refused):
    out = str(tmp_path / "run")
    assert "none is left to train on" in refused(str(demo_photos), *ONE_STEP, "--validation-photos", "3", "--out", out)
    assert not (tmp_path / "run" / "cache").exists()
    goes_on(str(demo_photos), *ONE_STEP, "--validation-photos", "1", "--out", out)
    # Where the figures go is no part of the recipe.
    goes_on(str(demo_photos), *ONE_STEP, "--validation-photos", "1", "--trackers", "none", "--out", out)
    assert RunDir.open(tmp_path / "run").config.trackers == "none"
    assert "validation_photos was 1" in refused(str(demo_photos), *ONE_STEP, "--out", out)


def test_photos_that_could_not_be_used_do_not_bind_the_run(demo_photos: Path, tmp_path: Path, refused: Refused):
    empty = write_zip(tmp_path / "empty.zip")
    out = str(tmp_path / "run")
    refused(str(empty), *ONE_STEP, "--lora-rank", "2", "--out", out)
    goes_on(str(demo_photos), *ONE_STEP, "--out", out)


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_in_place_of_the_run_is_one_sentence(out: str, demo_photos: Path, tmp_path: Path, refused: Refused):
    (tmp_path / "file").write_text("x")
    refused(str(demo_photos), *ONE_STEP, "--out", str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "x"


def test_a_name_too_long_for_a_folder_is_no_traceback(demo_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    photos = Path(shutil.copy(demo_photos, tmp_path / ("p" * 200 + ".zip")))
    assert main(["train", str(photos), *ONE_STEP, "--trigger", "T" * 100]) in (0, 2)


def test_a_run_of_another_process_is_refused(tiny_command: list[str], tiny_run: Path, refused: Refused):
    with RunDir.open(tiny_run).locked():
        assert "another lorabooth process" in refused(*tiny_command[1:], "--out", str(tiny_run))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a 1 MB disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_said_at_each_stage_and_the_same_command_goes_on(demo_photos: Path, small_disk: Path, refused: Refused):
    run = RunDir(small_disk / "run")
    command = [str(demo_photos), *ONE_STEP, "--lora-rank", "16", "--out", str(run.path)]
    ballast = small_disk / "ballast"
    # kB left free: not enough for the photos; for the photos but not the caches; for the caches but not a checkpoint.
    for free_kb, done in ((12, "config.json"), (60, "manifest.jsonl"), (400, "cache")):
        used_kb = sum(-(-file.stat().st_size // 4096) * 4 for file in run.path.rglob("*") if file.is_file()) if run.path.exists() else 0
        ballast.write_bytes(bytes((1024 - used_kb - free_kb) * 1024))
        assert "the disk is full" in refused(*command)
        assert (run.path / done).exists() and not run.lora.exists()
        assert not [file for file in run.path.rglob("*") if ".part" in file.name]
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    goes_on(*command)
