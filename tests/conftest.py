"""Fixtures shared by the tests: the mini model through plain diffusers, and a person's photos."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests take one thread each: layers of 64 numbers have nothing to share out, and threads that share cores with another test spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from lora_server import LoraServer
from lora_stores import new_store
from push_server import PushServer

from infer.loras import LoraStore
from lorabooth import consent, mini
from lorabooth.cli import main
from lorabooth.mini import people
from lorabooth.runs import RunDir


def pytest_configure(config: pytest.Config) -> None:
    """The same tests on every machine: a GPU computes in bf16, and pictures are compared to the bit."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """What the imports made stays: it is set apart, as `lorabooth.imports` has it, and no search for garbage walks over it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def settings_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of settings apart from the user's, in which the consent of the drawn people in the tests is remembered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        consent._remember("option")
        yield


@pytest.fixture(scope="session")
def mini_pipe() -> FluxPipeline:
    """The mini model as anybody would load it, with none of our code."""
    pipe = FluxPipeline.from_pretrained(mini.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def demo_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos with captions, as a zip; fewer than a batch of four."""
    file = tmp_path_factory.mktemp("photos") / "three.zip"
    with zipfile.ZipFile(people.DEMO_ZIP) as demo, zipfile.ZipFile(file, "w") as few:
        for name in sorted(demo.namelist())[:6]:
            few.writestr(name, demo.read(name))
    return file


@pytest.fixture(scope="session")
def tiny_command(demo_photos: Path) -> list[str]:
    """The shortest training that does all that a training does. Its rate is so high that four steps show in a picture."""
    options = {
        "trigger": "TOK", "model": "mini", "steps": 4, "batch-size": 2, "lora-rank": 4, "checkpoint-every": 2, "learning-rate": 0.02, "warmup-steps": 1,
        "resolution": 64, "preview-every": 4, "sigma-sampling": "logit-normal", "preservation-rate": 0.0,
        "loraplus-lr-ratio": 1.0, "train-text-encoder": "false",
    }  # fmt: skip
    return ["train", str(demo_photos), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="session")
def tiny_run(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run by the real command. Tests that change anything work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*tiny_command, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoraServer]:
    """A web server on this machine, reached without a proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with LoraServer() as running:
        yield running


@pytest.fixture
def notices() -> list[str]:
    """What a store has told its user."""
    return []


@pytest.fixture
def store(site: LoraServer, tmp_path: Path, notices: list[str]) -> LoraStore:
    """An empty store that takes the site for CivitAI."""
    return new_store(site, tmp_path, notices)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[PushServer]:
    """A stand-in hub that can be written to."""
    with PushServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A copy of the finished run, to change or to damage."""
    return RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
