"""Disks that are full or cannot all that others can, runs that are moved away, and what a kill -9 leaves."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorabooth import checkpoints, parts
from lorabooth.cli import main
from lorabooth.runs import RunDir, write_durable
from train import encode, fit

WRITER = (
    "import sys\nfrom pathlib import Path\nfrom lorabooth.runs import durable_file\n"
    "with durable_file(Path(sys.argv[1])) as file:\n    file.write(b'half')\n    file.flush()\n    print('begun', flush=True)\n    sys.stdin.read()\n"
)


def writer(file: Path) -> subprocess.Popen[str]:
    """A process in the middle of a durable write."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_without_locks_is_one_sentence(
    code: int, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    assert main([*tiny_command, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"the disk of {tmp_path / 'run'} cannot lock files ({os.strerror(code)})" in said and "choose another place with --out" in said


def test_a_disk_that_syncs_files_only_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sync, codes = os.fsync, [errno.EINVAL, errno.ENOTSUP, errno.EIO]

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(codes[0], os.strerror(codes[0]))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    for _ in range(2):
        write_durable(tmp_path / "a", b"a")
        codes.pop(0)
    with pytest.raises(OSError):
        write_durable(tmp_path / "a", b"a")


@pytest.mark.parametrize(("module", "function"), [(fit, "train_step"), (encode, "write_cached")], ids=["trained", "encoded"])
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "deleted"])
def test_a_run_that_is_moved_or_deleted_while_it_works_is_said_and_not_begun_anew(
    module: Any, function: str, moved: bool, tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder, elsewhere, work, calls = tmp_path / "run", tmp_path / "elsewhere", getattr(module, function), []

    def work_and_move(*inputs: Any) -> Any:
        calls.append(inputs)
        if len(calls) == 2:
            folder.rename(elsewhere) if moved else shutil.rmtree(folder)
        return work(*inputs)

    monkeypatch.setattr(module, function, work_and_move)
    assert main([*tiny_command, "--out", str(folder)]) == 2
    assert f"the run folder {folder} is gone: it was moved or deleted\n" in capsys.readouterr().err
    assert not folder.exists()
    monkeypatch.undo()
    assert main([*tiny_command, "--out", str(elsewhere if moved else folder)]) == 0


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_living_one_writes_stays(tmp_path: Path):
    killed, living = writer(tmp_path / "lora.safetensors"), writer(tmp_path / "lora.safetensors")
    killed.kill()
    killed.communicate()
    assert len(os.listdir(tmp_path)) == 2
    others = [tmp_path / f".lora.safetensors.0123456789abcdef-{number}-1.part" for number in (1, 2)]  # of another machine
    for part in (*others, tmp_path / ".mine.part", tmp_path / ".lora.1-2.part"):
        part.touch()
    os.utime(others[1], (time.time() - parts.LEFT_SECONDS - 9,) * 2)
    write_durable(tmp_path / "other", b"whole")
    left = set(os.listdir(tmp_path))
    assert not any(f"-{killed.pid}-" in name for name in left) and any(f"-{living.pid}-" in name for name in left)
    assert left >= {"other", ".mine.part", ".lora.1-2.part", others[0].name} and others[1].name not in left
    living.communicate()
    assert living.returncode == 0 and (tmp_path / "lora.safetensors").read_bytes() == b"half"


def test_a_run_without_proc_leaves_the_parts_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "_place", lambda: "f" * 16)
    killed = writer(tmp_path / "a")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    write_durable(tmp_path / "b", b"")
    assert len(os.listdir(tmp_path)) == 2


def test_a_kill_before_the_oldest_checkpoint_was_dropped_leaves_two_all_the_same(run: RunDir, tiny_command: list[str]):
    [older, _] = checkpoints.folders(run)
    shutil.copytree(older, run.checkpoints / "step-000001")
    assert main([*tiny_command, "--out", str(run.path)]) == 0
    assert [folder.name for folder in checkpoints.folders(run)] == ["step-000002", "step-000004"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127 + "n", "n" + "ü" * 127, "n" + "\udcff" * 254])
def test_every_name_that_the_disk_takes_can_be_written(name: str, tmp_path: Path):
    for data in (b"old", b"new"):
        write_durable(tmp_path / name, data)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(OSError) as caught:
        write_durable(tmp_path / f"{name}n", b"")
    assert caught.value.errno == errno.ENAMETOOLONG and caught.value.filename == str(tmp_path / f"{name}n")
    assert os.listdir(tmp_path) == [name]
