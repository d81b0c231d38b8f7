"""LoRAs of the hub by reference: the real client against a stand-in on this machine, in a process of its own."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import GOOD_TOKEN, HubServer, Repository, client
from lora_server import lora_bytes

# Each argument is a reference, with a token and a space before it where one is to be used.
PROGRAM = """
import json, os, sys
from infer.loras import LoraStore
from lorabooth.errors import UserError

notices = []
store = LoraStore(notice=notices.append, limit_bytes=1_000_000)

def answer(reference):
    token, _, reference = reference.rpartition(" ")
    os.environ["HF_TOKEN"] = token
    try:
        file = store.resolve(reference).file
        described = (file.path.parent / "adapter_config.json").exists()
        return {"trigger": file.trigger_word, "sha256": file.sha256, "name": file.name, "described": described}
    except UserError as error:
        return {"message": error.message, "hint": error.hint}

answers = [answer(reference) for reference in sys.argv[1:]]
print(json.dumps(answers + [{"notices": notices}]))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def repository(folder: Path, *files: str, **trouble: object) -> Repository:
    """A repository with LoRAs of these names, each with its name as trigger word."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lora_bytes(16, name))
    return Repository(folder, **trouble)  # type: ignore[arg-type]


def test_every_way_to_name_a_lora_of_the_hub(server: HubServer, tmp_path: Path):
    one = server.repositories["someone/one"] = repository(tmp_path / "one", "tok.safetensors", "checkpoint-5/tok.safetensors")
    (tmp_path / "large").mkdir()
    (tmp_path / "large/x.safetensors").write_bytes(lora_bytes(300_000))
    server.repositories["someone/large"] = Repository(tmp_path / "large")
    server.repositories["someone/deep"] = repository(tmp_path / "deep", "a/x.safetensors", "b/y.safetensors")
    page = "https://huggingface.co/someone"
    references = [
        "someone/one", f"someone/one@{one.commit}", "someone/one/checkpoint-5/tok.safetensors@main", f"{page}/one:0.5", f"{page}/one/tree/main/checkpoint-5",
        f"{page}/one/blob/main/tok.safetensors", f"{page}/one/resolve/{one.commit}/checkpoint-5/tok.safetensors?download=true:0.5",
        "someone/one@v9", "someone/deep", "someone/one/other.safetensors", "someone/large", "someone/none",
    ]  # fmt: skip
    *found, no_revision, deep, no_file, large, none, notices = client(server, tmp_path / "home", PROGRAM, *references)
    top, inner = "tok.safetensors", "checkpoint-5/tok.safetensors"
    assert [answer.get("trigger", answer) for answer in found] == [top, top, inner, top, inner, top, inner]
    assert found[0]["name"] == "someone/one"
    assert no_revision["message"] == "someone/one has no such revision" and "a branch, a tag" in no_revision["hint"]
    assert deep == {
        "message": "someone/deep holds no .safetensors file",
        "hint": "name one of those in its folders: a/x.safetensors, b/y.safetensors",
    }
    assert no_file == {"message": "someone/one has no file other.safetensors", "hint": "it has checkpoint-5/tok.safetensors, tok.safetensors"}
    assert large["message"] == "someone/large/x.safetensors is over 0.001 GB, which is the limit for a LoRA"
    assert server.downloads("someone/large") == []
    assert "has no repository someone/none" in none["message"] and "hf auth login" in none["hint"]
    assert sorted(server.downloads("someone/one")) == [inner, top], "each file is downloaded once"
    assert notices == {"notices": []}


def test_what_peft_saved_comes_with_its_description(server: HubServer, tmp_path: Path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    server.repositories["someone/peft"] = repository(tmp_path / "peft", "adapter_model.safetensors")
    [found, _] = client(server, tmp_path / "home", PROGRAM, "someone/peft")
    assert found["described"] and sorted(server.downloads("someone/peft")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_private_or_gated_lora_needs_the_hubs_own_token(server: HubServer, tmp_path: Path):
    server.repositories["someone/gated"] = repository(tmp_path / "gated", "tok.safetensors", gated=True)
    server.repositories["someone/open"] = repository(tmp_path / "open", "tok.safetensors")
    references = ["someone/gated", "hf_bad someone/gated", f"{GOOD_TOKEN} someone/gated", f"{GOOD_TOKEN} someone/open"]
    gated, bad, unaccepted, good, _ = client(server, tmp_path / "home", PROGRAM, *references)
    assert "is gated" in gated["message"] and "hf auth login" in gated["hint"]
    assert "(HTTP 401)" in bad["message"] and "the token is not valid" in bad["hint"]
    assert "accept the licence" in unaccepted["hint"]
    assert good["trigger"] == "tok.safetensors"


def test_a_file_that_does_not_arrive_as_the_hub_has_it_is_refused_and_not_kept(server: HubServer, tmp_path: Path):
    broken = server.repositories["someone/broken"] = repository(tmp_path / "broken", "tok.safetensors")
    stored, good = broken.files["tok.safetensors"], (tmp_path / "broken/tok.safetensors").read_bytes()
    assert stored.id == hashlib.sha256(good).hexdigest()
    stored.__dict__["data"] = good[:-1] + b"x"  # the same length under the same id
    bad, again, _ = client(server, tmp_path / "home", PROGRAM, "someone/broken", "someone/broken")
    assert bad == again and "did not arrive as the hub has it: its checksum differs" in bad["message"]
    assert server.downloads("someone/broken") == ["tok.safetensors"] * 4, "each command tries again once"


UNCHECKED = "import sys; from huggingface_hub import hf_hub_download; hf_hub_download(sys.argv[1], sys.argv[2]); print('[]')"


def test_what_was_downloaded_wrong_by_a_command_that_died_is_fetched_again(server: HubServer, tmp_path: Path):
    broken = server.repositories["someone/broken"] = repository(tmp_path / "broken", "tok.safetensors")
    stored, good = broken.files["tok.safetensors"], (tmp_path / "broken/tok.safetensors").read_bytes()
    assert stored.id
    stored.__dict__["data"] = good[:-1] + b"x"
    client(server, tmp_path / "home", UNCHECKED, "someone/broken", "tok.safetensors")  # all that happens before a kill
    stored.__dict__["data"] = good
    found, again, _ = client(server, tmp_path / "home", PROGRAM, "someone/broken", "someone/broken")
    assert found == again and found["sha256"] == hashlib.sha256(good).hexdigest() and len(server.downloads("someone/broken")) == 2


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_is_damaged_in_the_hubs_cache_is_never_used(server: HubServer, tmp_path: Path, cut: bool):
    server.repositories["someone/one"] = repository(tmp_path / "one", "tok.safetensors")
    home, good = tmp_path / "home", (tmp_path / "one/tok.safetensors").read_bytes()
    client(server, home, PROGRAM, "someone/one")
    (blob,) = (file for file in home.rglob("blobs/*") if file.name == hashlib.sha256(good).hexdigest())
    blob.write_bytes(good[:100] if cut else good[:-1] + b"x")
    offline, _ = client(server, home, PROGRAM, "someone/one", HF_HUB_OFFLINE="1")
    assert offline["message"] == f"someone/one/tok.safetensors is damaged in the hub's cache ({blob}): its checksum differs"
    assert "connect to the internet and run the same command again" in offline["hint"]
    found, _ = client(server, home, PROGRAM, "someone/one")
    assert found["sha256"] == hashlib.sha256(good).hexdigest() and blob.read_bytes() == good


def test_a_lora_that_was_downloaded_is_used_when_the_hub_cannot_be_asked(server: HubServer, tmp_path: Path):
    for name in ("one", "ill", "forbidden"):
        server.repositories[f"someone/{name}"] = repository(tmp_path / name, "tok.safetensors")
    page, home = "https://huggingface.co/someone/one/blob/main/tok.safetensors", tmp_path / "home"
    online, *_ = client(server, home, PROGRAM, *server.repositories)
    server.repositories["someone/ill"].status, server.repositories["someone/forbidden"].status = 503, 403
    ill, forbidden, notices = client(server, home, PROGRAM, "someone/ill", "someone/forbidden")
    assert ill == online | {"name": "someone/ill"} and notices["notices"] == ["the hub cannot be reached; someone/ill is used as it was downloaded before"]
    assert "(HTTP 403)" in forbidden["message"]
    calls = len(server.calls)
    for trouble in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        first, second, missing, notices = client(server, home, PROGRAM, "someone/one", page, "someone/two", **trouble)
        assert first == second == online
        assert missing["message"] == "someone/two is not on this machine and the hub cannot be reached" and "run folder" in missing["hint"]
        assert notices["notices"] == ["the hub cannot be reached; someone/one is used as it was downloaded before"] * 2
    assert len(server.calls) == calls


def test_a_lora_of_the_hub_whose_download_broke_off_is_told(server: HubServer, tmp_path: Path):
    one = server.repositories["someone/one"] = repository(tmp_path / "one", "tok.safetensors")
    one.cuts["tok.safetensors"] = [50] * 6
    broken, fine, _ = client(server, tmp_path / "home", PROGRAM, "someone/one", "someone/one")
    assert broken["message"].startswith("the download of someone/one broke off") and fine["trigger"] == "tok.safetensors"
