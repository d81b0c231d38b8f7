"""LoRAs from web servers: real servers on this machine (tests/lora_server.py), with what goes wrong on the way."""

import hashlib
import time
from pathlib import Path

import httpx2
import pytest
from lora_server import LoraServer, lora_bytes
from lora_stores import LORA, OTHER, SECRET, cached, data_of, litter, new_store, problem, statuses

from infer.loras import LoraStore, resolve
from lorabooth import patience, web
from lorabooth.addresses import EVERYWHERE, Addresses
from lorabooth.cli import main
from lorabooth.errors import UserError

# Downloads


def test_a_file_is_downloaded_once_and_asked_about_afterwards(site: LoraServer, store: LoraStore):
    url = site.put("/people/tok.safetensors", LORA)
    choice = store.resolve(f"{url}:0.7")
    assert (choice.weight, choice.file.trigger_word, choice.file.name) == (0.7, "TOK", "tok")
    assert choice.file.path.read_bytes() == LORA and choice.file.sha256 == hashlib.sha256(LORA).hexdigest() == choice.file.path.parent.name
    assert data_of(store, url) == LORA
    assert statuses(site, "/people/tok.safetensors") == [200, 304] and litter(store) == []
    site.put("/people/tok.safetensors", OTHER)
    assert data_of(store, url) == OTHER and choice.file.path.read_bytes() == LORA, "a file that is in use does not change"


def test_a_server_without_etags_is_asked_again(site: LoraServer, store: LoraStore):
    url = site.put("/a.safetensors", LORA, etag=False)
    assert data_of(store, url) == data_of(store, url) == LORA
    site.put("/a.safetensors", lora_bytes(7), etag=False)
    assert data_of(store, url) == lora_bytes(7)
    site.put("/a.safetensors", lora_bytes(7, "KOT"), etag=False)
    assert len(lora_bytes(7, "KOT")) == len(lora_bytes(7)) and data_of(store, url) == lora_bytes(7, "KOT"), "of the same size, as retrained LoRAs are"
    site.put("/b.safetensors", LORA, etag=False, headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})
    assert data_of(store, f"{site.base}/b.safetensors") == data_of(store, f"{site.base}/b.safetensors") == LORA
    assert site.asked("/b.safetensors")[1].headers["If-Modified-Since"] == "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("etag", [True, False])
def test_a_connection_that_is_cut_goes_on_where_it_broke_off(site: LoraServer, store: LoraStore, etag: bool):
    cuts = [100_000, 50_000, 200] if etag else [100_000, 50_000]
    url = site.put("/x.safetensors", LORA, cuts=cuts, etag=etag)
    assert data_of(store, url) == LORA and litter(store) == []
    ranges = [call.headers.get("Range") for call in site.asked("/x.safetensors")]
    assert ranges == ([None, "bytes=100000-", "bytes=150000-", "bytes=150200-"] if etag else [None] * 3)


@pytest.mark.parametrize("at", [1, 7, 100, 511, 512, 513, len(LORA) - 1])
def test_a_cut_at_any_place_is_mended(site: LoraServer, store: LoraStore, at: int):
    assert data_of(store, site.put("/x.safetensors", LORA, cuts=[at])) == LORA


def test_a_server_that_ignores_ranges_starts_over(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA, cuts=[100_000], ranges=False)
    assert data_of(store, url) == LORA
    assert statuses(site, "/x.safetensors") == [200, 200]


