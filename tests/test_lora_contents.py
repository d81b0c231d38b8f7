"""What a web server sends in place of a LoRA, and the LoRA in a hosted trainer's tar."""

import contextlib
import os
import pickle
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_server import LoraServer, tar_bytes
from lora_stores import LORA, cached, data_of, litter, problem, statuses

from infer.loras import LoraStore
from lorabooth.addresses import EVERYWHERE, Addresses
from lorabooth.errors import UserError


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


def test_what_is_no_lora_is_refused_by_its_content(site: LoraServer, store: LoraStore, tmp_path: Path):
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
            error = problem(store, site.put(f"/{name}.safetensors", body, length=length))
            assert words in error.message and error.message.startswith(f"{site.base}/{name}.safetensors ") and error.hint, name
    assert not ran.exists() and litter(store) == [] and cached(store) == set()


def test_a_pickle_is_refused_before_it_has_all_come(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", pickle.dumps(["x" * 100_000_000], 4))
    began = time.monotonic()
    assert "is a pickle" in problem(store, url).message and time.monotonic() - began < 5


def test_a_body_that_is_packed_is_refused(site: LoraServer, store: LoraStore):
    assert "sent packed" in problem(store, site.put("/x.safetensors", LORA, headers={"Content-Encoding": "gzip"})).message


def test_the_lora_in_a_hosted_trainers_tar_is_taken(site: LoraServer, store: LoraStore):
    tar = tar_bytes(
        output__flux_train_replicate__lora=b"", output__flux_train_replicate__config=b"rank: 16", **{"output__flux_train_replicate__lora.safetensors": LORA}
    )
    url = site.put("/xyz/trained_model.tar", tar, cuts=[100_000])
    choice = store.resolve(f"{url}:0.9")
    assert choice.file.path.read_bytes() == LORA and (choice.file.name, choice.weight) == ("xyz", 0.9)
    assert data_of(store, url) == LORA and statuses(site, "/xyz/trained_model.tar") == [200, 206, 304] and litter(store) == []
    # The same content by another way is there already, under the name it first had.
    assert store.resolve(site.put("/y.safetensors", LORA)).file.path.parent == choice.file.path.parent


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
def test_a_tar_without_one_lora_lists_what_it_holds(site: LoraServer, store: LoraStore, tar: bytes, words: str):
    error = problem(store, site.put("/trained_model.tar", tar))
    assert words in error.message and error.message.startswith(f"{site.base}/trained_model.tar ") and litter(store) == []


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
