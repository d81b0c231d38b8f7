"""`lorabooth loras`: the LoRAs of this machine in one table, and everything that one tells; of strangers' files nothing that harms."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora_formats as formats
import pytest
import torch
from lora_server import LoraServer, lora_bytes
from lora_stores import LORA
from test_diff import TO_Q, drawn_pairs, of_mini

from infer import table as tables
from infer.lora_list import SHARD
from lorabooth.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any LoRA; the commands run in its folder `here`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORABOOTH_ALLOW_PRIVATE_ADDRESSES", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def loras(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["loras", *map(str, arguments)])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and "Traceback" not in printed.err
    return code, printed.out, printed.err


def info(capsys: pytest.CaptureFixture[str], file: Path) -> dict[str, Any]:
    code, out, _ = loras(capsys, "info", file, "--json")
    (told,) = json.loads(out)
    assert code == 0
    return told


def in_hub(machine: Path, repository: str, name: str, data: bytes, commit: str = "c0ffee") -> None:
    file = machine / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / commit / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def test_runs_downloads_and_the_hubs_cache_are_in_one_table(machine: Path, site: LoraServer, capsys: pytest.CaptureFixture[str]):
    assert loras(capsys) == (0, "", "no LoRA in runs, among the downloads or in the hub's cache\n")
    of_mini(formats.diffusers(Path("runs/TOK-photos/lora.safetensors"), drawn_pairs()), **{"modelspec.trigger_phrase": "TOK"})
    Path("runs/unfinished").mkdir()
    assert main(["pull", site.put("/fox.safetensors", LORA)]) == 0
    in_hub(machine, "someone/ink", "lora.safetensors", lora_bytes(8, "INK"))
    in_hub(machine, "someone/ink", "deep/x.safetensors", lora_bytes(8, "XYZ"))
    in_hub(machine, "someone/base", "model.safetensors", LORA.replace(b"lora_A", b"matrix"))
    in_hub(machine, "someone/base", "model-00001-of-00002.safetensors", b"x")
    code, out, err = loras(capsys)
    assert (code, err) == (0, "")
    head, run, download, first, second = out.splitlines()
    assert head.split() == ["NAME", "TRIGGER", "BASE", "RANK", "SIZE", "DATE", "FROM"] and not head.endswith(" ")
    assert run.split()[:4] == ["TOK-photos", "TOK", "mini", "4"] and run.endswith("runs/TOK-photos")
    assert download.split()[:3] == ["fox", "TOK", "1"] and download.endswith(f"{site.base}/fox.safetensors")
    assert first.endswith("someone/ink") and second.endswith("someone/ink/deep/x.safetensors") and "INK" in first and "XYZ" in second
    assert all(line[head.index("FROM") - 1] == " " != line[head.index("FROM")] for line in (run, download, first, second)), "columns are aligned"
    rows = json.loads(loras(capsys, "--json")[1])
    assert [(row["kind"], row["name"], row["problem"]) for row in rows] == [
        ("run", "TOK-photos", ""), ("download", "fox", ""), ("hub", "ink", ""), ("hub", "x", ""),
    ]  # fmt: skip
    assert rows[1]["bytes"] == len(LORA) and Path(rows[1]["path"]).read_bytes() == LORA


def test_what_is_listed_can_be_asked_about_by_where_it_is_from(machine: Path, site: LoraServer, capsys: pytest.CaptureFixture[str]):
    of_mini(formats.kohya(Path("runs/a/lora.safetensors"), drawn_pairs()))
    assert main(["pull", site.put("/fox.safetensors", LORA)]) == 0
    sources = [row["source"] for row in json.loads(loras(capsys, "--json")[1])]
    code, out, _ = loras(capsys, "info", *sources)
    assert code == 0 and out.count("sha256") == 2


def test_an_option_of_the_list_is_not_ignored_before_info(capsys: pytest.CaptureFixture[str]):
    for option in (["--json"], ["--runs", "."]):
        code, out, err = loras(capsys, *option, "info", "runs/x")
        assert (code, out) == (2, "") and f"{option[0]} before info is of the list" in err


def header(tensors: dict[str, Any], metadata: dict[str, Any] | None = None, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = json.dumps(tensors | ({"__metadata__": metadata} if metadata else {})).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DOWN, UP = f"transformer.{TO_Q}.lora_A.weight", f"transformer.{TO_Q}.lora_B.weight"
HOSTILE = {
    "overlap": header(
        {DOWN: {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, UP: {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]}}, data=bytes(12)
    ),
    "hole": header({DOWN: {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]}}, data=bytes(12)),
    "backwards": header({DOWN: {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 0]}}, data=bytes(8)),
    "long-header": header({}, length=1 << 60),
    "header-past-the-end": header({DOWN: {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, length=4000),
    "cut": LORA[:-5],
    "empty": b"",
    "text": b"hello \x1b[2J" * 100,
    "list": struct.pack("<Q", 2) + b"[]",
    "shape-of-text": header({DOWN: {"dtype": "F32", "shape": ["\x1b[2J"], "data_offsets": [0, 8]}}, data=bytes(8)),
    "negative-shape": header({DOWN: {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}}, data=bytes(8)),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_a_row_that_says_so_and_one_sentence(name: str, capsys: pytest.CaptureFixture[str]):
    of_mini(formats.diffusers(Path("runs/good/lora.safetensors"), drawn_pairs()))
    Path("runs/bad").mkdir()
    Path("runs/bad/lora.safetensors").write_bytes(HOSTILE[name])
    code, out, _ = loras(capsys)
    _, bad, good = out.splitlines()
    assert code == 0 and bad.startswith("bad") and "damaged: " in bad and good.startswith("good")
    code, out, err = loras(capsys, "info", "runs/bad", "runs/good")
    assert code == 2 and out.startswith("good\n") and err.startswith("lorabooth: ") and len(err.splitlines()) <= 2


def test_what_strangers_write_into_metadata_is_harmless(capsys: pytest.CaptureFixture[str]):
    evil = "\x1b]0;owned\x07\r\n" + "\u202e" + "A" * 1_000_000
    told = {name: evil for name in ("modelspec.trigger_phrase", "ss_steps", "ss_learning_rate", "modelspec.date", "modelspec.license", "lorabooth.consent")}
    told |= {"ss_tag_frequency": "[" * 50_000, "training_info": '{"step": {}}', "ss_training_finished_at": "1e999", "lorabooth.made_of": "]"}
    of_mini(formats.diffusers(Path("runs/evil/lora.safetensors"), drawn_pairs()), **{name: text[: 3_000_000 // len(told)] for name, text in told.items()})
    for arguments in ((), ("info", "runs/evil"), ("info", "runs/evil", "--layers")):
        code, out, _ = loras(capsys, *arguments)
        assert code == 0 and max(map(len, out.splitlines())) < 700 and out.replace("\n", "").isprintable(), arguments
    assert info(capsys, Path("runs/evil"))["metadata"]["ss_training_finished_at"] == "1e999"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({DOWN: torch.full((2, 224), torch.nan), UP: torch.ones(224, 2)}, "numbers that are not finite"),
        ({DOWN: torch.zeros(0, 224), UP: torch.zeros(224, 0)}, "do not fit together"),
        ({DOWN: torch.ones(2, 3072), UP: torch.ones(3072, 2)}, "does not fit mini"),
        ({DOWN: torch.ones(()), UP: torch.ones(())}, "do not fit together"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2), "lora_x": torch.ones(1)}, "is a LoKr, not a LoRA"),
        ({"lora" + "x.lora_magnitude_vector" * 30_000: torch.ones(1)}, "lacks these layers"),
    ],
)
def test_what_cannot_be_used_is_described_as_far_as_it_goes(tensors: dict[str, torch.Tensor], words: str, capsys: pytest.CaptureFixture[str]):
    file = of_mini(formats.write(Path("runs/x/lora.safetensors"), tensors))
    told = info(capsys, file)
    assert words in told["problem"] and len(told["problem"]) < 500 and told["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    code, out, _ = loras(capsys, "info", file, "--layers")
    assert code == 0 and "not usable" in out and words in out
    assert loras(capsys)[0] == 0


def test_no_change_of_a_few_bytes_makes_a_traceback(capsys: pytest.CaptureFixture[str]):
    pairs = {name: both for name, both in drawn_pairs(rank=1).items() if name.startswith("transformer_blocks.0.attn")}
    good, rng = of_mini(formats.diffusers(Path("good.safetensors"), pairs)).read_bytes(), random.Random(1)
    length = 8 + int.from_bytes(good[:8], "little")
    for i in range(150):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(length)] = rng.choice(b'0123456789"[]{},:\x00\xff-.eE')
        folder = Path(f"runs/{i:03}")
        folder.mkdir(parents=True)
        (folder / "lora.safetensors").write_bytes(mutant)
    code, out, _ = loras(capsys)
    assert code == 0 and len(out.splitlines()) == 151
    assert loras(capsys, "info", *sorted(Path("runs").iterdir()))[0] in (0, 2)


def test_the_list_is_there_without_torch(tmp_path: Path):
    of_mini(formats.diffusers(Path("runs/TOK-photos/lora.safetensors"), drawn_pairs()))
    program = (
        "import sys\nfrom lorabooth.cli import main\nmain(['loras'])\nprint([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert "TOK-photos" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_a_table_fits_its_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines = tables.table(("NAME", "WORD", "N"), [("a" * 50, "b" * 90, "7"), ("c", "remark " * 30)], right=("N",)).splitlines()
    assert max(map(len, lines)) <= 60 and lines[0].endswith("N") and lines[1].endswith("7") and "…" in lines[1] and lines[2].endswith("…")


def test_parts_of_large_models_are_known():
    assert SHARD.search("model-00001-of-00003.safetensors") and not SHARD.search("fox-of-snow.safetensors")
