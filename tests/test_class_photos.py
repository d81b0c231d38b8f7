"""Photos of others beside those of the person (prior preservation)."""

import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from lorabooth.cli import main
from lorabooth.families import load_family
from lorabooth.runs import RunDir
from train import fit
from train.data import CLASS_PREFIX, Cache, class_items


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (96, 96), colour).save(folder / f"{i}.png")
    (folder / "2.txt").write_text("somebody in blue")
    return folder


@pytest.fixture(scope="module")
def trained(tiny_command: list[str], others: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("prior") / "run")
    assert main([*tiny_command, "--class-photos", str(others), "--prior-rate", "0.5", "--out", str(run.path)]) == 0
    return run


def test_a_share_of_the_batches_are_others_toward_their_own_pictures(trained: RunDir):
    trainer = fit.start(trained, trained.config, load_family("mini"), Accelerator(cpu=True))
    batches = [fit._batch(trainer, i)[0] for i in range(60)]
    kinds = [{photo.startswith(CLASS_PREFIX) for photo in batch.photos} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds), "a batch is of one kind"
    assert 18 <= sum(True in kind for kind in kinds) <= 42
    assert {photo for batch in batches for photo in batch.photos if photo.startswith(CLASS_PREFIX)} == {f"{CLASS_PREFIX}{i:05d}" for i in range(1, 5)}
    assert not any(batch.preserved for batch, kind in zip(batches, kinds, strict=True) if True in kind)


def test_their_captions_never_name_the_person_and_drop_to_nothing(trained: RunDir):
    family, cache = load_family("mini"), Cache(trained)
    encoders = family.text_encoders(torch.device("cpu"), torch.float32)
    expected = family.encode_prompts(encoders, ["a photo of a person", "somebody in blue", ""]).embeds
    found = cache.conditioning([f"{CLASS_PREFIX}00001", f"{CLASS_PREFIX}00003"]).embeds
    torch.testing.assert_close(found, expected[:2], rtol=1e-4, atol=1e-5)
    items = class_items(trained, trained.config)
    dropped = cache.batch(items[:1], trained.config.model_copy(update={"caption_dropout_rate": 1.0}), random.Random(0))
    torch.testing.assert_close(dropped.conditioning.embeds[0], expected[2], rtol=1e-4, atol=1e-5)


def test_the_same_command_goes_on_and_other_others_are_refused(
    trained: RunDir, tiny_command: list[str], others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = [*tiny_command, "--prior-rate", "0.5", "--out", str(trained.path)]
    assert main([*command, "--class-photos", str(others)]) == 0
    Image.new("RGB", (96, 96), "black").save(tmp_path / "9.png")
    assert main([*command, "--class-photos", str(tmp_path)]) == 2
    assert "was started from" in capsys.readouterr().err


def test_giving_them_is_enough_and_a_rate_without_them_is_refused(tiny_command: list[str], others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(tmp_path / "run")
    assert main([*tiny_command, "--class-photos", str(others), "--out", str(run.path)]) == 0
    assert run.config.prior_rate == 0.2 and run.lora.exists()
    assert main([*tiny_command, "--prior-rate", "0.3", "--out", str(tmp_path / "without")]) == 2
    assert "no photos of others to train on" in capsys.readouterr().err and not (tmp_path / "without").exists()
