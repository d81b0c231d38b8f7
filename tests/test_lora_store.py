"""LoRAs from web servers: real servers on this machine (tests/lora_server.py), real files, real processes."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_server import LoraServer, lora_bytes, tar_bytes

from infer import download
from infer.loras import LoraStore, resolve
from lorabooth import web
from lorabooth.addresses import EVERYWHERE, Addresses
from lorabooth.cli import main
from lorabooth.errors import UserError

LORA, OTHER = lora_bytes(100_000), lora_bytes(100_000, "OTHER")
SECRET = "s3cret-key"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoraServer]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with LoraServer() as running:
        yield running


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def store(server: LoraServer, tmp_path: Path, notices: list[str]) -> LoraStore:
    return new_store(server, tmp_path, notices)


def new_store(server: LoraServer, tmp_path: Path, notices: list[str], **settings: Any) -> LoraStore:
    ours = {"addresses": Addresses(EVERYWHERE), "civitai": server.base, "notice": notices.append, "show": False, "pause_seconds": 0.01}
    return LoraStore(tmp_path / "cache", **(ours | settings))


def data_of(store: LoraStore, reference: str) -> bytes:
    return store.resolve(reference).file.path.read_bytes()


def statuses(server: LoraServer, path: str) -> list[int]:
    return [call.status for call in server.asked(path)]


def cached(store: LoraStore) -> set[str]:
    return {file.stem for file in store.cache.files.glob("*/*")}


def litter(store: LoraStore) -> list[str]:
    return [file.name for file in store.cache.parts.iterdir()]


def problem(store: LoraStore, reference: str) -> UserError:
    with pytest.raises(UserError) as caught:
        store.resolve(reference)
    assert "\n" not in caught.value.message and SECRET not in str(caught.value)
    return caught.value


# Downloads


def test_a_file_is_downloaded_once_and_asked_about_afterwards(server: LoraServer, store: LoraStore):
    url = server.put("/people/tok.safetensors", LORA)
    choice = store.resolve(f"{url}:0.7")
    assert (choice.weight, choice.file.trigger_word, choice.file.name) == (0.7, "TOK", "tok")
    assert choice.file.path.read_bytes() == LORA and choice.file.sha256 == hashlib.sha256(LORA).hexdigest() == choice.file.path.parent.name
    assert data_of(store, url) == LORA
    assert statuses(server, "/people/tok.safetensors") == [200, 304] and litter(store) == []
    server.put("/people/tok.safetensors", OTHER)
    assert data_of(store, url) == OTHER and choice.file.path.read_bytes() == LORA, "a file that is in use does not change"


def test_a_server_without_etags_is_asked_again_and_not_read_again(server: LoraServer, store: LoraStore):
    url = server.put("/a.safetensors", LORA, etag=False)
    assert data_of(store, url) == data_of(store, url) == LORA
    server.put("/a.safetensors", lora_bytes(7), etag=False)
    assert data_of(store, url) == lora_bytes(7)
    server.put("/b.safetensors", LORA, etag=False, headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})
    assert data_of(store, f"{server.base}/b.safetensors") == data_of(store, f"{server.base}/b.safetensors") == LORA
    assert server.asked("/b.safetensors")[1].headers["If-Modified-Since"] == "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("etag", [True, False])
def test_a_connection_that_is_cut_goes_on_where_it_broke_off(server: LoraServer, store: LoraStore, etag: bool):
    cuts = [100_000, 50_000, 200] if etag else [100_000, 50_000]
    url = server.put("/x.safetensors", LORA, cuts=cuts, etag=etag)
    assert data_of(store, url) == LORA and litter(store) == []
    ranges = [call.headers.get("Range") for call in server.asked("/x.safetensors")]
    assert ranges == ([None, "bytes=100000-", "bytes=150000-", "bytes=150200-"] if etag else [None] * 3)


@pytest.mark.parametrize("at", [1, 7, 100, 511, 512, 513, len(LORA) - 1])
def test_a_cut_at_any_place_is_mended(server: LoraServer, store: LoraStore, at: int):
    assert data_of(store, server.put("/x.safetensors", LORA, cuts=[at])) == LORA


def test_a_server_that_ignores_ranges_starts_over(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", LORA, cuts=[100_000], ranges=False)
    assert data_of(store, url) == LORA
    assert statuses(server, "/x.safetensors") == [200, 200]


def test_a_file_that_changed_meanwhile_is_not_mixed(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    problem(store, url)
    assert len(litter(store)) == 2
    server.put("/x.safetensors", OTHER)
    assert data_of(store, url) == OTHER and litter(store) == []
    assert server.calls[-1].headers["Range"] == "bytes=100000-" and server.calls[-1].status == 200


def test_the_next_command_goes_on_where_the_last_gave_up(server: LoraServer, tmp_path: Path, notices: list[str]):
    url = server.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    error = problem(new_store(server, tmp_path, notices), url)
    assert "broke off" in error.message and "what arrived is kept" in error.hint
    server.pages["/x.safetensors"].cuts = []
    assert data_of(new_store(server, tmp_path, notices), url) == LORA
    assert server.calls[-1].status == 206


def test_a_part_of_another_length_than_the_file_is_thrown_away(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    problem(store, url)
    server.put("/x.safetensors", LORA, statuses=[416])
    assert data_of(store, url) == LORA


@pytest.mark.parametrize("length", [True, False])
def test_a_file_over_the_limit_is_refused(server: LoraServer, tmp_path: Path, notices: list[str], length: bool):
    store = new_store(server, tmp_path, notices, limit_bytes=300_000)
    error = problem(store, server.put("/x.safetensors", LORA, length=length))
    assert "is over 0.0003 GB, which is the limit for a LoRA" in error.message and "LORABOOTH_LORA_LIMIT_GB" in error.hint
    assert litter(store) == [] and cached(store) == set()
    assert len(server.calls) == 1
    assert data_of(new_store(server, tmp_path, notices, limit_bytes=len(LORA)), server.put("/y.safetensors", LORA, length=length)) == LORA


@pytest.mark.parametrize(
    ("status", "words"), [(401, "asks for a login"), (403, "may not be read by you"), (404, "there is nothing at"), (410, "is gone"), (418, "refused")]
)
def test_a_refusal_is_one_sentence_at_once(server: LoraServer, store: LoraStore, status: int, words: str):
    url = server.put("/x.safetensors", LORA, status=status)
    error = problem(store, f"{url}?signature={SECRET}")
    assert words in error.message and f"(HTTP {status})" in error.message and "/x.safetensors" in error.message and error.hint
    assert len(server.calls) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_waited_out(server: LoraServer, store: LoraStore, status: int):
    url = server.put("/x.safetensors", LORA, statuses=[status] * 3)
    assert data_of(store, url) == LORA
    server.put("/y.safetensors", LORA, status=status)
    assert f"(HTTP {status})" in problem(store, f"{server.base}/y.safetensors").message
    assert len(server.asked("/y.safetensors")) == 4


def test_a_server_may_say_how_long_to_wait_within_reason(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", LORA, statuses=[429], headers={"Retry-After": "1"})
    began = time.monotonic()
    assert data_of(store, url) == LORA and time.monotonic() - began >= 1
    problem(store, server.put("/y.safetensors", LORA, status=429, headers={"Retry-After": "3600"}))
    assert len(server.asked("/y.safetensors")) == 1


def test_a_server_that_falls_silent_is_given_up_and_gone_on_with(server: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "TIMEOUT", httpx2.Timeout(0.2))
    url = server.put("/x.safetensors", LORA, pause_seconds=1)
    assert "does not answer in time" in problem(store, url).message
    assert statuses(server, "/x.safetensors")[:2] == [200, 206]


def test_a_server_that_gives_hardly_anything_is_given_up(server: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(download, "SLOW_BYTES", 10**9)
    assert "comes too slowly" in problem(store, server.put("/x.safetensors", LORA, pause_seconds=0.3)).message


def test_a_proxy_of_the_environment_is_used_and_given_the_checked_address(server: LoraServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", server.base)
    monkeypatch.setenv("no_proxy", "direct.example")
    store = new_store(server, tmp_path, [], addresses=Addresses(EVERYWHERE, lookup=lambda host, port: ["10.1.2.3" if host == "a.example" else "127.0.0.1"]))
    server.put("http://10.1.2.3:8080/x.safetensors", LORA)
    server.put("/y.safetensors", OTHER)
    assert data_of(store, "http://a.example:8080/x.safetensors") == LORA and server.calls[0].headers["Host"] == "a.example:8080"
    assert data_of(store, f"http://direct.example:{server.server_port}/y.safetensors") == OTHER


def test_redirects_to_another_server_are_followed(server: LoraServer, store: LoraStore):
    with LoraServer() as other:
        url = server.put("/x", status=302, location=other.put("/file?sig=1", LORA))
        assert data_of(store, url) == LORA


def test_a_redirect_into_a_network_that_is_not_allowed_is_not_followed(server: LoraServer, tmp_path: Path, notices: list[str]):
    with LoraServer("127.0.0.2") as canary:
        url = server.put("/x.safetensors", status=302, location=canary.put("/y", LORA))
        store = new_store(server, tmp_path, notices, addresses=Addresses([EVERYWHERE[0].__class__("127.0.0.1/32")]))
        assert "private network" in problem(store, url).message
        assert canary.calls == []
    assert "private network" in problem(LoraStore(tmp_path / "cache", show=False), f"https://127.0.0.1:{server.server_port}/x.safetensors").message


def test_a_name_for_the_file_is_found_in_the_address(server: LoraServer, store: LoraStore):
    for path, name in (
        ("/a/tok.safetensors", "tok"),
        ("/abc/lora.safetensors", "abc"),
        ("/a%20b/trained_model.tar", "a-b"),
        ("/..%2f..%2fx.safetensors", "x"),
        ("/lora", "127.0.0.1"),
    ):
        assert store.resolve(server.put(path, lora_bytes(8, path))).file.name == name


@pytest.fixture
def raw() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every request with the next of these bytes, whatever they are."""
    answers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    with contextlib.suppress(OSError):
                        connection.sendall(answers[0] if answers else b"")
                        connection.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.safetensors", answers
        listener.shutdown(socket.SHUT_RDWR)


