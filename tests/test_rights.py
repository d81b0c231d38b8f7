"""Files and folders that the user may not read or write."""

import zipfile
from pathlib import Path

import pytest

from lorabooth.photos import Manifest
from tests.rights import lorabooth


@pytest.fixture
def photos(demo_photos: Path, tmp_path: Path) -> Path:
    """The photos in a folder."""
    with zipfile.ZipFile(demo_photos) as archive:
        archive.extractall(tmp_path / "photos")
    return tmp_path / "photos"


def test_a_photo_that_may_not_be_read_is_left_out_of_the_training(tiny_command: list[str], photos: Path, tmp_path: Path):
    first, *others = sorted(photos.glob("*.png"))
    first.chmod(0)
    (photos / "more").mkdir()
    (photos / "more" / "more.png").write_bytes(others[0].read_bytes())
    (photos / "more").chmod(0o444)
    command = [*tiny_command[:1], photos, *tiny_command[2:], "--out", tmp_path / "run"]
    done = lorabooth(*command)
    assert done.returncode == 0, done.stderr
    for name in (first.name, "more/more.png"):
        assert f"{name} cannot be read (Permission denied): left out" in done.stderr
    manifest = Manifest.load(tmp_path / "run")
    assert [photo.original for photo in manifest.photos] == [file.name for file in others]
    again = lorabooth(*command)
    assert again.returncode == 0, "it is the same run"


def test_without_a_photo_that_may_be_read_there_is_no_training(tiny_command: list[str], photos: Path, tmp_path: Path):
    for file in photos.iterdir():
        file.chmod(0)
    done = lorabooth(*tiny_command[:1], photos, *tiny_command[2:], "--out", tmp_path / "run")
    assert done.returncode == 2 and "has no photo that can be used" in done.stderr and "Permission denied" in done.stderr


@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_place_for_a_lora_that_may_not_be_written_to_is_named_before_the_work(command: str, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o555)
    done = lorabooth(command, tmp_path / "nothing", "--format", "kohya", "--out", tmp_path / "closed" / "x.safetensors")
    assert done.returncode == 2 and f"permission denied: {tmp_path / 'closed'}" in done.stderr and "x.safetensors" not in done.stderr
