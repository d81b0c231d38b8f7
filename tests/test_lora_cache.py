"""LoRAs that were downloaded before: without network, by several threads and processes, and when room is short."""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lora_server import LoraServer, lora_bytes
from lora_stores import LORA, OTHER, SECRET, cached, civitai_pages, data_of, litter, new_store, problem, statuses

from infer.loras import LoraStore
from lorabooth.addresses import EVERYWHERE, Addresses

# Offline


def test_without_network_what_was_downloaded_is_used_with_a_notice(site: LoraServer, store: LoraStore, notices: list[str]):
    civitai_pages(site)
    url = site.put("/x.safetensors", LORA)
    references = [f"{url}?sig={SECRET}", "https://civitai.com/models/12"]
    wanted = [data_of(store, reference) for reference in references]
    for status in (500, 404, 401):
        site.pages = {path: type(page)(b"", status) for path, page in site.pages.items()}
        assert [data_of(store, reference) for reference in references] == wanted
    site.shutdown()
    site.server_close()
    began = time.monotonic()
    assert [data_of(store, reference) for reference in references] == wanted
    assert time.monotonic() - began < 5
    assert len(notices) == 8 and all("is used as it was downloaded before" in notice and SECRET not in notice for notice in notices)
    assert "cannot be reached" in notices[-1] and "(HTTP 401)" in notices[5]
    assert "cannot be reached" in problem(store, f"{site.base}/new.safetensors").message


# A cache that cannot be used


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """A folder on a read-only disk; for those who may not mount one, a folder of which they may not change anything."""
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False).returncode == 0:
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    elif os.getuid():
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o500)
        yield
        for path in folders:
            path.chmod(0o700)
    else:
        pytest.skip("root writes to every folder, and mounting is not allowed here")


def test_a_cache_on_a_read_only_disk_gives_what_is_in_it(site: LoraServer, tmp_path: Path, notices: list[str]):
    civitai_pages(site)
    url, page = site.put("/x.safetensors", OTHER), "https://civitai.com/models/12"
    assert [data_of(new_store(site, tmp_path, notices), one) for one in (url, page)] == [OTHER, LORA]
    with unwritable(tmp_path / "cache"):
        calls, store = len(site.calls), new_store(site, tmp_path, notices)
        assert [data_of(store, one) for one in (url, page)] == [OTHER, LORA] and len(site.calls) == calls
        where = f"the download cache {tmp_path}/cache cannot be written to"
        assert notices == [f"{where}; {url} is used as it was downloaded before", f"{where}; civitai.com/models/12 is used as it was downloaded before"]
        for other in (site.put("/y.safetensors", LORA), "https://civitai.com/models/13"):
            error = problem(store, other)
            assert error.message.startswith(f"{where}, and ") and error.hint == "set XDG_CACHE_HOME to a folder that can be written to"
    assert data_of(store, site.base + "/y.safetensors") == LORA, "once it can be written to"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_file_locks_is_a_sentence(site: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch, code: int):
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)  # what such a disk answers
    error = problem(store, site.put("/x.safetensors", LORA))
    assert error.message == "the disk of the download cache has no file locks" and "set XDG_CACHE_HOME" in error.hint and site.calls == []


# Several at once


