"""A run on disk: whole files or none, one process at a time, and a recipe that stays."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.runs import RunDir, write_durable

CONFIG = TrainConfig(trigger_word="TOK", model="mini", steps=4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a 1 MB disk takes root; the limit on file sizes below stands in for it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_durable_write_is_whole_and_replaces_what_was_there(tmp_path: Path):
    file = tmp_path / "new" / "a.bin"
    write_durable(file, b"old")
    write_durable(file, b"n" * 100_000)
    assert file.read_bytes() == b"n" * 100_000
    assert os.listdir(file.parent) == ["a.bin"]


def test_a_write_on_a_full_disk_leaves_the_old_file_and_no_litter(small_disk: Path):
    file = small_disk / "a.bin"
    write_durable(file, b"old")
    with pytest.raises(OSError) as caught:
        write_durable(file, b"n" * (2 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["a.bin"]


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_litter(tmp_path: Path):
    # Without root: the kernel cuts the write after 64 kB, in a process of its own since such a limit cannot be lifted again.
    file = tmp_path / "a.bin"
    write_durable(file, b"old")
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom lorabooth.runs import write_durable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    write_durable(Path(sys.argv[1]), b'n' * 200_000)\nexcept OSError as error:\n    sys.exit(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], timeout=120, check=False)
    assert done.returncode == errno.EFBIG
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_writer_killed_at_any_time_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    file = tmp_path / "a.bin"
    program = (
        "import sys\nfrom pathlib import Path\nfrom lorabooth.runs import write_durable\n"
        "for i in range(1, 1_000_000):\n    write_durable(Path(sys.argv[1]), bytes([i % 251]) * 300_000)\n    if i == 1: print('started', flush=True)\n"
    )
    seen = set()
    for delay_s in (0.0, 0.013, 0.037):
        process = subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
        time.sleep(delay_s)
        process.kill()
        process.wait(timeout=60)
        data = file.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1, "torn"
        seen.add(data[0])
    assert seen


def test_a_run_that_exists_is_opened_again_with_the_same_recipe(tmp_path: Path):
    first = RunDir.create(tmp_path / "run", CONFIG)
    second = RunDir.create(tmp_path / "run", CONFIG)
    assert first.path == second.path and second.config == CONFIG
    assert RunDir.open(tmp_path / "run").config == CONFIG


def test_another_recipe_is_refused_and_each_change_is_said(tmp_path: Path):
    RunDir.create(tmp_path / "run", CONFIG).cache.mkdir()
    with pytest.raises(UserError) as caught:
        RunDir.create(tmp_path / "run", CONFIG.model_copy(update={"steps": 9, "lora_rank": 8}))
    assert "steps was 4 and is now 9" in caught.value.message and "lora_rank was 16 and is now 8" in caught.value.message
    assert "seed" not in caught.value.message
    assert RunDir.open(tmp_path / "run").config == CONFIG


def test_a_run_that_has_made_nothing_yet_takes_another_recipe(tmp_path: Path):
    RunDir.create(tmp_path / "run", CONFIG).write_json("manifest.jsonl", {})
    other = CONFIG.model_copy(update={"steps": 9})
    assert RunDir.create(tmp_path / "run", other).config == RunDir.open(tmp_path / "run").config == other


def test_a_folder_of_other_things_never_becomes_a_run(tmp_path: Path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a lorabooth run"):
        RunDir.create(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_file_in_place_of_the_run_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="is not a lorabooth run"):
        RunDir.create(tmp_path / "run", CONFIG)


def test_a_start_that_was_killed_does_not_block_the_run(tmp_path: Path):
    # What a kill between the two system calls of a durable write leaves behind.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123.part").write_bytes(b"{")
    assert RunDir.create(tmp_path / "run", CONFIG).config == CONFIG


def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"trigger_word": "TOK", "unknown": 1}'])
def test_a_damaged_recipe_of_a_run_is_one_sentence(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        _ = RunDir.open(tmp_path).config


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path):
    run = RunDir.create(tmp_path / "run", CONFIG)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lorabooth.runs import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="another lorabooth process is working on") as caught, run.locked():
            pass
        assert len(caught.value.message.splitlines()) == 1 and caught.value.hint
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    with run.locked():
        pass


def test_the_lock_is_free_after_an_error_inside_it(tmp_path: Path):
    run = RunDir.create(tmp_path / "run", CONFIG)
    with pytest.raises(ZeroDivisionError), run.locked():
        _ = 1 / 0
    with run.locked():
        pass


def test_metrics_keep_the_later_of_two_lines_for_a_step_and_skip_a_torn_one(tmp_path: Path):
    run = RunDir.create(tmp_path / "run", CONFIG)
    assert run.history() == []
    for step, loss in ((1, 0.5), (2, 0.4), (3, 0.3)):
        run.log(step=step, loss=loss)
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in run.history()] == [1, 2, 3]
    # The resumed run goes back to step 3; its first line must not be lost to the torn one before it.
    run.log(step=3, loss=0.25)
    run.log(step=4, loss=0.2)
    assert [(row["step"], row["loss"]) for row in run.history()] == [(1, 0.5), (2, 0.4), (3, 0.25), (4, 0.2)]


def test_json_of_a_run_comes_back_and_is_none_where_there_is_none(tmp_path: Path):
    run = RunDir.create(tmp_path / "run", CONFIG)
    assert run.read_json("source.json") is None
    run.write_json("source.json", {"photos": "/a/Zoë.zip"})
    assert run.read_json("source.json") == {"photos": "/a/Zoë.zip"}
    assert json.loads((run.path / "config.json").read_text())["trigger_word"] == "TOK"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_no_name_that_is_taken(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("this disk has no hard links")))
    write_durable(tmp_path / "a", b"first", new=True)
    with pytest.raises(FileExistsError):
        write_durable(tmp_path / "a", b"second", new=True)
    assert [(file.name, file.read_bytes(), file.stat().st_nlink) for file in tmp_path.iterdir()] == [("a", b"first", 1)]
