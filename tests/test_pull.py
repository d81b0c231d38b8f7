"""`lorabooth pull`: from real servers on this machine to a file of the user's, whole or not at all, and never over another."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from urllib.parse import urlsplit

import lora_formats as formats
import pytest
from hub_server import HubServer, Repository
from lora_server import LoraServer, tar_bytes
from lora_stores import LORA, OTHER, SECRET, civitai_pages
from test_diff import drawn_pairs, of_mini

from infer import loras
from infer.civitai import Civitai
from infer.loras import LoraStore
from infer.pull_command import copy
from lorabooth.cli import main
from lorabooth.lora_file import LoraFile


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the commands run; their cache is beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORABOOTH_ALLOW_PRIVATE_ADDRESSES", "1")
    return folder


def files(folder: Path) -> list[str]:
    """All that is in a folder, what is hidden too."""
    return sorted(os.listdir(folder))


def test_a_url_is_fetched_checked_and_copied(site: LoraServer, here: Path, capsys: pytest.CaptureFixture[str]):
    url = site.put("/people/tok.safetensors", LORA)
    assert main(["pull", f"{url}?sig={SECRET}"]) == 0
    assert capsys.readouterr().out == "tok.safetensors\n" and (here / "tok.safetensors").read_bytes() == LORA
    assert main(["pull", url, "--out", "models/loras/", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sha256 = hashlib.sha256(LORA).hexdigest()
    assert told == {"file": "models/loras/tok.safetensors", "bytes": len(LORA), "sha256": sha256, "name": "tok", "trigger_word": "TOK", "base": ""}
    assert files(here / "models/loras") == ["tok.safetensors"] and files(here) == ["models", "tok.safetensors"]
    assert main(["pull", url, "--out", str(here)]) == 0, "a folder that is there needs no slash"


def test_the_tar_of_a_hosted_trainer_and_a_page_of_civitai(site: LoraServer, here: Path, monkeypatch: pytest.MonkeyPatch):
    civitai_pages(site)
    make = LoraStore.from_environment

    def of_this_machine() -> LoraStore:
        store = make()
        store.civitai = Civitai(store.web, "", site.base)
        return store

    monkeypatch.setattr(loras.LoraStore, "from_environment", of_this_machine)
    assert main(["pull", "https://civitai.com/models/12"]) == 0
    assert main(["pull", site.put("/trained_model.tar", tar_bytes(flux__lora=b"x", output__lora=b"")), "--out", "x.safetensors"]) == 2
    tar = tar_bytes(**{"output__flux_train__lora.safetensors": OTHER, "output__config.yaml": b"x"})
    assert main(["pull", site.put("/abc/trained_model.tar", tar)]) == 0
    assert files(here) == ["My-LoRA-v2.safetensors", "abc.safetensors"]
    assert (here / "My-LoRA-v2.safetensors").read_bytes() == LORA and (here / "abc.safetensors").read_bytes() == OTHER


def test_a_download_that_broke_off_goes_on_with_the_next_command(site: LoraServer, here: Path, capsys: pytest.CaptureFixture[str]):
    url = site.put("/x.safetensors", LORA, cuts=[150_000], statuses=[200, 404])
    assert main(["pull", url, "--out", "a/b/x.safetensors"]) == 2
    assert files(here) == ["a"] and files(here / "a") == [], "a folder made for nothing goes again"
    assert main(["pull", url, "--out", "a/b/x.safetensors"]) == 0
    assert (here / "a/b/x.safetensors").read_bytes() == LORA
    calls = site.asked("/x.safetensors")
    assert [call.status for call in calls] == [200, 404, 206] and calls[-1].headers["Range"] == "bytes=150000-"
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_is_ever_overwritten_and_the_same_file_will_do(site: LoraServer, here: Path, capsys: pytest.CaptureFixture[str]):
    url = site.put("/x.safetensors", LORA)
    (here / "x.safetensors").write_bytes(b"mine")
    (here / "link.safetensors").symlink_to(here / "nowhere")
    (here / "folder.safetensors").mkdir()
    for out in ([], ["--out", "link.safetensors"], ["--out", "./"]):
        assert main(["pull", url, *out]) == 2
        assert "already" in capsys.readouterr().err
    assert main(["pull", url, "--out", "folder.safetensors"]) == 0, "a folder is a folder, whatever its name"
    assert (here / "x.safetensors").read_bytes() == b"mine" and not (here / "nowhere").exists()
    assert files(here) == ["folder.safetensors", "link.safetensors", "x.safetensors"]
    assert main(["pull", url, "--out", "y.safetensors"]) == main(["pull", url, "--out", "y.safetensors"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == ["y.safetensors"] * 2 and "is there already, the same" in printed.err


def test_of_several_at_once_one_writes_and_the_others_see_it(site: LoraServer, here: Path):
    urls = [site.put("/a.safetensors", LORA), site.put("/b.safetensors", OTHER)] * 2
    command = [sys.executable, "-m", "lorabooth", "pull"]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    running = [subprocess.Popen([*command, url, "--out", "x.safetensors"], env=environment, stderr=subprocess.DEVNULL) for url in urls]
    codes = [process.wait(timeout=120) for process in running]
    assert sorted(codes) == [0, 0, 2, 2] and files(here) == ["x.safetensors"]
    assert (here / "x.safetensors").read_bytes() == (LORA if codes[0] == 0 else OTHER)


def test_mistakes_are_one_sentence_and_leave_nothing(site: LoraServer, here: Path, capsys: pytest.CaptureFixture[str]):
    good = site.put("/x.safetensors", LORA)
    for command, words in (
        ([good, "--out", "x.pt"], "must end in .safetensors, or be a folder"),
        ([f"{good}:0.5"], "has a weight of 0.5, which is of no use to copy"),
        ([site.put("/page", b"<!doctype html>" + b" " * 1000)], "is a web page, not a LoRA"),
        ([site.put("/cut.safetensors", LORA[:-1])], "is cut short"),
        ([site.base + "/none.safetensors"], "404"),
        (["nowhere.safetensors"], "no LoRA at"),
    ):
        assert main(["pull", *command]) == 2
        said = capsys.readouterr().err
        sentence = said[said.index("lorabooth") :]  # before it may be a progress bar
        assert words in sentence and "Traceback" not in said and len(sentence.splitlines()) <= 2, said
    assert files(here) == []


def test_a_disk_that_is_full_says_so_and_leaves_nothing(site: LoraServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root; the limit on file sizes below stands in for it")
    try:
        assert main(["pull", site.put("/x.safetensors", LORA), "--out", f"{disk}/"]) == 2
        assert "the disk is full" in capsys.readouterr().err and files(disk) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_copy_that_breaks_off_leaves_nothing(here: Path):
    (here / "a.safetensors").write_bytes(LORA)
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom infer.pull_command import copy\nfrom lorabooth.lora_file import LoraFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfile = LoraFile.read(Path('a.safetensors'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    copy(file, Path('b.safetensors'))\nexcept OSError as error:\n    sys.exit(error.errno)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False, env=environment).returncode == errno.EFBIG
    assert files(here) == ["a.safetensors"]


def test_a_large_file_is_not_read_into_memory(here: Path):
    size = 1 << 28
    text = json.dumps({"x.lora_A.weight": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}}).encode()
    with (here / "a.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    tracemalloc.start()
    copy(LoraFile.read(here / "a.safetensors"), here / "b.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (here / "b.safetensors").stat().st_size == 8 + len(text) + size and peak < 8 << 20


def test_the_strength_that_peft_keeps_beside_its_file_comes_along(here: Path, capsys: pytest.CaptureFixture[str]):
    peft = formats.peft_folder(here / "peft.safetensors", drawn_pairs())
    assert main(["pull", str(peft)]) == 0
    assert "use lorabooth convert" in capsys.readouterr().err
    assert files(here) == ["peft", "peft.safetensors"], "named after its folder"
    assert main(["pull", str(peft)]) == 0, "the same file is there"
    assert main(["diff", str(of_mini(here / "peft.safetensors")), str(peft)]) == 0
    assert LoraFile.read(peft).tensors_sha256 == LoraFile.read(here / "peft.safetensors").tensors_sha256


def test_a_repository_of_the_hub_gives_a_file_named_after_it(here: Path, tmp_path: Path):
    for name in ("lora.safetensors", "style/fox.safetensors"):
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(LORA)
    with HubServer() as server:
        server.repositories["someone/tok"] = Repository(tmp_path / "repository")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        ours = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parent.parent)}
        for reference, name in (("someone/tok", "tok"), ("someone/tok/style/fox.safetensors", "fox")):
            command = [sys.executable, "-m", "lorabooth", "pull", reference]
            done = subprocess.run(command, capture_output=True, text=True, env=kept | ours, timeout=120, check=False)
            assert (done.returncode, done.stdout) == (0, f"{name}.safetensors\n"), done.stderr
        assert (here / "tok.safetensors").read_bytes() == LORA and urlsplit(server.endpoint).hostname == "127.0.0.1"
