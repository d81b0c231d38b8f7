"""Tars, plain and packed, that a stranger may have made: the same limits as for zips, and what only tars can hold."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_archive import NAMES, picture, refused, zipped

from lorabooth import entry, tars
from lorabooth.photos import ingest

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
BLOCK = 512


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder in a place of its own, so that what is written outside it can be seen."""
    return tmp_path / "runs" / "one"


def tarred(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these names and bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as new:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return file.getvalue()


def header(**fields: object) -> bytes:
    """One header of a tar that holds what no library would write."""
    member = tarfile.TarInfo("a.png")
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def with_size(block: bytes, size: int) -> bytes:
    """The header with a size in base 256, which may be negative, and a right checksum."""
    block = block[:124] + b"\xff" * 4 + struct.pack(">q", size) + block[136:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_taken_by_its_content_whatever_its_kind_and_name(tmp_path: Path, run: Path, kind: int, packed: str):
    files = {"me/10.png": picture(1), "me/9.png": picture(2), "./me/9.txt": b"nine", "me/._9.png": b"x", "me/.DS_Store": b"x"}
    manifest = ingest(written(tmp_path / "photos.zip", PACK[packed](tarred(files, kind))), run)
    assert [(photo.original, photo.caption) for photo in manifest.photos] == [("me/9.png", "nine"), ("me/10.png", None)]
    assert {path.name for path in run.iterdir()} == {"photos", "manifest.jsonl"}


def test_names_in_a_tar_are_never_used_as_paths(tmp_path: Path, run: Path):
    (tmp_path / "runs" / "canary").mkdir(parents=True)
    names = [name for name in NAMES if len(name) < 1000]
    source = written(tmp_path / "photos.tar", tarred({name: picture(i) for i, name in enumerate(names)}))
    manifest = ingest(source, run)
    assert len(manifest.photos) == len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.tar", "runs"] and list((tmp_path / "runs/canary").iterdir()) == []
    assert sorted(path.name for path in (run / "photos").iterdir()) == [f"{i:05d}.png" for i in range(1, len(names) + 1)]


def test_names_that_are_not_utf8_are_taken(tmp_path: Path, run: Path):
    data = tarred({"cafX.png": picture()}, tarfile.USTAR_FORMAT).replace(b"cafX", b"caf\xe9", 1)
    first = data[:148] + b" " * 8 + data[156:BLOCK]
    data = data[:148] + b"%06o\0 " % sum(first) + data[156:]
    assert ingest(written(tmp_path / "photos.tar", data), run).photos[0].original == "caf?.png"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_left_out(tmp_path: Path, run: Path, kind: bytes):
    data = header(name="link.png", type=kind, linkname="/etc/passwd") + tarred({"a.png": picture()})
    manifest = ingest(written(tmp_path / "photos.tar", data), run)
    assert [photo.original for photo in manifest.photos] == ["a.png"]
    assert "link.png is a link or a device, not a file: left out" in manifest.notes


def test_files_with_holes_are_left_out(tmp_path: Path, run: Path):
    # As GNU tar writes them: eight bytes at the end of a terabyte that is not there.
    member = tarfile.TarInfo("holes.png")
    member.pax_headers = {"GNU.sparse.map": f"{1 << 40},8", "GNU.sparse.size": str((1 << 40) + 8), "GNU.sparse.numblocks": "1"}
    member.size = 8
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as new:
        new.addfile(member, io.BytesIO(b"12345678"))
    data = file.getvalue()[: 4 * BLOCK] + tarred({"a.png": picture()})
    manifest = ingest(written(tmp_path / "photos.tar", data), run)
    assert len(manifest.photos) == 1
    assert "holes.png is a file with holes, which no photo is: left out" in manifest.notes


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.97])
def test_a_tar_that_was_cut_off_is_refused(tmp_path: Path, run: Path, share: float, packed: str):
    plain = tarred({f"{i}.png": picture(i) + os.urandom(3000) for i in range(5)})
    whole = PACK[packed](plain) if packed else plain.rstrip(b"\0")
    error = refused(written(tmp_path / "photos.tar", whole[: int(len(whole) * share)]), run)
    assert "damaged or cut off" in error.message


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path, run: Path):
    data = bytearray(tarred({"a.png": picture(1), "b.png": picture(2)}, tarfile.USTAR_FORMAT))
    data[data.index(b"b.png")] ^= 1
    assert "damaged or cut off" in refused(written(tmp_path / "photos.tar", bytes(data)), run).message


