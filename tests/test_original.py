"""diffusers' own script as an arm of the benchmarks: what it is given, and what is read of it. The script itself wants torchvision, which tests do without."""

import json
import sys
from pathlib import Path

import pytest
from click import ClickException
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from lorabooth.families import load_family
from lorabooth.lora import LoraSpec
from scripts import bench_likeness, original
from scripts.peer import Encoding, Peer, read_photos

SETTINGS = {"lora_rank": 4, "targets": "attention+ff", "batch_size": 2, "learning_rate": 0.002}

# As the script does: checkpoints with a LoRA in each, the settings and the losses in TensorBoard files of their own.
STAND_IN = """
import json, sys
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter
from scripts.peer import Peer
from lorabooth.families import load_family

words = sys.argv[1:]
asked = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
photos, out = Path(asked["dataset_name"]), Path(asked["output_dir"])
rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
assert {row["file_name"] for row in rows} == {file.name for file in photos.iterdir()} - {"metadata.jsonl"}
if asked["learning_rate"] == "0.5":
    sys.exit("too high a rate")
SummaryWriter(out / "logs" / "dreambooth" / "1").add_text("settings", "none")
log = SummaryWriter(out / "logs" / "dreambooth")
peer = Peer(load_family("mini"), {"lora_rank": int(asked["rank"]), "targets": "attention", "learning_rate": 1e-3}, None)
for step in range(1, int(asked["max_train_steps"]) + 1):
    log.add_scalar("loss", 1 / step, step)
    if step % int(asked["checkpointing_steps"]) == 0:
        peer.save(out / f"checkpoint-{step}")
log.close()
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return bench_likeness.write_photos("di", tmp_path / "photos")


def test_it_is_given_the_same_lora_rate_and_batch(photos: Path, tmp_path: Path):
    words = original.command(Path("script.py"), photos, tmp_path / "out", SETTINGS, steps=6, seed=3)
    assert words[:2] == [sys.executable, "script.py"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    wanted = {"rank": "4", "lora_alpha": "4", "train_batch_size": "2", "learning_rate": "0.002", "max_train_steps": "6", "seed": "3", "resolution": "128"}
    assert {name: options[f"--{name}"] for name in wanted} == wanted
    layers = options["--lora_layers"].split(",")
    assert layers == LoraSpec(4, 4, "attention+ff").module_names(load_family("mini").empty_transformer())
    assert "proj_out" not in layers, "by that name PEFT would take the last linear of the transformer, too"


def test_photos_and_captions_are_a_folder_of_pictures_with_their_captions_in_one_file(photos: Path, tmp_path: Path):
    folder = original.dataset(photos, tmp_path / "dataset")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(file.name for file in folder.iterdir()) == [*(row["file_name"] for row in rows), "metadata.jsonl"] and len(rows) == 12
    assert all("TOK" in row["text"] and "[trigger]" not in row["text"] for row in rows)


def test_losses_are_read_from_whichever_file_has_them(tmp_path: Path):
    with SummaryWriter(tmp_path / "logs" / "a") as settings, SummaryWriter(tmp_path / "logs" / "b") as steps:
        settings.add_text("settings", "none")
        for step in (1, 2, 3):
            steps.add_scalar("loss", step / 2, step)
    assert [event.value for event in original.losses(tmp_path)] == [0.5, 1.0, 1.5]
    with pytest.raises(FileNotFoundError, match="logged no loss"):
        original.losses(tmp_path / "elsewhere")


def test_its_lora_of_each_mark_is_measured_and_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    recipe = bench_likeness.mini_recipe(None, {"lora_rank": 2})
    rows = [(mark, lora, seconds) for mark, seconds, lora in bench_likeness.original_arm(script)("di", 0, [4, 6], tmp_path, recipe)]
    assert [mark for mark, _, _ in rows] == [4, 6] and all(lora.parent.name == f"checkpoint-{mark}" for mark, lora, _ in rows)
    assert all(2 in tensor.shape for _, lora, _ in rows for tensor in load_file(lora).values()) and 0 < rows[0][2] <= rows[1][2]
    with pytest.raises(ClickException, match="too high a rate"):
        next(bench_likeness.original_arm(script)("di", 0, [4], tmp_path / "again", recipe.model_copy(update={"learning_rate": 0.5})))


def test_a_seed_decides_the_noise_and_the_start_of_the_restated_script(photos: Path):
    def loss(seed: int) -> float:
        family = load_family("mini")
        encoding = Encoding(family, *read_photos(photos, family.native_px), 2, seed=0)
        return Peer(family, SETTINGS, encoding.batch, seed=seed).step()

    assert loss(1) == loss(1) != loss(2)
