"""The consent of the people in the photos: asked once, recorded in every run, passed on with the LoRA."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth import consent
from lorabooth.cli import main
from lorabooth.config import Subject, TrainConfig, load_config
from lorabooth.errors import UserError
from lorabooth.families.flux1 import tiny
from lorabooth.lora_file import LoraFile
from lorabooth.runs import RunDir
from train import export
from train.command import RECIPES

WITHOUT_PHOTOS = ("--trigger", "TOK", "--steps", "1", "--lora-rank", "1", "--resolution", "64")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user who has not been asked yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "settings" / "lorabooth" / "consent.json"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("consent") / "model")


def config_of(subject: Subject = "person", model: str = "black-forest-labs/FLUX.1-dev") -> TrainConfig:
    return TrainConfig(trigger_word="TOK", subject=subject, model=model)


def in_terminal(answer: str, *command: str) -> tuple[int, str]:
    """Exit code and screen of `lorabooth train` in a terminal where this is typed."""
    try:
        ours, theirs = pty.openpty()
    except OSError:
        pytest.skip("this machine has no terminals (/dev/pts is not mounted)")
    os.write(ours, answer.encode())
    process = subprocess.Popen([sys.executable, "-m", "lorabooth", "train", *command], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 4096):
            screen += part
    except OSError:  # Linux says so when the last process has left the terminal
        pass
    os.close(ours)
    return process.wait(60), screen.decode()


def test_at_a_terminal_it_is_asked_once_and_recorded_in_every_run(tmp_path: Path, settings: Path, model: Path):
    empty = tmp_path / "photos"
    empty.mkdir()
    # A folder without photos: what ends the training comes after the question.
    command = [str(empty), *WITHOUT_PHOTOS, "--model", str(model)]
    code, screen = in_terminal("n\n", *command, "--out", str(tmp_path / "no"))
    assert code == 2 and "[y/N]" in screen and "nothing was trained" in screen
    assert not (tmp_path / "no").exists() and not settings.exists()
    code, screen = in_terminal("y\n", *command, "--out", str(tmp_path / "one"))
    assert "[y/N]" in screen and "is empty" in screen
    first = json.loads((tmp_path / "one/consent.json").read_text())
    assert first["way"] == "terminal" and json.loads(settings.read_text()) == first
    # Neither the next command of that run nor another run asks again, with a terminal or without.
    assert "[y/N]" not in in_terminal("", *command, "--out", str(tmp_path / "one"))[1]
    assert main(["train", *command, "--out", str(tmp_path / "two")]) == 2
    assert json.loads((tmp_path / "two/consent.json").read_text()) == first | {"way": "remembered"}
    assert json.loads((tmp_path / "one/consent.json").read_text()) == first


def test_without_a_terminal_the_option_is_asked_for_before_anything_is_written(tmp_path: Path, settings: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photos").mkdir()
    command = ["train", str(tmp_path / "photos"), *WITHOUT_PHOTOS, "--model", str(model), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "needs that person's consent" in said and "add --consent" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists() and not settings.exists()
    assert main([*command, "--consent"]) == 2 and "is empty" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/consent.json").read_text())["way"] == "option"
    assert main([*command[:-1], str(tmp_path / "next")]) == 2 and "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("subject", "model"), [("person", "mini"), ("object", "black-forest-labs/FLUX.1-dev"), ("style", "black-forest-labs/FLUX.1-dev")])
def test_drawn_people_things_and_styles_need_none(tmp_path: Path, settings: Path, subject: Subject, model: str):
    config = config_of(subject, model)
    assert not consent.needed(config) and consent.obtain(config, RunDir(tmp_path), option=False) is None
    # Who gives it all the same is taken at their word.
    given = consent.obtain(config, RunDir(tmp_path), option=True)
    assert given and given.way == "option"


def test_the_shipped_recipes_say_what_their_photos_show():
    subjects = {recipe.stem: load_config(recipe, {"trigger_word": "TOK"}).subject for recipe in RECIPES.glob("*.yaml")}
    assert {name for name, subject in subjects.items() if subject != "person"} == {"object", "style"}
    assert (subjects["object"], subjects["style"]) == ("object", "style")


@pytest.mark.parametrize("content", ["", "junk", "[]", "{}", '{"statement": 1}'])
def test_a_damaged_answer_is_asked_for_again(tmp_path: Path, settings: Path, content: str):
    settings.parent.mkdir(parents=True)
    settings.write_text(content)
    with pytest.raises(UserError, match="needs that person's consent"):
        consent.obtain(config_of(), RunDir(tmp_path), option=False)


@pytest.mark.parametrize("home", ["file", "none"])
def test_a_home_that_cannot_be_written_does_not_stop_a_training(tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file") if home == "file" else "not/absolute")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    consent.record(run, consent.obtain(config_of(), run, option=True))
    assert "cannot be remembered" in capsys.readouterr().err
    assert consent.recorded(run) is not None and consent.obtain(config_of(), run, option=False) is None
    assert not Path("not").exists()


def test_the_lora_and_its_report_say_whose_word_it_is(tiny_run: Path, tmp_path: Path, settings: Path):
    assert "consent" not in LoraFile.read(RunDir(tiny_run).lora).metadata and "has agreed" not in (tiny_run / "report.html").read_text()
    given = consent.Consent(consent.STATEMENT, "2026-11-23T12:00:00Z", "terminal")
    run = RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    consent.record(run, given)
    export.run(run)
    sentence = (
        "Everyone who can be recognised in the photos has agreed to their use for this training, or their guardian has. (So its maker stated on 2026-11-23.)"
    )
    assert LoraFile.read(run.lora).metadata["lorabooth.consent"] == sentence == given.sentence()
    assert sentence in (run.path / "report.html").read_text()
