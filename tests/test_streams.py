"""A standard error that fails, or is a log file, costs no work: real processes, whose streams are pipes without a reader, full disks and files."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorabooth.runs import RunDir
from train.checkpoint import verified

LOUD = {"TQDM_MININTERVAL": "0"}


def lorabooth(arguments: list[str], stderr: int, **changed: str) -> subprocess.Popen[bytes]:
    """The command, listening to Ctrl-C even where the tests run as a background job."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorabooth", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=os.environ | changed,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(pattern: str, descriptor: int, process: subprocess.Popen[Any]) -> None:
    said, end = "", time.monotonic() + 120
    while not re.search(pattern, said):
        assert process.poll() is None and time.monotonic() < end, said
        if select.select([descriptor], [], [], 1)[0]:
            said += os.read(descriptor, 1000).decode(errors="replace")


def long(tiny_command: list[str], folder: Path) -> list[str]:
    return [*tiny_command, "--steps", "9999", "--checkpoint-every", "9999", "--preview-every", "0", "--out", str(folder)]


def test_a_ctrl_c_that_also_ends_the_reader_of_what_is_said_loses_no_step(tiny_command: list[str], tmp_path: Path):
    """`lorabooth train ... 2>&1 | tee log`."""
    reading, writing = os.pipe()
    process = lorabooth(long(tiny_command, tmp_path / "run"), writing, **LOUD)
    os.close(writing)
    read_until(r"\| [1-9]\d*/9999", reading, process)
    os.close(reading)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    [checkpoint] = RunDir(tmp_path / "run").checkpoints.iterdir()
    assert verified(checkpoint)


def test_a_terminal_that_is_closed_ends_the_training_with_its_state_saved(tiny_command: list[str], tmp_path: Path):
    try:
        terminal, end = pty.openpty()
    except OSError:
        pytest.skip("there are no terminals here")
    termios.tcsetwinsize(end, (24, 80))
    process = lorabooth(long(tiny_command, tmp_path / "run"), end, **LOUD)
    os.close(end)
    read_until(r"\| [1-9]\d*/9999", terminal, process)
    os.close(terminal)  # whoever writes to it is told of an error
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 130
    [checkpoint] = RunDir(tmp_path / "run").checkpoints.iterdir()
    assert verified(checkpoint)


def test_a_training_whose_words_nobody_can_hear_goes_on_to_its_end(tiny_command: list[str], tmp_path: Path):
    """`2>&1 | head -c 100`, and `2>log` on a full disk."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full:
        for name, descriptor in (("pipe", writing), ("disk", full.fileno())):
            assert lorabooth([*tiny_command, "--out", str(tmp_path / name)], descriptor, **LOUD).wait(timeout=120) == 0
            assert RunDir(tmp_path / name).lora.exists()
    os.close(writing)


@pytest.mark.parametrize("arguments", [["loras", "info", "none"], ["nosuch"], []], ids=" ".join)
def test_a_problem_of_the_user_keeps_its_code_where_it_cannot_be_said(arguments: list[str]):
    with open("/dev/full", "wb") as full:
        assert lorabooth(arguments, full.fileno()).wait(timeout=120) == 2


def test_standard_output_that_cannot_be_written_is_a_failure_all_the_same():
    for unbuffered in ("", "1"):
        with open("/dev/full", "wb") as full:
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run([sys.executable, "-m", "lorabooth", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
        assert done.returncode == 2 and done.stderr.startswith("lorabooth: the disk is full") and "ignored" not in done.stderr, done.stderr


def test_a_stage_by_hand_is_as_deaf(tiny_run: Path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "train", "export", str(tiny_run)], stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(tiny_run / "lora.safetensors")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that take a second or more to check, where a bar is redrawn ten times a second."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(6):
        Image.effect_noise((9, 9), 40 + i).convert("RGB").resize((1600, 1600)).save(folder / f"{i}.jpg")
    return folder


@pytest.mark.parametrize(("given", "often"), [("", False), ("0", True), ("often", False)])
def test_a_log_file_gets_few_redraws_unless_the_user_says_otherwise(large: Path, given: str, often: bool):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    environment = clean | ({"TQDM_MININTERVAL": given} if given else {})
    done = subprocess.run([sys.executable, "-m", "lorabooth", "check", str(large)], env=environment, capture_output=True, text=True, check=False)
    drawn = re.findall(r"check photos:.*?\| (\d+)/6", done.stderr)
    assert (len(drawn) > 3) is often and drawn[0] == "0" and drawn[-1] == "6", done.stderr


def test_the_bar_of_a_training_in_a_log_file_is_drawn_at_its_begin_and_end(tiny_command: list[str], tmp_path: Path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    command = [sys.executable, "-m", "lorabooth", *tiny_command, "--steps", "40", "--preview-every", "0", "--out", str(tmp_path / "run")]
    said = subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stderr
    drawn = re.findall(r"train:.*?\| (\d+)/40", said)
    assert (drawn[0], drawn[-1]) == ("0", "40") and len(drawn) < 8 and re.search(r"40/40 .*loss=\d", said), said


def test_no_entry_point_imports_tqdm_before_its_settings_are_made():
    program = "import sys, lorabooth.cli, train.__main__, captioning.__main__; print('tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
