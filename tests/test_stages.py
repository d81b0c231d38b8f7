"""Stages as processes of their own, as every model but mini runs them: here a tiny FLUX pipeline in a local folder."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from infer import picture
from lorabooth.cli import main
from lorabooth.errors import out_of_memory
from lorabooth.families.flux1 import tiny
from lorabooth.lora_file import LoraFile
from lorabooth.runs import RunDir
from tests.test_processes import terminated
from train.command import default_folder

# A resolution that is no multiple of 16, and whose preview is 96 px.
SETTINGS = ("--trigger", "TOK", "--batch-size", "1", "--lora-rank", "1", "--resolution", "104")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("stages") / "tiny flux")


@pytest.fixture(scope="module")
def trained(model: Path, demo_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[str], str]:
    """A finished run, the command that made it, and what that printed."""
    run = RunDir(tmp_path_factory.mktemp("trained") / "run")
    train = ["train", str(demo_photos), "--model", str(model), *SETTINGS, "--steps", "2", "--preview-every", "2", "--out", str(run.path)]
    with redirect_stdout(StringIO()) as printed:
        assert main(train) == 0
    return run, train, printed.getvalue()


def test_a_model_in_a_local_folder_trains_and_the_printed_command_makes_a_picture(
    model: Path, trained: tuple[RunDir, list[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run, train, printed = trained
    [following] = [line.removeprefix("next:") for line in printed.splitlines() if line.startswith("next:")]
    command, *arguments = shlex.split(following)
    assert command == "lorabooth"
    assert main([*arguments, "--steps", "1", "--format", "png", "--out", str(tmp_path / "pictures")]) == 0
    assert picture.making_of(tmp_path / "pictures" / "out-0.png")["model"] == "tiny flux"
    assert str(model.parent) not in str(LoraFile.read(run.lora).metadata), "a path of this machine would travel with the file"
    before = run.lora.read_bytes()
    capfd.readouterr()
    assert main([*train, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["lora"] == str(run.lora), "what the stages' own processes print stands elsewhere"
    assert run.lora.read_bytes() == before, "the same run exported twice is the same file"
    capfd.readouterr()
    assert main(["generate", "TOK", "--lora", str(run.path), "--out", str(tmp_path)]) == 2
    assert "was trained on a local folder named 'tiny flux'" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_command_saves_and_leaves_no_stage_behind(number: signal.Signals, model: Path, demo_photos: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    train = [
        "train",
        str(demo_photos),
        "--model",
        str(model),
        *SETTINGS,
        "--steps",
        "9999",
        "--checkpoint-every",
        "9999",
        "--preview-every",
        "0",
        "--out",
        str(run.path),
    ]
    process = subprocess.Popen([sys.executable, "-m", "lorabooth", *train], stderr=subprocess.PIPE, text=True)
    said = terminated(process, run, number)
    assert process.returncode == 130, said
    assert "run the same command again" in said and "Traceback" not in said
    [checkpoint] = run.checkpoints.iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 10
    with run.locked():
        pass  # nobody holds it: the stage has ended, too


def test_the_folder_of_a_run_has_a_name_whatever_the_trigger_word_is():
    assert default_folder(Path("photos.zip"), "TOK") == Path("runs/TOK-photos") and default_folder(Path("+++"), "!!!") == Path("runs/run")


def test_photos_that_changed_since_are_refused_and_a_touched_file_is_not(demo_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos.zip"
    photos.write_bytes(demo_photos.read_bytes())
    train = ["train", str(photos), "--model", "mini", *SETTINGS, "--steps", "1", "--preview-every", "0", "--out", str(tmp_path / "run")]
    assert main(train) == 0
    os.utime(photos, (1, 1))
    assert main(train) == 0
    photos.write_bytes(demo_photos.read_bytes() + b"more")
    capsys.readouterr()
    assert main(train) == 2
    assert "has changed since the run" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_base(model: Path, trained: tuple[RunDir, list[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (run, train, _), other = trained, tiny(tmp_path / "other", seed=1)
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "cache"))
    train = [*train[:-1], str(tmp_path / "run")]
    for component in ("vae", "transformer"):
        kept = shutil.move(model / component, tmp_path / f"kept {component}")
        shutil.copytree(other / component, model / component)
        try:
            capfd.readouterr()
            assert main(train) == 2
            assert f"the {component} of {model.name} has changed since the run" in capfd.readouterr().err
        finally:
            shutil.rmtree(model / component)
            shutil.move(kept, model / component)


def test_a_standard_error_without_a_reader_ends_no_stage(trained: tuple[RunDir, list[str], str], tmp_path: Path):
    run, train, _ = trained
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "lora.safetensors").unlink()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lorabooth", *train[:-1], str(tmp_path / "run")]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=writing, check=False, timeout=300)
    os.close(writing)
    assert done.returncode == 0 and (tmp_path / "run" / "lora.safetensors").exists()


def test_memory_that_is_used_up_on_the_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import torch

    from lorabooth import cli

    def full(_: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert cli.guarded(full, []) == 2
    assert "the GPU's memory is used up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_runs_out_in_more_than_torchs_own_type(error: Exception, full: bool):
    assert out_of_memory(error) is full
