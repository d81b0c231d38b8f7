"""Downloads that are gone on with: never parts of two files as one, nothing lost that need not be, and servers too slow to wait for."""

import hashlib
import signal
import time
from pathlib import Path

import pytest
from lora_server import LoraServer, Page, lora_bytes, tar_bytes
from lora_stores import LORA, OTHER, SECRET, civitai_pages, data_of, litter, new_store, problem, statuses
from test_lora_cache import PROGRAM, process

from infer.loras import LoraStore
from lorabooth import patience

CUT = [100_000] + [0] * 10
"""The connection is cut once in the file, then before anything comes, until the command gives up."""
DATED = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}


def ranges(site: LoraServer, path: str) -> list[str | None]:
    return [call.headers.get("Range") for call in site.asked(path)]


@pytest.mark.parametrize("other", [OTHER, LORA[:-1] + b"x", lora_bytes(100_001)])
def test_parts_of_two_files_are_not_joined_although_the_server_ignores_what_it_was_asked(site: LoraServer, store: LoraStore, other: bytes):
    url = site.put("/x.safetensors", LORA, cuts=[*CUT])
    problem(store, url)
    site.put("/x.safetensors", other, if_range=False)
    assert data_of(store, url) == other and litter(store) == []
    assert statuses(site, "/x.safetensors")[-2:] == [206, 200]


