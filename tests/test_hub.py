"""Models and LoRAs from the hub: the real client against a stand-in on this machine (tests/hub_server.py)."""

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import GOOD_TOKEN, HubServer, Repository, client, simple_repository
from safetensors.torch import save_file

from lorabooth import hub
from lorabooth.errors import UserError
from lorabooth.families.flux1 import tiny

# The client reads its environment at import, so it runs in a process of its own. Each argument is an expression to evaluate.
PROGRAM = """
import json, sys
from lorabooth import hub
from lorabooth.errors import UserError

def answer(expression):
    try:
        return {"value": eval(expression)}
    except UserError as error:
        return {"message": error.message, "hint": error.hint}

print(json.dumps([answer(expression) for expression in sys.argv[1:]], default=str))
"""

# Every component through the family, as training and generating load them; shapes and classes are what the parent can compare.
LOADING = """
import json, torch
from infer.loras import resolve
from lorabooth.errors import UserError
from lorabooth.families import load_family
from train.base import sha256_of, weight_files

def lora(reference):
    try:
        choice = resolve(reference)
        return {"file": choice.file.path.name, "weight": choice.weight, "trigger": choice.file.trigger_word, "parent": str(choice.file.path.parent)}
    except UserError as error:
        return {"message": error.message, "hint": error.hint}

family, cpu = load_family("someone/tiny-flux"), torch.device("cpu")
encoders = family.text_encoders(cpu, torch.float32)
found = {
    "transformer": sum(p.double().sum().item() for p in family.transformer(cpu, torch.float32).parameters()),
    "vae": sum(p.double().sum().item() for p in family.vae(cpu, torch.float32).parameters()),
    "embeds": list(family.encode_prompts(encoders, ["a portrait"]).embeds.shape),
    "native_px": family.native_px,
    "sigmas": len(family.sigmas(4, 64)),
    "base_sha256": sha256_of(weight_files("someone/tiny-flux", "transformer")),
    "loras": [lora(reference) for reference in (
        "someone/lora:0.5", "someone/loras", "someone/loras/second.safetensors", "someone/loras/third.safetensors", "someone/pickles",
    )],
}
print(json.dumps(found))
"""


class Marker:
    """Unpickled, it makes a file: the proof that code of the repository ran."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def config_of(repository: str) -> str:
    return f"hub.component_config({repository!r}, 'transformer')"


def write_lora(path: Path, trigger: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"transformer.a.lora_A.weight": torch.ones(2, 4)}, path, metadata={"modelspec.trigger_phrase": trigger})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A pipeline and LoRAs, in repositories that hold code and pickles too, loaded by a client of its own."""
    top = tmp_path_factory.mktemp("hub")
    folder, ran = tiny(top / "tiny-flux"), top / "code-of-the-repository-ran"
    program, poison = f"open({str(ran)!r}, 'w')", pickle.dumps(Marker(ran))
    for name in ("pipeline.py", "transformer/model.py"):
        (folder / name).write_text(program)
    for name in ("transformer/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/vocabulary.pkl", "weights.safetensors"):
        (folder / name).write_bytes(poison)
    write_lora(top / "lora/lora.safetensors", "TOK")
    write_lora(top / "lora/checkpoint-500/lora.safetensors", "TOK")
    (top / "lora/pytorch_lora_weights.bin").write_bytes(poison)
    for name in ("first", "second"):
        write_lora(top / f"loras/{name}.safetensors", name)
    (top / "pickles").mkdir()
    (top / "pickles/pytorch_lora_weights.bin").write_bytes(poison)
    with HubServer() as server:
        names = {f"someone/{name}" for name in ("tiny-flux", "lora", "loras", "pickles")}
        server.repositories = {name: Repository(top / name.partition("/")[2]) for name in names}
        found = client(server, top / "home", LOADING)
        arrived = sorted(str(path.relative_to(top / "home")) for path in (top / "home").rglob("*") if path.is_file())
        asked = {name: server.downloads(name) for name in names}
    yield found | {"arrived": arrived, "asked": asked, "folder": folder, "ran": ran}


