"""Zips and folders that a stranger may have made: limits, names, damage. Nothing is ever written outside the run."""

import io
import os
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lorabooth import entry
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, ingest

NAMES = [
    "../evil.png",
    "../../../../evil.png",
    "/evil.png",
    "//host/share/evil.png",
    "C:\\evil.png",
    "..\\..\\evil.png",
    "a/../../evil.png",
    "./evil.png",
    "con.png",
    "evil.png.",
    "evil.png ",
    "x" * 300 + ".png",
    "\u202egnp.live.png",
    "\x1b[31mred.png",
    "line\nbreak.png",
    "Å.png",
    "A\u030a.png",
    "写真.png",
    "🦊.png",
    "a/b/c/d/e/f.png",
    "9" * 5000 + ".png",
    "",
]


def picture(colour: int = 0, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """A small picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256, 90)).save(file, kind)
    return file.getvalue()


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these names and bytes."""
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in files.items():
            new.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return path


def refused(source: Path, folder: Path) -> UserError:
    """The error that ingest must raise, having left nothing behind."""
    with pytest.raises(UserError) as caught:
        ingest(source, folder)
    assert not folder.exists() or list(folder.iterdir()) == []
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in a place of its own, so that what is written outside it can be seen."""
    return tmp_path / "runs" / "one"


def test_names_in_a_zip_are_never_used_as_paths(tmp_path: Path, run: Path):
    canary = tmp_path / "runs" / "canary"
    canary.mkdir(parents=True)
    source = zipped(tmp_path / "photos.zip", {name: picture(i) for i, name in enumerate(NAMES)})
    manifest = ingest(source, run)
    assert len(manifest.photos) == len(NAMES)
    assert {path.name for path in run.iterdir()} == {"photos", "manifest.jsonl"}
    assert sorted(path.name for path in (run / "photos").iterdir()) == [f"{i:05d}.png" for i in range(1, len(NAMES) + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.zip", "runs"] and list(canary.iterdir()) == []
    assert all(photo.original.isprintable() and len(photo.original) <= 100 for photo in manifest.photos)
    assert Manifest.load(run) == manifest


def test_what_systems_leave_behind_is_left_out_silently_at_any_depth(tmp_path: Path, run: Path):
    junk = ["__MACOSX/a/._p.png", "a/b/._p.png", "a/Thumbs.db", "a/b/.DS_Store", "desktop.ini", ".hidden/p.png", "a\\.hidden.png", "a/__MACOSX/p.png"]
    source = zipped(tmp_path / "photos.zip", {name: picture(7) for name in junk} | {f"a/b/{i}.png": picture(i) for i in range(5)})
    manifest = ingest(source, run)
    assert [photo.original for photo in manifest.photos] == [f"a/b/{i}.png" for i in range(5)]
    assert manifest.notes == ()


def test_an_encrypted_zip_is_refused_with_the_way_on(tmp_path: Path, run: Path):
    data = bytearray(zipped(tmp_path / "photos.zip", {"a.png": picture()}).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "photos.zip").write_bytes(data)
    error = refused(tmp_path / "photos.zip", run)
    assert "is encrypted" in error.message and error.hint == "unzip it and zip it again without a password"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip_are_left_out(tmp_path: Path, run: Path, kind: int):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as new:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, (kind | 0o777) << 16
        new.writestr(link, b"/etc/passwd")
        new.writestr("a.png", picture())
    manifest = ingest(tmp_path / "photos.zip", run)
    assert len(manifest.photos) == 1
    assert "link.png is a link or a device, not a file: left out" in manifest.notes


def test_a_zip_in_a_zip_is_left_out_with_a_note(tmp_path: Path, run: Path):
    inner = zipped(tmp_path / "inner.zip", {"b.png": picture(1)}).read_bytes()
    manifest = ingest(zipped(tmp_path / "photos.zip", {"a.png": picture(), "inner.zip": inner, "inner.png": inner}), run)
    assert [photo.original for photo in manifest.photos] == ["a.png"]
    assert "inner.zip is an archive, not a picture; unpack it first: left out" in manifest.notes
    assert "inner.png is an archive, not a picture; unpack it first: left out" in manifest.notes


def test_a_zip_is_told_by_its_content_not_by_its_name(tmp_path: Path, run: Path):
    assert len(ingest(zipped(tmp_path / "photos.jpg", {"a.png": picture()}), run).photos) == 1
    (tmp_path / "fake.zip").write_bytes(picture())
    assert "is not a zip" in refused(tmp_path / "fake.zip", tmp_path / "other").message


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_a_zip_that_was_cut_off_is_refused(tmp_path: Path, run: Path, share: float):
    whole = zipped(tmp_path / "photos.zip", {f"{i}.png": picture(i) for i in range(5)}).read_bytes()
    (tmp_path / "photos.zip").write_bytes(whole[: int(len(whole) * share)])
    assert "is damaged or cut off" in refused(tmp_path / "photos.zip", run).message


def test_overlapping_entries_are_refused(tmp_path: Path, run: Path):
    # Two entries of the table of contents point to the same bytes, as in Fifield's zip bomb.
    source = zipped(tmp_path / "photos.zip", {"a.png": picture(1), "b.png": picture(2)})
    data = source.read_bytes()
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    source.write_bytes(data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :])
    assert "damaged" in refused(source, run).message


def test_an_entry_that_claims_the_bytes_of_the_next_is_refused(tmp_path: Path, run: Path):
    source = zipped(tmp_path / "photos.zip", {"a.png": picture(1), "b.png": picture(2)})
    data = bytearray(source.read_bytes())
    place = data.index(b"PK\x01\x02") + 20
    data[place : place + 4] = struct.pack("<I", struct.unpack("<I", data[place : place + 4])[0] + 50)
    source.write_bytes(data)
    assert "damaged" in refused(source, run).message


@pytest.mark.parametrize("claim", [1, 100, 0xFFFFFFF0])
def test_the_size_a_header_claims_is_not_believed(tmp_path: Path, run: Path, claim: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "ENTRY_BYTES_LIMIT", 1 << 20)
    source = zipped(tmp_path / "photos.zip", {"a.png": picture(size=(900, 900), kind="BMP")}, zipfile.ZIP_DEFLATED)
    data = bytearray(source.read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", claim)
    source.write_bytes(data)
    refused(source, run)


def test_a_zip_bomb_is_refused_by_its_ratio_before_it_unpacks(tmp_path: Path, run: Path):
    source = zipped(tmp_path / "photos.zip", {"a.png": picture(), "bomb.png": bytes(60 << 20)}, zipfile.ZIP_DEFLATED)
    started = time.process_time()
    assert "200 times" in refused(source, run).message
    assert time.process_time() - started < 1


def test_a_small_picture_of_one_colour_may_pack_well(tmp_path: Path, run: Path):
    source = zipped(tmp_path / "photos.zip", {"a.bmp": picture(size=(500, 500), kind="BMP")}, zipfile.ZIP_DEFLATED)
    assert len(ingest(source, run).photos) == 1


def test_an_entry_over_its_limit_is_left_out_and_the_photos_go_on(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "ENTRY_BYTES_LIMIT", 1 << 20)
    manifest = ingest(zipped(tmp_path / "photos.zip", {"a.png": picture(), "film.mov": os.urandom(2 << 20)}), run)
    assert len(manifest.photos) == 1
    assert "film.mov is over 1 MiB, which is the limit for one file: left out" in manifest.notes


def test_all_entries_together_have_a_limit(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "TOTAL_BYTES_LIMIT", 1 << 20)
    files = {f"{i}.png": picture(i) + os.urandom(300_000) for i in range(5)}
    assert "over 1 MiB" in refused(zipped(tmp_path / "photos.zip", files), run).message
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert "over 1 MiB" in refused(folder, tmp_path / "other").message


def test_an_archive_over_1_gib_is_refused_unread(tmp_path: Path, run: Path):
    source = zipped(tmp_path / "photos.zip", {"a.png": picture()})
    os.truncate(source, (1 << 30) + 1)
    assert "over 1 GiB" in refused(source, run).message


@pytest.mark.parametrize("entries", [2_001, 65_600])
def test_too_many_entries_are_refused_at_once(tmp_path: Path, run: Path, entries: int):
    source = zipped(tmp_path / "photos.zip", {f"{i:09d}.png": b"" for i in range(entries)})
    started = time.process_time()
    assert "over 2,000 files" in refused(source, run).message
    assert time.process_time() - started < 1


def test_too_many_files_in_a_folder_are_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "ENTRIES_LIMIT", 3)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
    assert "over 3 files" in refused(folder, run).message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_bounds_are_refused(tmp_path: Path, run: Path, method: int):
    error = refused(zipped(tmp_path / "photos.zip", {"a.png": picture()}, method), run)
    assert "other than deflate" in error.message


def test_a_damaged_byte_inside_an_entry_is_refused(tmp_path: Path, run: Path):
    source = zipped(tmp_path / "photos.zip", {"a.png": picture()})
    data = bytearray(source.read_bytes())
    data[60] ^= 255
    source.write_bytes(data)
    assert "a.png cannot be read" in refused(source, run).message


def test_missing_and_odd_sources_are_named(tmp_path: Path, run: Path):
    assert "no such file or folder" in refused(tmp_path / "no.zip", run).message
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe", run).message
    (tmp_path / "empty.zip").write_bytes(b"")
    assert "is not a zip" in refused(tmp_path / "empty.zip", run).message


def test_a_folder_is_read_with_its_subfolders_but_not_pipes_or_earlier_runs(tmp_path: Path):
    for name in ("a.png", "sub/b.png", "runs/old/photos/00001.png", "runs/new/photos/00001.png", ".trash/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(len(name)))
    (tmp_path / "runs/old/manifest.jsonl").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    manifest = ingest(tmp_path, tmp_path / "runs/new")
    assert [photo.original for photo in manifest.photos] == ["a.png", "sub/b.png"]
    assert "pipe.png is not a regular file: left out" in manifest.notes


def test_file_names_that_are_not_utf8_are_taken(tmp_path: Path, run: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(picture())
    assert ingest(folder, run).photos[0].original == "caf?.png"
    assert Manifest.load(run).photos[0].original == "caf?.png"


class Unmarked(zipfile.ZipInfo):
    """An entry whose name is these bytes, without the mark for UTF-8: so macOS, older Windows and DOS write them."""

    def __init__(self, name: bytes):
        super().__init__(name.decode("latin-1"))
        self.name = name

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.name, self.flag_bits & ~(1 << 11)


@pytest.mark.parametrize("encoding", ["utf-8", "cp437", "marked"])
def test_names_in_utf8_with_and_without_the_mark_and_in_cp437_are_read_right(tmp_path: Path, run: Path, encoding: str):
    folder, name = "Ferien am Müggelsee", "Zoë"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as new:
        for ending, data in ((".png", picture()), (".txt", b"Zoe smiles"), (".DS_Store", b"x")):
            full = f"{folder}/{name}{ending}"
            new.writestr(zipfile.ZipInfo(full) if encoding == "marked" else Unmarked(full.encode(encoding)), data)
    manifest = ingest(tmp_path / "photos.zip", run)
    assert [(photo.original, photo.caption) for photo in manifest.photos] == [(f"{folder}/{name}.png", "Zoe smiles")]


def test_names_in_no_known_encoding_still_find_their_captions(tmp_path: Path, run: Path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as new:
        new.writestr(Unmarked("写真.png".encode("shift-jis")), picture())
        new.writestr(Unmarked("写真.txt".encode("shift-jis")), b"smiles")
    assert ingest(tmp_path / "photos.zip", run).photos[0].caption == "smiles"
