"""LoRAs of CivitAI: a stand-in on this machine with the answers of its API."""

from pathlib import Path
from typing import Any

import pytest
from lora_server import LoraServer
from lora_stores import LORA, OTHER, SECRET, cached, civitai_pages, data_of, litter, new_store, problem, statuses

from infer.loras import LoraStore


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
def test_a_page_or_a_download_of_civitai_gives_the_primary_safetensors_file(site: LoraServer, store: LoraStore, reference: str):
    civitai_pages(site)
    choice = store.resolve(f"{reference}:0.6")
    assert choice.file.path.read_bytes() == LORA and (choice.file.name, choice.weight) == ("My-LoRA-v2", 0.6)
    assert data_of(store, reference) == LORA
    assert statuses(site, "/storage/file") == [200], "by its checksum the file is known"


def test_a_download_link_of_civitai_picks_among_the_files(site: LoraServer, store: LoraStore):
    civitai_pages(site)
    assert data_of(store, "https://civitai.com/api/download/models/33?type=Model&size=pruned&format=SafeTensor") == OTHER
    error = problem(store, "https://civitai.com/api/download/models/33?type=Training%20Data")
    assert "has no .safetensors file of type=Training+Data; it has data.zip, old.pt" in error.message


def test_a_file_of_civitai_with_another_checksum_is_refused(site: LoraServer, store: LoraStore):
    civitai_pages(site)
    site.put("/storage/file?sig=1", OTHER)
    error = problem(store, "https://civitai.com/models/12")
    assert "did not arrive as it was published: its SHA-256 is" in error.message and "do not trust" in error.hint
    assert cached(store) == set() and litter(store) == []
    site.put("/storage/file?sig=1", LORA)
    assert data_of(store, "https://civitai.com/models/12") == LORA


def test_what_civitai_says_is_too_large_is_not_asked_for(site: LoraServer, tmp_path: Path, notices: list[str]):
    civitai_pages(site)
    assert "which is the limit" in problem(new_store(site, tmp_path, notices, limit_bytes=1000), "https://civitai.com/models/12").message
    assert site.asked("/storage/file") == []


def test_the_token_of_civitai_goes_to_civitai_alone(site: LoraServer, tmp_path: Path, notices: list[str]):
    civitai_pages(site)
    for path in ("/api/v1/models/12", "/api/v1/model-versions/33", "/api/download/models/33"):
        site.pages[path].token = SECRET
    store = new_store(site, tmp_path, notices)
    error = problem(store, "https://civitai.com/models/12")
    assert "only to those who are logged in (HTTP 401)" in error.message and "set CIVITAI_TOKEN" in error.hint
    assert "is not valid" in problem(new_store(site, tmp_path, notices, civitai_token="other"), "https://civitai.com/models/12").hint
    with LoraServer() as storage:
        site.pages["/api/download/models/33"].location = storage.put("/file", LORA)
        store = new_store(site, tmp_path, notices, civitai_token=SECRET)
        assert data_of(store, "https://civitai.com/models/12") == LORA
        assert len(storage.calls) == 1 and "Authorization" not in storage.calls[0].headers
        # What is not CivitAI gets none at all, and a token that stands in an address is used and not kept.
        store.resolve(storage.put("/other.safetensors", OTHER))
        assert "Authorization" not in storage.calls[1].headers
    tokened = new_store(site, tmp_path / "2", notices)
    site.pages["/api/download/models/33"].location = "/storage/file?sig=1"
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
def test_what_civitai_does_not_have_is_one_sentence(site: LoraServer, store: LoraStore, reference: str, words: str):
    civitai_pages(site)
    site.put("/api/v1/models/14", {"modelVersions": []})
    site.put("/api/v1/models/15", b"[]")
    site.put("/api/v1/models/16", b"<html>")
    site.put("/api/v1/models/17", status=403)
    assert words in problem(store, reference).message


@pytest.mark.parametrize("files", [None, [], [7], [{"name": 5}], [{"type": "Model", "name": "a.safetensors", "hashes": 3, "sizeKB": "x", "downloadUrl": 5}]])
def test_an_answer_of_civitai_in_another_shape_is_one_sentence(site: LoraServer, store: LoraStore, files: Any):
    civitai_pages(site, files=files)
    problem(store, "https://civitai.com/models/12?modelVersionId=33")


@pytest.mark.parametrize("size", [1e308, float("inf"), float("nan"), -1])
def test_a_size_of_civitai_that_is_none_does_not_count(site: LoraServer, store: LoraStore, size: float):
    civitai_pages(site, files=[{"type": "Model", "name": "a.safetensors", "sizeKB": size}])
    assert data_of(store, "https://civitai.com/models/12?modelVersionId=33") == LORA


def test_a_passing_failure_of_civitai_is_waited_out(site: LoraServer, store: LoraStore):
    civitai_pages(site)
    for path in ("/api/v1/models/12", "/api/v1/model-versions/33", "/api/download/models/33"):
        site.pages[path].statuses = [503, 429, 502]
    assert data_of(store, "https://civitai.com/models/12") == LORA