FIELDS = {
    "Content-Length": ["-1", "0", "9" * 5000, "1e3", "5, 6", "\u0663"], "Content-Range": ["bytes 5-6/7", "x"], "ETag": ['"a', "\xff\xfe", "W/"],
    "Retry-After": ["-1", "9" * 99], "Location": ["//", "https://[", "\x00", "http://\xff/"], "Transfer-Encoding": ["chunked", "gzip"],
    "Content-Encoding": ["gzip", "nonsense"], "X": ["y" * 200_000],
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.sampled_from([200, 206, 304, 301, 302, 416, 429, 503]), st.integers(0, 1099)),
    st.lists(st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(FIELDS[name]))), max_size=4),
    st.binary(max_size=700),
    st.booleans(),
)
def test_whatever_a_server_sends_is_a_sentence(
    raw: tuple[str, list[bytes]], tmp_path: Path, status: int, fields: list[tuple[str, str]], body: bytes, garbage: bool
):
    url, answers = raw
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in fields)]
    answers[:] = [body if garbage else "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body]
    with pytest.raises(UserError):
        LoraStore(tmp_path / "cache", addresses=Addresses(EVERYWHERE), show=False, pause_seconds=0).resolve(url)


# What arrives


class Marker:
    """Unpickled, it makes a file: the proof that code ran."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def zipped(data: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return out.getvalue()


def test_what_is_no_lora_is_refused_by_its_content(server: LoraServer, store: LoraStore, tmp_path: Path):
    ran = tmp_path / "code-ran"
    poison = pickle.dumps([Marker(ran), "x" * 600], 2)
    bodies = {
        "pickle": (poison, "is a pickle or a zip, whatever its name says"),
        "old-pickle": (pickle.dumps(Marker(ran), 0), "is not a safetensors file"),
        "new-pickle": (pickle.dumps(Marker(ran), 5), "is a pickle or a zip, whatever its name says"),
        "checkpoint": (zipped(poison), "is a pickle or a zip, whatever its name says"),
        "page": (b"<!DOCTYPE html><title>Log in</title>" + b" " * 1000, "is a web page, not a LoRA"),
        "short-page": (b"\n<html>", "is a web page, not a LoRA"),
        "json": (b'{"error": "Unauthorized"}', "is not a safetensors file"),
        "empty": (b"", "is not a safetensors file"),
        "noise": (os.urandom(5000), "is not a safetensors file"),
        "gguf": (b"GGUF" + bytes(5000), "is not a safetensors file"),
        "cut": (LORA[:-1], "is cut short"),
        "model": (LORA.replace(b"lora_A", b"matrix"), "holds no LoRA"),
    }
    for name, (body, words) in bodies.items():
        for length in (True, False):
            error = problem(store, server.put(f"/{name}.safetensors", body, length=length))
            assert words in error.message and error.message.startswith(f"{server.base}/{name}.safetensors ") and error.hint, name
    assert not ran.exists() and litter(store) == [] and cached(store) == set()


def test_a_pickle_is_refused_before_it_has_all_come(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", pickle.dumps(["x" * 100_000_000], 4))
    began = time.monotonic()
    assert "is a pickle" in problem(store, url).message and time.monotonic() - began < 5


def test_a_body_that_is_packed_is_refused(server: LoraServer, store: LoraStore):
    assert "sent packed" in problem(store, server.put("/x.safetensors", LORA, headers={"Content-Encoding": "gzip"})).message


def test_the_lora_in_a_hosted_trainers_tar_is_taken(server: LoraServer, store: LoraStore):
    tar = tar_bytes(
        output__flux_train_replicate__lora=b"", output__flux_train_replicate__config=b"rank: 16", **{"output__flux_train_replicate__lora.safetensors": LORA}
    )
    url = server.put("/xyz/trained_model.tar", tar, cuts=[100_000])
    choice = store.resolve(f"{url}:0.9")
    assert choice.file.path.read_bytes() == LORA and (choice.file.name, choice.weight) == ("xyz", 0.9)
    assert data_of(store, url) == LORA and statuses(server, "/xyz/trained_model.tar") == [200, 206, 304] and litter(store) == []
    # The same content by another way is there already, under the name it first had.
    assert store.resolve(server.put("/y.safetensors", LORA)).file.path.parent == choice.file.path.parent


@pytest.mark.parametrize(
    ("tar", "words"),
    [
        (tar_bytes(**{"a__config.yaml": b"x", "a__lora.ckpt": b"y"}), "holds no .safetensors file; in it are: a/config.yaml, a/lora.ckpt"),
        (tar_bytes(**{"a__1.safetensors": LORA, "a__2.safetensors": LORA}), "holds several .safetensors files; in it are: a/1.safetensors, a/2.safetensors"),
        (tar_bytes(), "is not a safetensors file"),
        (tar_bytes(**{"lora.safetensors": b"<html>" * 100}), "is not a safetensors file"),
        (tar_bytes(**{"lora.safetensors": LORA})[:100_000], "is a tar that is"),
        (tar_bytes(**{f"{i}.txt": b"" for i in range(2001)}), "is a tar that is damaged or holds over 2,000 files"),
    ],
)
def test_a_tar_without_one_lora_lists_what_it_holds(server: LoraServer, store: LoraStore, tar: bytes, words: str):
    error = problem(store, server.put("/trained_model.tar", tar))
    assert words in error.message and error.message.startswith(f"{server.base}/trained_model.tar ") and litter(store) == []


# CivitAI


def civitai(server: LoraServer, **version: Any) -> None:
    """A page 12 with the versions 34 (the newest, no safetensors) and 33; what is special about 33 by keyword."""
    files = [
        {"name": "data.zip", "type": "Training Data", "downloadUrl": f"{server.base}/api/download/models/33?type=Training%20Data"},
        {"name": "old.pt", "type": "Model", "primary": True, "downloadUrl": f"{server.base}/api/download/models/33?format=PickleTensor"},
        {"name": "small.safetensors", "type": "Model", "metadata": {"format": "SafeTensor", "size": "pruned"}, "downloadUrl": f"{server.base}/small"},
        {
            "name": "My LoRA v2.safetensors", "type": "Model", "primary": True, "sizeKB": len(LORA) / 1024,
            "metadata": {"format": "SafeTensor", "size": "full"},
            "hashes": {"SHA256": hashlib.sha256(LORA).hexdigest().upper()}, "downloadUrl": f"{server.base}/api/download/models/33",
        },
    ]  # fmt: skip
    server.put("/api/v1/models/12", {"id": 12, "modelVersions": [{"id": 34, "files": [{"name": "a.pt"}]}, {"id": 33, "files": files}]})
    server.put("/api/v1/model-versions/33", {"id": 33, "modelId": 12, "files": files} | version)
    server.put("/api/v1/model-versions/34", {"id": 34, "modelId": 12, "files": [{"name": "a.pt", "type": "Model"}]})
    server.put("/api/download/models/33", status=307, location=server.put("/storage/file?sig=1", LORA))
    server.put("/small", OTHER)


@pytest.mark.parametrize(
    "reference",
    [
        "https://civitai.com/models/12",
        "https://www.civitai.com/models/12/my-lora",
        "https://civitai.red/models/12?modelVersionId=33",
        "https://civitai.green/api/download/models/33",
        "https://civitai.com/api/download/models/33?type=Model&format=SafeTensor",
        "https://civitai.com/api/download/models/33?type=Model&format=SafeTensor&size=full",
    ],
)
def test_a_page_or_a_download_of_civitai_gives_the_primary_safetensors_file(server: LoraServer, store: LoraStore, reference: str):
    civitai(server)
    choice = store.resolve(f"{reference}:0.6")
    assert choice.file.path.read_bytes() == LORA and (choice.file.name, choice.weight) == ("My-LoRA-v2", 0.6)
    assert data_of(store, reference) == LORA
    assert statuses(server, "/storage/file") == [200], "by its checksum the file is known"


def test_a_download_link_of_civitai_picks_among_the_files(server: LoraServer, store: LoraStore):
    civitai(server)
    assert data_of(store, "https://civitai.com/api/download/models/33?type=Model&size=pruned&format=SafeTensor") == OTHER
    error = problem(store, "https://civitai.com/api/download/models/33?type=Training%20Data")
    assert "has no .safetensors file of type=Training+Data; it has data.zip, old.pt" in error.message


def test_a_file_of_civitai_with_another_checksum_is_refused(server: LoraServer, store: LoraStore):
    civitai(server)
    server.put("/storage/file?sig=1", OTHER)
    error = problem(store, "https://civitai.com/models/12")
    assert "did not arrive as it was published: its SHA-256 is" in error.message and "do not trust" in error.hint
    assert cached(store) == set() and litter(store) == []
    server.put("/storage/file?sig=1", LORA)
    assert data_of(store, "https://civitai.com/models/12") == LORA


def test_what_civitai_says_is_too_large_is_not_asked_for(server: LoraServer, tmp_path: Path, notices: list[str]):
    civitai(server)
    assert "which is the limit" in problem(new_store(server, tmp_path, notices, limit_bytes=1000), "https://civitai.com/models/12").message
    assert server.asked("/storage/file") == []


def test_the_token_of_civitai_goes_to_civitai_alone(server: LoraServer, tmp_path: Path, notices: list[str]):
    civitai(server)
    for path in ("/api/v1/models/12", "/api/v1/model-versions/33", "/api/download/models/33"):
        server.pages[path].token = SECRET
    store = new_store(server, tmp_path, notices)
    error = problem(store, "https://civitai.com/models/12")
    assert "only to those who are logged in (HTTP 401)" in error.message and "set CIVITAI_TOKEN" in error.hint
    assert "is not valid" in problem(new_store(server, tmp_path, notices, civitai_token="other"), "https://civitai.com/models/12").hint
    with LoraServer() as storage:
        server.pages["/api/download/models/33"].location = storage.put("/file", LORA)
        store = new_store(server, tmp_path, notices, civitai_token=SECRET)
        assert data_of(store, "https://civitai.com/models/12") == LORA
        assert len(storage.calls) == 1 and "Authorization" not in storage.calls[0].headers
        # What is not CivitAI gets none at all, and a token that stands in an address is used and not kept.
        store.resolve(storage.put("/other.safetensors", OTHER))
        assert "Authorization" not in storage.calls[1].headers
    tokened = new_store(server, tmp_path / "2", notices)
    server.pages["/api/download/models/33"].location = "/storage/file?sig=1"
    assert data_of(tokened, f"https://civitai.com/api/download/models/33?token={SECRET}") == LORA
    kept = b"".join(file.read_bytes() + file.name.encode() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET.encode() not in kept and b"sig=1" not in kept and notices == []


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("https://civitai.com/models/99", "CivitAI has no civitai.com/models/99 (HTTP 404)"),
        ("https://civitai.com/api/download/models/99", "CivitAI has no version 99 on civitai.com (HTTP 404)"),
        ("https://civitai.com/models/12?modelVersionId=34", "has no .safetensors file; it has a.pt"),
        ("https://civitai.com/models/13?modelVersionId=33", "version 33 is not of civitai.com/models/13 but of models/12"),
        ("https://civitai.com/models/14", "has no version that can be downloaded"),
        ("https://civitai.com/models/15", "is not what its API promises"),
        ("https://civitai.com/models/16", "is not JSON"),
        ("https://civitai.com/models/17", "it may be in early access"),
    ],
)
def test_what_civitai_does_not_have_is_one_sentence(server: LoraServer, store: LoraStore, reference: str, words: str):
    civitai(server)
    server.put("/api/v1/models/14", {"modelVersions": []})
    server.put("/api/v1/models/15", b"[]")
    server.put("/api/v1/models/16", b"<html>")
    server.put("/api/v1/models/17", status=403)
    assert words in problem(store, reference).message


@pytest.mark.parametrize("files", [None, [], [7], [{"name": 5}], [{"type": "Model", "name": "a.safetensors", "hashes": 3, "sizeKB": "x", "downloadUrl": 5}]])
def test_an_answer_of_civitai_in_another_shape_is_one_sentence(server: LoraServer, store: LoraStore, files: Any):
    civitai(server, files=files)
    problem(store, "https://civitai.com/models/12?modelVersionId=33")


def test_a_passing_failure_of_civitai_is_waited_out(server: LoraServer, store: LoraStore):
    civitai(server)
    for path in ("/api/v1/models/12", "/api/v1/model-versions/33", "/api/download/models/33"):
        server.pages[path].statuses = [503, 429, 502]
    assert data_of(store, "https://civitai.com/models/12") == LORA


# Offline


def test_without_network_what_was_downloaded_is_used_with_a_notice(server: LoraServer, store: LoraStore, notices: list[str]):
    civitai(server)
    url = server.put("/x.safetensors", LORA)
    references = [f"{url}?sig={SECRET}", "https://civitai.com/models/12"]
    wanted = [data_of(store, reference) for reference in references]
    for status in (500, 404, 401):
        server.pages = {path: type(page)(b"", status) for path, page in server.pages.items()}
        assert [data_of(store, reference) for reference in references] == wanted
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    assert [data_of(store, reference) for reference in references] == wanted
    assert time.monotonic() - began < 5
    assert len(notices) == 8 and all("is used as it was downloaded before" in notice and SECRET not in notice for notice in notices)
    assert "cannot be reached" in notices[-1] and "(HTTP 401)" in notices[5]
    assert "cannot be reached" in problem(store, f"{server.base}/new.safetensors").message


# Several at once


def test_threads_that_want_the_same_file_download_it_once(server: LoraServer, store: LoraStore, notices: list[str]):
    url = server.put("/x.safetensors", LORA, pause_seconds=0.5)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(data_of(store, url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [LORA] * 8 and len(notices) == 7 and "is being downloaded already" in notices[0]
    assert statuses(server, "/x.safetensors").count(200) == 1


PROGRAM = """
import sys
from infer.loras import resolve
choice = resolve(sys.argv[1])
print(choice.file.sha256, flush=True)
if len(sys.argv) > 2: sys.stdin.read()
"""


def process(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path), "LORABOOTH_ALLOW_PRIVATE_ADDRESSES": "127.0.0.0/8", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment, text=True, **pipes)


def test_processes_that_want_the_same_file_download_it_once(server: LoraServer, tmp_path: Path):
    url = server.put("/x.safetensors", LORA, pause_seconds=5)
    processes = [process(tmp_path, url) for _ in range(2)]
    outputs = [one.communicate(timeout=120) for one in processes]
    assert [out.strip() for out, _ in outputs] == [hashlib.sha256(LORA).hexdigest()] * 2, outputs
    assert statuses(server, "/x.safetensors").count(200) == 1
    bars = [err for _, err in outputs if "x:" in err]
    assert bars and re.search(r"100%.*\[\d+:\d+<\d+:\d+, +[\d.]+k?B/s\]", bars[0].replace("\r", "\n")), outputs


def test_a_download_whose_process_is_killed_is_gone_on_with_by_the_next(server: LoraServer, tmp_path: Path):
    url = server.put("/x.safetensors", LORA, pause_seconds=600)
    first = process(tmp_path, url)
    parts = tmp_path / "lorabooth/loras/parts"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 100_000 for file in parts.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    first.communicate()
    server.pages["/x.safetensors"].pause_seconds = 0
    out, err = process(tmp_path, url).communicate(timeout=120)
    assert out.strip() == hashlib.sha256(LORA).hexdigest(), err
    assert statuses(server, "/x.safetensors") == [200, 206]


# Room


def test_what_was_used_longest_ago_goes_first(server: LoraServer, tmp_path: Path, notices: list[str]):
    store = new_store(server, tmp_path, notices, cache_bytes=3 * len(LORA) + 50)
    urls = {name: server.put(f"/{name}.safetensors", lora_bytes(100_000, name)) for name in "abcdef"}
    for age, name in enumerate("abc"):
        os.utime(store.resolve(urls[name]).file.path, (1000 + age, 1000 + age))
    assert cached(store) == {"a", "b", "c"}
    store.resolve(urls["a"])  # used: now b is the oldest
    store.resolve(urls["d"])
    assert cached(store) == {"a", "c", "d"}
    store.resolve(urls["e"])
    assert cached(store) == {"a", "d", "e"}
    assert data_of(store, urls["b"]) == lora_bytes(100_000, "b"), "what went can be had again"


def test_a_file_in_use_is_not_deleted(server: LoraServer, tmp_path: Path, notices: list[str]):
    store = new_store(server, tmp_path, notices, cache_bytes=len(LORA) + 50)
    mine = store.resolve(server.put("/mine.safetensors", LORA))
    os.utime(mine.file.path, (1000, 1000))
    store.resolve(server.put("/a.safetensors", lora_bytes(100_000, "a")))
    store.resolve(server.put("/b.safetensors", lora_bytes(100_000, "b")))
    assert cached(store) == {"mine", "b"} and mine.file.path.read_bytes() == LORA
    del mine
    store.resolve(server.put("/c.safetensors", lora_bytes(100_000, "c")))
    assert cached(store) == {"c"}


def test_a_file_that_another_process_uses_is_not_deleted(server: LoraServer, tmp_path: Path):
    url = server.put("/mine.safetensors", LORA)
    other = process(tmp_path, url, "wait")
    assert other.stdout is not None and other.stdout.readline().strip()
    store = LoraStore(tmp_path / "lorabooth/loras", cache_bytes=1000, addresses=Addresses(EVERYWHERE), show=False)
    store.resolve(server.put("/a.safetensors", lora_bytes(2000, "a")))
    store.cache.make_room()
    assert cached(store) == {"mine"}
    other.communicate(timeout=60)
    store.cache.make_room()
    assert cached(store) == set()


def test_many_threads_in_little_room_each_get_their_file(server: LoraServer, tmp_path: Path):
    bodies = {server.put(f"/{name}.safetensors", lora_bytes(20_000, name)): lora_bytes(20_000, name) for name in "abcdef"}
    stores = [new_store(server, tmp_path, [], cache_bytes=170_000) for _ in range(2)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        for url in random.Random(seed).choices(list(bodies), k=15):
            choice = stores[seed % 2].resolve(url)
            if choice.file.path.read_bytes() != bodies[url]:
                wrong.append(url)
            del choice
            stores[seed % 2].cache.make_room()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(cached(stores[0])) == 2
    assert sum(call.status == 200 for call in server.calls) > 6, "what was in the way did go"


def test_old_parts_go_and_new_ones_stay(server: LoraServer, store: LoraStore):
    problem(store, server.put("/old.safetensors", LORA, cuts=[100_000] + [0] * 10))
    (old,) = store.cache.parts.glob("*.part")
    os.utime(old, (1000, 1000))
    problem(store, server.put("/new.safetensors", LORA, cuts=[100_000] + [0] * 10))
    store.resolve(server.put("/x.safetensors", OTHER))
    assert len(litter(store)) == 2 and not old.exists()


def test_the_cache_is_for_its_owners_eyes_and_may_be_damaged(server: LoraServer, store: LoraStore):
    url = server.put("/x.safetensors", LORA)
    path = store.resolve(url).file.path
    assert store.cache.folder.stat().st_mode & 0o077 == 0
    for damage in (b"", b"{}", b"[", b'{"source": 1, "sha256": "../x"}'):
        (record,) = store.cache.records.iterdir()
        assert json.loads(record.read_text())["sha256"] == hashlib.sha256(LORA).hexdigest()
        record.write_bytes(damage)
        assert data_of(store, url) == LORA
    path.write_bytes(LORA[:-1])
    assert data_of(store, url) == LORA, "a damaged file is fetched again"


# The command


def test_a_lora_that_cannot_be_had_is_one_sentence_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for reference in (
        "https://127.0.0.1/x.safetensors?sig=s3cret",
        "https://civitai.com/models/x",
        "https://a.example/x.ckpt",
        "https://user:s3cret@a.example/x",
    ):
        assert main(["generate", "TOK", "--model", "mini", "--lora", f"{reference}:0.5", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("lorabooth: ") and len(said.splitlines()) == 2 and "s3cret" not in said


# Settings


@pytest.mark.parametrize(
    ("variable", "value"), [("LORABOOTH_LORA_LIMIT_GB", "x"), ("LORABOOTH_LORA_CACHE_GB", "-1"), ("LORABOOTH_LORA_LIMIT_GB", "0"), ("CIVITAI_TOKEN", "a b")]
)
def test_a_setting_that_cannot_be_read_is_said(variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=variable):
        resolve("https://civitai.com/models/1")


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in {"LORABOOTH_LORA_LIMIT_GB": "0.5", "LORABOOTH_LORA_CACHE_GB": "7", "CIVITAI_TOKEN": SECRET, "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    store = LoraStore.from_environment()
    assert (store.limit_bytes, store.cache.limit_bytes, store.civitai.token) == (5 * 10**8, 7 * 10**9, SECRET)
    assert store.cache.folder == tmp_path / "lorabooth/loras" and SECRET not in repr(store)