def test_a_pipeline_of_the_hub_loads_component_by_component(loaded: dict[str, Any]):
    from lorabooth.families import load_family

    family, cpu = load_family(str(loaded["folder"])), torch.device("cpu")
    for name, module in (("transformer", family.transformer(cpu, torch.float32)), ("vae", family.vae(cpu, torch.float32))):
        assert loaded[name] == pytest.approx(sum(p.double().sum().item() for p in module.parameters()), abs=1e-6)
    assert loaded["embeds"][0] == 1 and loaded["embeds"][2] == 16
    assert (loaded["native_px"], loaded["sigmas"]) == (128, 5)


def test_only_weights_and_configs_arrive_from_the_hub(loaded: dict[str, Any]):
    asked = loaded["asked"]["someone/tiny-flux"]
    assert asked and len(asked) == len(set(asked)), "a file is asked for once"
    assert {Path(name).suffix for name in asked} <= {".json", ".safetensors", ".txt", ".model"}
    # A file of an allowed kind that belongs to no component stays on the hub too: FLUX.1-dev has 24 GB of them.
    assert "weights.safetensors" not in asked
    assert [name for name in loaded["arrived"] if name.endswith((".bin", ".py", ".pkl"))] == []
    assert not loaded["ran"].exists()


def test_the_sha256_of_a_hub_model_is_that_of_its_weights(loaded: dict[str, Any]):
    weights = (loaded["folder"] / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    assert loaded["base_sha256"] == hashlib.sha256(weights).hexdigest()


def test_a_lora_of_the_hub_is_found_by_repository_or_by_file(loaded: dict[str, Any]):
    only, several, second, _, _ = loaded["loras"]
    assert (only["file"], only["weight"], only["trigger"]) == ("lora.safetensors", 0.5, "TOK")
    assert loaded["asked"]["someone/lora"] == ["lora.safetensors"], "the LoRAs of checkpoints stay on the hub"
    assert "several LoRA files: first.safetensors, second.safetensors" in several["message"]
    assert several["hint"] == "name one, such as someone/loras/first.safetensors"
    assert (second["file"], second["weight"], second["trigger"]) == ("second.safetensors", 1.0, "second")


def test_a_lora_file_that_the_repository_lacks_is_named(loaded: dict[str, Any]):
    assert loaded["loras"][3]["message"] == "someone/loras has no file third.safetensors"


def test_a_repository_with_pickles_alone_holds_no_lora(loaded: dict[str, Any]):
    assert loaded["loras"][4]["message"] == "someone/pickles holds no .safetensors file"
    assert loaded["asked"]["someone/pickles"] == []


def test_each_refusal_of_the_hub_is_one_sentence_with_a_way_on(server: HubServer, tmp_path: Path):
    server.repositories = {
        "someone/gated": simple_repository(tmp_path / "gated", gated=True),
        "someone/ill": simple_repository(tmp_path / "ill", status=500),
        "someone/forbidden": simple_repository(tmp_path / "forbidden", status=403),
        "someone/vae-only": simple_repository(tmp_path / "vae-only"),
    }
    names = ("someone/gated", "someone/nothing", "someone/ill", "someone/forbidden", "a--b/c", "someone/name.git")
    questions = [*map(config_of, names), "hub.component_folder('someone/vae-only', 'vae')"]
    gated, missing, ill, forbidden, dashes, suffix, no_vae = client(server, tmp_path / "home", PROGRAM, *questions)
    assert "is gated: its licence must be accepted and you must be logged in" in gated["message"]
    assert "accept the licence, then run: hf auth login" in gated["hint"] and "huggingface.co/someone/gated" in gated["hint"]
    assert "has no repository someone/nothing" in missing["message"]
    assert ill == {"message": "the hub refused someone/ill (HTTP 500)", "hint": "try again later"}
    assert forbidden["message"] == "the hub refused someone/forbidden (HTTP 403)"
    for answer, name in ((dashes, "a--b/c"), (suffix, "someone/name.git")):
        assert answer["message"] == f"{name!r} is not a name that a hub repository can have"
    assert no_vae["message"] == "someone/vae-only has no 'vae': it is not a FLUX.1 pipeline"


def test_a_good_token_does_not_open_a_gated_repository_whose_licence_is_not_accepted(server: HubServer, tmp_path: Path):
    server.repositories["someone/gated"] = simple_repository(tmp_path / "gated", gated=True)
    questions = [config_of("someone/gated"), config_of("someone/nothing")]
    gated, missing = client(server, tmp_path / "home", PROGRAM, *questions, HF_TOKEN=GOOD_TOKEN)
    assert "accept the licence" in gated["hint"]
    assert "has no repository someone/nothing" in missing["message"]


def test_a_token_that_is_not_valid_is_told_apart_from_a_missing_repository(server: HubServer, tmp_path: Path):
    server.repositories["someone/open"] = simple_repository(tmp_path / "open")
    (answer,) = client(server, tmp_path / "home", PROGRAM, config_of("someone/open"), HF_TOKEN="hf_bad")
    assert answer == {"message": "the hub refused someone/open (HTTP 401)", "hint": "the token is not valid; run: hf auth login"}


def test_offline_what_is_cached_is_used_and_what_is_not_is_said(server: HubServer, tmp_path: Path):
    server.repositories["someone/open"] = simple_repository(tmp_path / "open")
    question, vae = config_of("someone/open"), "hub.component_config('someone/open', 'vae')"
    (nothing,) = client(server, tmp_path / "home", PROGRAM, question, HF_HUB_OFFLINE="1")
    assert nothing["message"] == "someone/open is not on this machine and the hub cannot be reached" and "--model mini" in nothing["hint"]
    (online,) = client(server, tmp_path / "home", PROGRAM, question)
    calls = len(server.calls)
    cached, other = client(server, tmp_path / "home", PROGRAM, question, vae, HF_HUB_OFFLINE="1")
    assert online == cached == {"value": {"_class_name": "FluxTransformer2DModel"}}
    assert "has no vae/config.json" in other["message"]
    assert len(server.calls) == calls, "offline means that nothing is asked"


def test_an_unreachable_hub_is_like_being_offline(server: HubServer, tmp_path: Path):
    (answer,) = client(server, tmp_path / "home", PROGRAM, config_of("someone/open"), HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["message"] == "someone/open is not on this machine and the hub cannot be reached"


def test_a_cut_download_goes_on_where_it_broke_off(server: HubServer, tmp_path: Path):
    repository = server.repositories["someone/big"] = simple_repository(tmp_path / "big")
    # The client writes in pieces of 10 MiB; what is cut before the first piece is full is lost.
    data = os.urandom(12 << 20)
    (tmp_path / "big/transformer/model.safetensors").write_bytes(data)
    repository.cuts["transformer/model.safetensors"] = [11 << 20]
    (folder,) = client(server, tmp_path / "home", PROGRAM, "hub.component_folder('someone/big', 'transformer')")
    assert (Path(folder["value"]) / "model.safetensors").read_bytes() == data
    assert [call.range for call in server.calls if call.range] == [f"bytes={10 << 20}-"]


def test_after_a_download_that_broke_off_for_good_the_next_call_fetches_only_what_is_missing(server: HubServer, tmp_path: Path):
    repository = server.repositories["someone/big"] = simple_repository(tmp_path / "big")
    data = os.urandom(1 << 16)
    (tmp_path / "big/transformer/model.safetensors").write_bytes(data)
    repository.cuts["transformer/model.safetensors"] = [100] * 6  # the client tries six times, a second apart
    question = "hub.component_folder('someone/big', 'transformer')"
    broken, folder = client(server, tmp_path / "home", PROGRAM, question, question)
    assert broken["message"].startswith("the download of someone/big broke off") and "run the same command again" in broken["hint"]
    assert (Path(folder["value"]) / "model.safetensors").read_bytes() == data
    assert sorted(server.downloads("someone/big")) == ["transformer/config.json", *["transformer/model.safetensors"] * 7]


@pytest.mark.parametrize("model", ["flux", "a/b/c", "./nowhere", "~/nowhere", "/no/where", "owner/", "", "https://huggingface.co/a/b"])
def test_what_is_no_model_reference_is_refused_without_asking_the_hub(model: str):
    with pytest.raises(UserError, match="unknown model"):
        hub.model_folder(model)


def test_a_folder_that_is_not_a_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"not a diffusers pipeline: it has no model_index\.json"):
        hub.model_folder(str(tmp_path))
