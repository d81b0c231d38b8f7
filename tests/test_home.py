"""Users without a home, as containers have them."""

import os
import pwd
from pathlib import Path

import pytest

from lorabooth.errors import UserError
from lorabooth.home import cache_folder, expanded
from lorabooth.hub import display_name, model_folder


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_home_that_nobody_has_is_left_as_it_is_written():
    assert expanded("~nosuch/llava") == Path("~nosuch/llava") and expanded("~/x").is_absolute()
    assert display_name("~nosuch/llava") == "llava"
    with pytest.raises(UserError, match="unknown model '~nosuch/flux'"):
        model_folder("~nosuch/flux")


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_home_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = cache_folder("loras")
    assert folder == tmp_path / f"lorabooth-{os.getuid()}" / "lorabooth" / "loras" and folder.parent.parent.stat().st_mode & 0o077 == 0
    folder.parent.parent.rmdir()
    (tmp_path / "everybodys").mkdir()
    folder.parent.parent.symlink_to(tmp_path / "everybodys")
    other = cache_folder("loras")
    assert other.parent.parent not in (tmp_path, folder.parent.parent) and other == cache_folder("loras") and other.parent.parent.stat().st_mode & 0o077 == 0


def test_a_home_that_is_not_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nonexistent")  # where not even root can make it
    assert cache_folder("loras").is_relative_to(tmp_path / f"lorabooth-{os.getuid()}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("loras") == tmp_path / "home" / ".cache" / "lorabooth" / "loras"
