"""FLUX.1-dev's repository as it lies on the hub, in files as versions of years ago wrote them (tests/dev_layout.py): here a tiny pipeline."""

from pathlib import Path

import pytest
import torch
from dev_layout import CLIP_ORIGIN, OTHERS, dev_layout
from hub_server import HubServer, Repository, client

from lorabooth.families import load_family
from lorabooth.families.flux1 import tiny

CPU = torch.device("cpu")
PROMPTS = ["a portrait of TOK, in a Red hoodie & glasses", "", "it's 42.5!  two  spaces; über", "smiling"]
REPOSITORY = "someone/FLUX.1-dev"
COMMAND = "import sys; from lorabooth.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline as diffusers writes it today, and the same in the other layout."""
    folder = tmp_path_factory.mktemp("models")
    return tiny(folder / "today"), dev_layout(folder / "today", folder / "FLUX.1-dev")


def test_every_component_is_the_same_from_files_of_years_ago(folders: tuple[Path, Path]):
    assert len(list((folders[1] / "transformer").glob("*.safetensors"))) > 1 and len(list((folders[1] / "text_encoder_2").glob("*.safetensors"))) > 1
    today, then = (load_family(str(folder)) for folder in folders)
    for part in ("transformer", "vae", "clip"):
        one, other = (getattr(family, part)(CPU, torch.float32).state_dict() for family in (today, then))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), part
    encoders = today.text_encoders(CPU, torch.float32), then.text_encoders(CPU, torch.float32)
    encoded = today.encode_prompts(encoders[0], PROMPTS), then.encode_prompts(encoders[1], PROMPTS)
    for field in ("embeds", "pooled", "clip_ids"):
        assert torch.equal(getattr(encoded[0], field), getattr(encoded[1], field)), field
    assert (today.native_px, today.text_tokens) == (then.native_px, then.text_tokens)


def test_a_training_from_the_hub_fetches_what_it_needs_and_asks_for_no_other_repository(folders: tuple[Path, Path], demo_photos: Path, tmp_path: Path):
    options = {"trigger": "TOK", "model": REPOSITORY, "steps": 1, "resolution": 64, "lora-rank": 4, "train-text-encoder": "true", "preview-every": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with HubServer() as server:
        server.repositories = {REPOSITORY: Repository(folders[1])}
        done = client(server, tmp_path / "home", COMMAND, "train", str(demo_photos), *words, "--consent", "--json", "--out", str(tmp_path / "run"))
        fetched, asked = server.downloads(REPOSITORY), {call.path for call in server.calls}
    assert done["lora"].endswith("lora.safetensors") and list((tmp_path / "run/samples").glob("*.png"))
    assert len(fetched) == len(set(fetched)) and not set(fetched) & set(OTHERS)
    assert not [path for path in asked if CLIP_ORIGIN in path], "PEFT asks for what CLIP was made of, unless it is told that nothing of its words is trained"
