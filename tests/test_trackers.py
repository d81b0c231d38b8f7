"""Trackers: the real ones write what a run logs, and none can lose a training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lorabooth.cli import main
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.runs import RunDir
from tests.test_processes import untrained
from train import fit
from train.trackers import check_trackers, identity

KEY = "0123456789abcdef" * 3


def events(folder: Path) -> list[tuple[int, str, str]]:
    """(step, tag, kind) of every value in TensorBoard's files."""
    files = sorted(folder.rglob("events.*"))
    read = [event for file in files for event in EventFileLoader(str(file)).Load()]
    return [(event.step, value.tag, value.metadata.plugin_data.plugin_name) for event in read for value in event.summary.value]


def test_tensorboard_gets_losses_validation_and_previews(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", preview_every=2, validation_photos=1, validation_every=2)
    fit.run(run)
    seen = events(run.path / "tensorboard")
    assert [step for step, tag, _ in seen if tag == "loss"] == [1, 2, 3, 4]
    assert [step for step, tag, _ in seen if tag == "validation_loss"] == [0, 2, 4]
    assert [(step, kind) for step, tag, kind in seen if tag.startswith("preview")] == [(0, "images"), (2, "images"), (4, "images")]


@pytest.mark.parametrize("broken", ["gone", "full"])
def test_a_chart_that_cannot_be_written_is_one_note_and_costs_no_training(broken: str, tiny_run: Path, tmp_path: Path, monkeypatch, capfd):
    run, step = untrained(tiny_run, tmp_path / "run", validation_photos=1, validation_every=2), fit.train_step

    def step_and_break(trainer: fit.Trainer) -> object:
        if trainer.state.step == 1:
            [file] = (run.path / "tensorboard").rglob("events.*")
            file.unlink() if broken == "full" else shutil.rmtree(run.path / "tensorboard")
            if broken == "full":
                file.symlink_to("/dev/full")
        return step(trainer)

    monkeypatch.setattr(fit, "train_step", step_and_break)
    fit.run(run)
    said = capfd.readouterr().err
    assert said.count("note: tensorboard gets nothing more of this run") == 1 and "Traceback" not in said
    assert [row["step"] for row in run.history() if "loss" in row and row.get("event") != "validation"] == [1, 2, 3, 4] and fit.finished(run)


def test_no_tracker_leaves_no_trace(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", trackers="none")
    fit.run(run)
    assert not (run.path / "tensorboard" / "lorabooth").exists() and len([row for row in run.history() if "loss" in row]) == 4


def test_a_run_that_is_pushed_or_watched_elsewhere_stays_the_same_run(run: RunDir):
    before = identity(run)
    os.utime(run.path / "config.json", ns=(1, 1))
    RunDir.create(run.path, run.config.model_copy(update={"hf_repo_id": "me/tok", "trackers": "none"}))
    assert run.config.hf_repo_id == "me/tok" and identity(run) == before


def test_wandb_writes_a_run_without_network(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", trackers="wandb", wandb_project="portraits", wandb_run="ada", preview_every=4)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-m", "train", "fit", str(run.path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [folder] = (run.path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb")) and len(list((folder / "files" / "media" / "images").glob("preview*.png"))) == 2


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = untrained(tiny_run, tmp_path / "run", trackers="wandb")
    for name, value in {"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"a tracker \(wandb\) cannot start: .+") as refused:
        fit.run(run)
    assert "--trackers" in refused.value.hint and not run.checkpoints.exists()


@pytest.mark.parametrize(
    ("project", "environment", "message", "hint"),
    [
        ("p", {}, "No API key configured", "log in with wandb login"),
        ("p", {"WANDB_API_KEY": "bad"}, "API key must have 40+ characters, has 3", "WANDB_API_KEY"),
        ("p", {"WANDB_MODE": "garbage"}, "mode: Input should be 'online', 'offline'", "WANDB_MODE"),
        ("../x", {"WANDB_MODE": "offline"}, "Invalid project name '../x'", "--wandb-project"),
        ("p", {"WANDB_MODE": "offline"}, "", ""),
        ("p", {"WANDB_MODE": "disabled"}, "", ""),
        ("p", {"WANDB_API_KEY": KEY}, "", ""),
    ],
)
def test_a_wandb_that_cannot_start_is_noticed_before_the_photos_are_read(
    project: str, environment: dict[str, str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), **environment}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "photos").mkdir()
    command = ["train", str(tmp_path / "photos"), "--trigger", "TOK", "--model", "mini", "--trackers", "wandb", "--wandb-project", project]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert message in said and hint in said and ("cannot start" in said) == bool(message)
    assert ("photos is empty" in said) != bool(message), "where nothing is wrong with it, the photos are next"
    assert (tmp_path / "run").exists() != bool(message)


def test_a_tracker_that_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], tiny_command: list[str], tmp_path: Path):
    with pytest.raises(UserError, match="trackio is not installed"):
        check_trackers(TrainConfig(trigger_word="TOK", trackers="tensorboard, trackio"))
    assert main([*tiny_command, "--trackers", "chalk", "--out", str(tmp_path / "run")]) == 2
    assert "trackers: must be none, or some of tensorboard, wandb, trackio by commas" in capsys.readouterr().err


def test_the_key_switches_wandb_on_and_is_written_nowhere(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "lorabooth", *tiny_command, "--wandb-api-key", KEY, "--out", str(run.path)]
    done = subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and KEY not in done.stdout + done.stderr, done.stderr
    assert run.config.tracker_names == ("tensorboard", "wandb")
    assert not [file for file in run.path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_inputs_of_the_hosted_trainer_that_need_no_wandb():
    config = TrainConfig.model_validate(
        {"trigger_word": "TOK", "wandb_sample_interval": 7, "wandb_save_interval": 9, "wandb_sample_prompts": "TOK by the sea\n\nTOK at home\n"}
    )
    assert (config.preview_every, config.checkpoint_every, config.preview_prompts) == (7, 9, ("TOK by the sea", "TOK at home"))
    with pytest.raises(ValueError, match="another name of preview_every"):
        TrainConfig.model_validate({"trigger_word": "TOK", "wandb_sample_interval": 7, "preview_every": 8})