@pytest.mark.parametrize("other", [(lora_bytes(100_001), DATED), (OTHER, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"})])
def test_a_date_and_a_size_tell_two_files_apart_too(site: LoraServer, store: LoraStore, other: tuple[bytes, dict[str, str]]):
    url = site.put("/x.safetensors", LORA, cuts=[*CUT], etag=False, headers=DATED)
    problem(store, url)
    site.put("/x.safetensors", other[0], etag=False, if_range=False, headers=other[1])
    assert data_of(store, url) == other[0] and statuses(site, "/x.safetensors")[-2:] == [206, 200]


class Restless(Page):
    """A file that is another one each time it is asked for."""

    @property
    def tag(self) -> str:
        return f'"{time.monotonic_ns()}"'


def test_a_server_that_never_gives_the_same_file_twice_is_given_up(site: LoraServer, store: LoraStore):
    site.pages["/x.safetensors"] = Restless(LORA, cuts=[100_000] * 100, if_range=False)
    assert "broke off" in problem(store, f"{site.base}/x.safetensors").message
    assert statuses(site, "/x.safetensors") == [200, 206, 200, 206, 200, 206, 200]


@pytest.mark.parametrize("told", [True, False])
def test_a_server_that_sends_the_rest_in_pieces_is_asked_for_each(site: LoraServer, store: LoraStore, told: bool):
    url = site.put("/x.safetensors", LORA, cuts=[100_000], piece=120_000, pieces_told=told)
    assert data_of(store, url) == LORA and litter(store) == []
    assert ranges(site, "/x.safetensors") == [None, "bytes=100000-", "bytes=220000-", "bytes=340000-"]


def test_a_part_stays_where_the_rest_does_not_come(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA, cuts=[100_000], piece=10)
    error = problem(store, url)
    assert "broke off after 100,030 of" in error.message and error.hint == "run the same command again: what arrived is kept"
    site.put("/x.safetensors", LORA)
    assert data_of(store, url) == LORA and ranges(site, "/x.safetensors")[-1] == "bytes=100030-"


@pytest.mark.parametrize("coding", ["Identity", "IDENTITY"])
def test_the_name_of_no_coding_may_be_written_in_capitals(site: LoraServer, store: LoraStore, coding: str):
    assert data_of(store, site.put("/x.safetensors", LORA, headers={"Content-Encoding": coding})) == LORA


@pytest.mark.parametrize("etag", [True, False])
@pytest.mark.parametrize("arrived", [100_000, 0])
def test_nothing_is_said_to_be_kept_that_is_not(site: LoraServer, store: LoraStore, etag: bool, arrived: int):
    error = problem(store, site.put("/x.safetensors", LORA, etag=etag, cuts=[arrived] + [0] * 20))
    assert error.hint == "run the same command again" + (": what arrived is kept" if etag and arrived else "")


KILLED = """
import os, signal, sys
left = int(sys.argv.pop())
def hook(event, arguments):
    global left
    if event in ("os.rename", "os.remove") and "/loras/" in str(arguments[0]):
        left -= 1
        if left < 0: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("length", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_kill_after_the_last_byte_loses_nothing(site: LoraServer, tmp_path: Path, packed: bool, length: bool):
    """Killed before each file that is renamed or deleted after the last byte; the first is renamed before the first byte."""
    body = tar_bytes(**{"a__lora.safetensors": LORA}) if packed else LORA
    for done in range(1, 20):
        path = f"/{done}.safetensors"
        url, folder = site.put(path, body, length=length), tmp_path / str(done)
        first = process(folder, url, str(done), program=KILLED + PROGRAM)
        first.communicate(timeout=120)
        if first.returncode == 0:
            break
        assert first.returncode == -signal.SIGKILL
        out, err = process(folder, url).communicate(timeout=120)
        assert out.strip() == hashlib.sha256(LORA).hexdigest(), err
        assert statuses(site, path) in ([200, 206], [200, 304])
        assert list((folder / "lorabooth/loras/parts").glob("[!.]*.[pl]*")) == [], "but what was told of it, which goes after days"
        assert ranges(site, path)[1] in (None, f"bytes={len(body) - 1}-")
    assert 3 < done < 19


# Slow servers


@pytest.mark.parametrize("what", ["headers", "chunk", "body"])
def test_a_server_that_drips_is_given_up_and_waited_for_no_more(site: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch, what: str):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 0.5)
    url = site.put("/x.safetensors", drip=what)
    began = time.monotonic()
    assert problem(store, f"{url}?sig={SECRET}").message == f"{url} comes too slowly"
    assert time.monotonic() - began < 30 and len(site.calls) == 1
    site.put("/x.safetensors", LORA)
    assert data_of(store, url) == LORA


@pytest.mark.parametrize("what", ["headers", "chunk", "body"])
def test_so_is_an_api_that_drips(site: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch, what: str):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 0.5)
    civitai_pages(site)
    site.put("/api/v1/models/12", drip=what)
    assert "comes too slowly" in problem(store, "https://civitai.com/models/12").message


def test_a_server_that_is_slow_but_gives_enough_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 3)
    monkeypatch.setattr(patience, "SLOW_BYTES", 2)
    with patience.Patience() as enough, patience.Patience() as little:
        for _ in range(8):
            time.sleep(0.5)
            enough.arrived(2)
        little.arrived(1)
        assert little.over and not enough.over


# Answers that are no LoRA, with an earlier copy


@pytest.mark.parametrize(
    ("body", "trouble", "words"),
    [
        (b"<!doctype html><title>maintenance</title>", {}, "is a web page, not a LoRA"),
        (b'{"error": "login"}', {}, "is not a safetensors file"),
        (b"\x80\x02}q\x00." + b"a" * 600, {}, "is a pickle or a zip"),
        (LORA[:-1], {"length": False}, "is cut short"),
        (OTHER, {"headers": {"Content-Encoding": "gzip"}}, "is sent packed"),
        (LORA.replace(b"lora_A", b"matrix"), {}, "holds no LoRA"),
    ],
)
def test_what_is_no_lora_does_not_take_the_place_of_an_earlier_copy(
    site: LoraServer, store: LoraStore, notices: list[str], body: bytes, trouble: dict[str, object], words: str
):
    url = site.put("/x.safetensors", LORA)
    store.resolve(url)
    site.put("/x.safetensors", body, **trouble)
    assert data_of(store, url) == LORA and litter(store) == []
    assert len(notices) == 1 and words in notices[0] and notices[0].endswith(f"; {url} is used as it was downloaded before")
    site.put("/x.safetensors", OTHER)
    assert data_of(store, url) == OTHER and len(notices) == 1


def test_a_page_in_place_of_civitais_new_version_leaves_the_earlier_one_but_a_false_checksum_does_not(site: LoraServer, store: LoraStore, notices: list[str]):
    civitai_pages(site)
    reference = "https://civitai.com/models/12"
    assert data_of(store, reference) == LORA
    for path in ("/api/v1/models/12", "/api/v1/model-versions/33"):
        site.pages[path].body = site.pages[path].body.replace(hashlib.sha256(LORA).hexdigest().upper().encode(), b"0" * 64)
    site.put("/storage/file?sig=1", b"<html>log in</html>")
    assert data_of(store, reference) == LORA and "is a web page" in notices[0]
    site.put("/storage/file?sig=1", OTHER)
    assert "did not arrive as it was published" in problem(store, reference).message


def test_the_next_command_has_what_was_kept_of_a_newer_file(site: LoraServer, tmp_path: Path, notices: list[str]):
    url = site.put("/x.safetensors", LORA)
    new_store(site, tmp_path, notices).resolve(url)
    site.put("/x.safetensors", OTHER, cuts=[100_000])
    assert data_of(new_store(site, tmp_path, notices), url) == LORA and "broke off" in notices[0]
    assert data_of(new_store(site, tmp_path, notices), url) == OTHER and ranges(site, "/x.safetensors")[-1] == "bytes=100000-"