@pytest.mark.parametrize("size", [-1, -BLOCK, -4 * BLOCK, 1 << 40, 1 << 62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_impossible_sizes_in_headers_are_refused_at_once(tmp_path: Path, run: Path, kind: bytes, size: int):
    data = tarred({"a.png": picture()})[: -20 * BLOCK] + with_size(header(type=kind), size) + bytes(4 * BLOCK)
    started = time.process_time()
    refused(written(tmp_path / "photos.tar", data), run)
    assert time.process_time() - started < 1


def test_headers_upon_headers_are_refused(tmp_path: Path, run: Path):
    long_name = header(type=tarfile.GNUTYPE_LONGNAME, size=BLOCK) + b"n" * BLOCK
    assert "damaged" in refused(written(tmp_path / "photos.tar", long_name * 3000), run).message
    # A map of holes without an end, which tarfile would gather block by block.
    record = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=a.png\n"
    endless = header(type=tarfile.XHDTYPE, size=len(record)) + record.ljust(BLOCK, b"\0") + header(size=50 << 20) + b"1" * (50 << 20)
    assert "damaged" in refused(written(tmp_path / "photos.tar", endless), run).message


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
def test_a_packed_bomb_is_refused_by_its_ratio_before_it_unpacks(tmp_path: Path, run: Path, packed: str):
    source = written(tmp_path / "photos.tar", PACK[packed](tarred({"bomb.png": bytes(60 << 20)})))
    started = time.process_time()
    assert "200 times" in refused(source, run).message
    assert time.process_time() - started < 1


def test_an_xz_that_asks_for_much_memory_is_refused_with_the_limit(tmp_path: Path, run: Path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 256 << 20, "preset": 0}]
    source = written(tmp_path / "photos.tar", lzma.compress(tarred({"a.png": picture()}), filters=filters))
    assert "over 128 MiB of memory" in refused(source, run).message


@pytest.mark.parametrize("packed", PACK)
def test_all_entries_of_a_tar_together_have_a_limit(tmp_path: Path, run: Path, packed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "TOTAL_BYTES_LIMIT", 1 << 20)
    files = {f"{i}.png": picture(i) + os.urandom(300_000) for i in range(5)}
    assert "over 1 MiB" in refused(written(tmp_path / "photos.tar", PACK[packed](tarred(files))), run).message


def test_an_entry_of_a_tar_over_its_limit_is_left_out(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entry, "ENTRY_BYTES_LIMIT", 1 << 20)
    manifest = ingest(written(tmp_path / "photos.tar", tarred({"a.png": picture(), "film.mov": os.urandom(2 << 20)})), run)
    assert "film.mov is over 1 MiB, which is the limit for one file: left out" in manifest.notes


def test_too_many_entries_of_a_tar_are_refused(tmp_path: Path, run: Path):
    source = written(tmp_path / "photos.tar", tarred({f"{i}.png": b"" for i in range(entry.ENTRIES_LIMIT + 1)}, tarfile.USTAR_FORMAT))
    assert "over 2,000 files" in refused(source, run).message


def test_what_is_packed_like_a_tar_but_is_none_is_refused(tmp_path: Path, run: Path):
    for packed in (".gz", ".bz2", ".xz"):
        source = written(tmp_path / "photos.tar", PACK[packed](picture()))
        assert "is not a zip or a tar, only packed like one" in refused(source, run).message
    assert "is not a zip or a tar" in refused(written(tmp_path / "photos.tar", bytes(5000)), run).message


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path, run: Path):
    inner = zipped(tmp_path / "inner.zip", {"b.png": picture(1)}).read_bytes()
    manifest = ingest(written(tmp_path / "photos.tar", tarred({"a.png": picture(), "inner.zip": inner})), run)
    assert [photo.original for photo in manifest.photos] == ["a.png"]
    assert "inner.zip is an archive, not a picture; unpack it first: left out" in manifest.notes


def test_an_empty_tar_is_empty(tmp_path: Path, run: Path):
    assert "is empty" in refused(written(tmp_path / "photos.tar.gz", gzip.compress(tarred({".DS_Store": b"x"}))), run).message


def test_a_full_disk_while_unpacking_is_not_called_damage(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    def full(dir: Path | None):
        assert dir == run
        return open("/dev/full", "r+b")

    monkeypatch.setattr(tars.tempfile, "TemporaryFile", full)
    source = written(tmp_path / "photos.tgz", gzip.compress(tarred({"a.png": picture()})))
    assert "the disk is full" in refused(source, run).message