def test_a_file_that_changed_meanwhile_is_not_mixed(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    problem(store, url)
    assert len(litter(store)) == 2
    site.put("/x.safetensors", OTHER)
    assert data_of(store, url) == OTHER and litter(store) == []
    assert site.calls[-1].headers["Range"] == "bytes=100000-" and site.calls[-1].status == 200


def test_the_next_command_goes_on_where_the_last_gave_up(site: LoraServer, tmp_path: Path, notices: list[str]):
    url = site.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    error = problem(new_store(site, tmp_path, notices), url)
    assert "broke off" in error.message and "what arrived is kept" in error.hint
    site.pages["/x.safetensors"].cuts = []
    assert data_of(new_store(site, tmp_path, notices), url) == LORA
    assert site.calls[-1].status == 206


def test_a_part_of_another_length_than_the_file_is_thrown_away(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA, cuts=[100_000] + [0] * 10)
    problem(store, url)
    site.put("/x.safetensors", LORA, statuses=[416])
    assert data_of(store, url) == LORA


@pytest.mark.parametrize("length", [True, False])
def test_a_file_over_the_limit_is_refused(site: LoraServer, tmp_path: Path, notices: list[str], length: bool):
    store = new_store(site, tmp_path, notices, limit_bytes=300_000)
    error = problem(store, site.put("/x.safetensors", LORA, length=length))
    assert "is over 0.0003 GB, which is the limit for a LoRA" in error.message and "LORABOOTH_LORA_LIMIT_GB" in error.hint
    assert litter(store) == [] and cached(store) == set()
    assert len(site.calls) == 1
    assert data_of(new_store(site, tmp_path, notices, limit_bytes=len(LORA)), site.put("/y.safetensors", LORA, length=length)) == LORA


@pytest.mark.parametrize(
    ("status", "words"), [(401, "asks for a login"), (403, "may not be read by you"), (404, "there is nothing at"), (410, "is gone"), (418, "refused")]
)
def test_a_refusal_is_one_sentence_at_once(site: LoraServer, store: LoraStore, status: int, words: str):
    url = site.put("/x.safetensors", LORA, status=status)
    error = problem(store, f"{url}?signature={SECRET}")
    assert words in error.message and f"(HTTP {status})" in error.message and "/x.safetensors" in error.message and error.hint
    assert len(site.calls) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_failure_is_waited_out(site: LoraServer, store: LoraStore, status: int):
    url = site.put("/x.safetensors", LORA, statuses=[status] * 3)
    assert data_of(store, url) == LORA
    site.put("/y.safetensors", LORA, status=status)
    assert f"(HTTP {status})" in problem(store, f"{site.base}/y.safetensors").message
    assert len(site.asked("/y.safetensors")) == 4


def test_a_server_may_say_how_long_to_wait_within_reason(site: LoraServer, store: LoraStore):
    url = site.put("/x.safetensors", LORA, statuses=[429], headers={"Retry-After": "1"})
    began = time.monotonic()
    assert data_of(store, url) == LORA and time.monotonic() - began >= 1
    problem(store, site.put("/y.safetensors", LORA, status=429, headers={"Retry-After": "3600"}))
    assert len(site.asked("/y.safetensors")) == 1


def test_a_server_that_falls_silent_is_given_up_and_gone_on_with(site: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "TIMEOUT", httpx2.Timeout(0.2))
    url = site.put("/x.safetensors", LORA, pause_seconds=1)
    assert "does not answer in time" in problem(store, url).message
    assert statuses(site, "/x.safetensors")[:2] == [200, 206]


def test_a_server_that_gives_hardly_anything_is_given_up(site: LoraServer, store: LoraStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patience, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(patience, "SLOW_BYTES", 10**9)
    assert "comes too slowly" in problem(store, site.put("/x.safetensors", LORA, pause_seconds=0.3)).message


def test_a_proxy_of_the_environment_is_used_and_given_the_checked_address(site: LoraServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", site.base)
    monkeypatch.setenv("no_proxy", "direct.example")
    store = new_store(site, tmp_path, [], addresses=Addresses(EVERYWHERE, lookup=lambda host, port: ["10.1.2.3" if host == "a.example" else "127.0.0.1"]))
    site.put("http://10.1.2.3:8080/x.safetensors", LORA)
    site.put("/y.safetensors", OTHER)
    assert data_of(store, "http://a.example:8080/x.safetensors") == LORA and site.calls[0].headers["Host"] == "a.example:8080"
    assert data_of(store, f"http://direct.example:{site.server_port}/y.safetensors") == OTHER


def test_redirects_to_another_server_are_followed(site: LoraServer, store: LoraStore):
    with LoraServer() as other:
        url = site.put("/x", status=302, location=other.put("/file?sig=1", LORA))
        assert data_of(store, url) == LORA


def test_a_redirect_into_a_network_that_is_not_allowed_is_not_followed(site: LoraServer, tmp_path: Path, notices: list[str]):
    with LoraServer("127.0.0.2") as canary:
        url = site.put("/x.safetensors", status=302, location=canary.put("/y", LORA))
        store = new_store(site, tmp_path, notices, addresses=Addresses([EVERYWHERE[0].__class__("127.0.0.1/32")]))
        assert "private network" in problem(store, url).message
        assert canary.calls == []
    assert "private network" in problem(LoraStore(tmp_path / "cache", show=False), f"https://127.0.0.1:{site.server_port}/x.safetensors").message


def test_a_name_for_the_file_is_found_in_the_address(site: LoraServer, store: LoraStore):
    for path, name in (
        ("/a/tok.safetensors", "tok"),
        ("/abc/lora.safetensors", "abc"),
        ("/a%20b/trained_model.tar", "a-b"),
        ("/..%2f..%2fx.safetensors", "x"),
        ("/lora", "127.0.0.1"),
    ):
        assert store.resolve(site.put(path, lora_bytes(8, path))).file.name == name


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