def test_threads_that_want_the_same_file_download_it_once(site: LoraServer, store: LoraStore, notices: list[str]):
    url = site.put("/x.safetensors", LORA, pause_seconds=0.5)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(data_of(store, url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [LORA] * 8 and len(notices) == 7 and "is being downloaded already" in notices[0]
    assert statuses(site, "/x.safetensors").count(200) == 1


PROGRAM = """
import sys
from infer.loras import resolve
choice = resolve(sys.argv[1])
print(choice.file.sha256, flush=True)
if len(sys.argv) > 2: sys.stdin.read()
"""


def process(tmp_path: Path, *arguments: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path), "LORABOOTH_ALLOW_PRIVATE_ADDRESSES": "127.0.0.0/8", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, text=True, **pipes)


def test_processes_that_want_the_same_file_download_it_once(site: LoraServer, tmp_path: Path):
    url = site.put("/x.safetensors", LORA, pause_seconds=5)
    processes = [process(tmp_path, url) for _ in range(2)]
    outputs = [one.communicate(timeout=120) for one in processes]
    assert [out.strip() for out, _ in outputs] == [hashlib.sha256(LORA).hexdigest()] * 2, outputs
    assert statuses(site, "/x.safetensors").count(200) == 1
    bars = [err for _, err in outputs if "x:" in err]
    assert bars and re.search(r"100%.*\[\d+:\d+<\d+:\d+, +[\d.]+k?B/s\]", bars[0].replace("\r", "\n")), outputs


def test_a_download_whose_process_is_killed_is_gone_on_with_by_the_next(site: LoraServer, tmp_path: Path):
    url = site.put("/x.safetensors", LORA, pause_seconds=600)
    first = process(tmp_path, url)
    parts = tmp_path / "lorabooth/loras/parts"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 100_000 for file in parts.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    first.communicate()
    site.pages["/x.safetensors"].pause_seconds = 0
    out, err = process(tmp_path, url).communicate(timeout=120)
    assert out.strip() == hashlib.sha256(LORA).hexdigest(), err
    assert statuses(site, "/x.safetensors") == [200, 206]


# Room


def test_what_was_used_longest_ago_goes_first(site: LoraServer, tmp_path: Path, notices: list[str]):
    store = new_store(site, tmp_path, notices, cache_bytes=3 * len(LORA) + 50)
    urls = {name: site.put(f"/{name}.safetensors", lora_bytes(100_000, name)) for name in "abcdef"}
    for age, name in enumerate("abc"):
        os.utime(store.resolve(urls[name]).file.path, (1000 + age, 1000 + age))
    assert cached(store) == {"a", "b", "c"}
    store.resolve(urls["a"])  # used: now b is the oldest
    store.resolve(urls["d"])
    assert cached(store) == {"a", "c", "d"}
    store.resolve(urls["e"])
    assert cached(store) == {"a", "d", "e"}
    assert data_of(store, urls["b"]) == lora_bytes(100_000, "b"), "what went can be had again"


def test_a_file_in_use_is_not_deleted(site: LoraServer, tmp_path: Path, notices: list[str]):
    store = new_store(site, tmp_path, notices, cache_bytes=len(LORA) + 50)
    mine = store.resolve(site.put("/mine.safetensors", LORA))
    os.utime(mine.file.path, (1000, 1000))
    store.resolve(site.put("/a.safetensors", lora_bytes(100_000, "a")))
    store.resolve(site.put("/b.safetensors", lora_bytes(100_000, "b")))
    assert cached(store) == {"mine", "b"} and mine.file.path.read_bytes() == LORA
    del mine
    store.resolve(site.put("/c.safetensors", lora_bytes(100_000, "c")))
    assert cached(store) == {"c"}


def test_a_file_that_another_process_uses_is_not_deleted(site: LoraServer, tmp_path: Path):
    url = site.put("/mine.safetensors", LORA)
    other = process(tmp_path, url, "wait")
    assert other.stdout is not None and other.stdout.readline().strip()
    store = LoraStore(tmp_path / "lorabooth/loras", cache_bytes=1000, addresses=Addresses(EVERYWHERE), show=False)
    store.resolve(site.put("/a.safetensors", lora_bytes(2000, "a")))
    store.cache.make_room()
    assert cached(store) == {"mine"}
    other.communicate(timeout=60)
    store.cache.make_room()
    assert cached(store) == set()


def test_many_threads_in_little_room_each_get_their_file(site: LoraServer, tmp_path: Path):
    bodies = {site.put(f"/{name}.safetensors", lora_bytes(20_000, name)): lora_bytes(20_000, name) for name in "abcdef"}
    stores = [new_store(site, tmp_path, [], cache_bytes=170_000) for _ in range(2)]
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
    assert sum(call.status == 200 for call in site.calls) > 6, "what was in the way did go"


def test_old_parts_go_and_new_ones_stay(site: LoraServer, store: LoraStore):
    problem(store, site.put("/old.safetensors", LORA, cuts=[100_000] + [0] * 10))
    (old,) = store.cache.parts.glob("*.part")
    os.utime(old, (1000, 1000))
    problem(store, site.put("/new.safetensors", LORA, cuts=[100_000] + [0] * 10))
    store.resolve(site.put("/x.safetensors", OTHER))
    assert len(litter(store)) == 2 and not old.exists()


def test_the_cache_is_for_its_owners_eyes_and_may_be_damaged(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA)
    path = store.resolve(url).file.path
    assert store.cache.folder.stat().st_mode & 0o077 == 0
    for damage in (b"", b"{}", b"[", b'{"source": 1, "sha256": "../x"}'):
        (record,) = store.cache.records.iterdir()
        assert json.loads(record.read_text())["sha256"] == hashlib.sha256(LORA).hexdigest()
        record.write_bytes(damage)
        assert data_of(store, url) == LORA
    path.write_bytes(LORA[:-1])
    assert data_of(store, url) == LORA, "a damaged file is fetched again"
