"""Training beside diffusers' script: what does not depend on the machine."""

import json
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from lorabooth.families import load_family
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import additions
from lorabooth.mini.people import DEMO_ZIP
from scripts import bench_train, gpu_train, peer


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return recorded(tmp_path_factory.mktemp("bench"), job_steps=0)


def recorded(folder: Path, job_steps: int) -> dict:
    out = folder / "results" / "train.json"
    done = CliRunner().invoke(bench_train.bench, ["--steps", "2", "--not-compiled", "--job-steps", str(job_steps), "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


def test_a_step_launches_less_than_half_of_the_scripts_operators_and_keeps_no_more(record: dict):
    for base in record["bases"].values():
        assert 0.25 < base["operator_ratio"] < 0.4 and 0.3 < base["kept_ratio"] < 1  # on a GPU less is kept: tests/test_lean.py
        assert all(row["operators"] > 500 and 0 < row["p10_seconds"] <= row["median_seconds"] <= row["p90_seconds"] for row in base["arms"].values())


def test_every_arm_is_on_record_with_the_machine(record: dict):
    assert record["machine"]["versions"]["torch"]
    assert {name: list(base["arms"]) for name, base in record["bases"].items()} == {
        "57 blocks, 16 wide": ["lorabooth", "script, encoded ahead"], "mini": ["lorabooth", "script as it is", "script, encoded ahead"],
    }  # fmt: skip
    assert all(base["optimizer"] == "adamw" and base["lora_rank"] == 16 and base["strongest"].startswith("script") for base in record["bases"].values())
    told = bench_train.table(record)
    assert told.count("| lorabooth |") == 2 and told.count("script as it is") == 1


@pytest.mark.slow  # two processes that import everything
def test_the_job_of_each_is_on_record(tmp_path: Path):
    record = recorded(tmp_path, job_steps=2)
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in record["job"]["seconds"].values())
    [losses] = [value for name, value in record["job"].items() if name.startswith("loss_of_the_last")]
    assert all(len(found) == 1 and 0.1 < found[0] < 5 for found in losses.values()) and set(losses) == set(record["job"]["seconds"])
    told = bench_train.table(record)
    assert told.count("| lorabooth |") == 3 and told.count("script as it is") == 2


def test_the_peer_learns_and_writes_what_we_read(tmp_path: Path):
    with zipfile.ZipFile(DEMO_ZIP) as archive:
        archive.extractall(tmp_path / "photos")
    done = CliRunner().invoke(peer.main, [str(tmp_path / "photos"), str(tmp_path / "out"), "--steps", "6"])
    assert done.exit_code == 0, done.output
    file = LoraFile.read(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    family = load_family("mini")
    found = additions(file, Layout(sizes_of(family.empty_transformer())), ClipLayout(sizes_of(family.empty_clip())), "mini")
    assert len(found.transformer) == 44 and not found.left_out and all(one.up.abs().sum() > 0 for one in found.transformer.values())


def test_the_arms_for_a_gpu_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    every = gpu_train.makers
    monkeypatch.setattr(gpu_train, "makers", lambda *a: {name: make for name, make in every(*a).items() if "compiled" not in name})
    out = tmp_path / "results" / "gpu_train.json"
    done = CliRunner().invoke(gpu_train.bench, ["--tiny", "--steps", "2", "--px", "64", "--batch-size", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    [case] = json.loads(out.read_text())["cases"]
    assert list(case["arms"]) == ["lorabooth", "script as it is", "script, encoded ahead"] and case["batch"] == 2
    assert all(0 < row["p10_seconds"] <= row["median_seconds"] <= row["p90_seconds"] for row in case["arms"].values())
    assert done.output.count("| 64 px, batch 2 |") == 3


def test_an_arm_may_want_another_precision_of_accelerate_than_the_one_before_it():
    def arm(precision: str) -> bench_train.Arm:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        return bench_train.Arm(precision, lambda: accelerator.mixed_precision, torch.nn.Identity())

    try:
        rows = [gpu_train.timed(partial(arm, precision), 2, torch.device("cpu")) for precision in ("no", "bf16", "no")]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all("median_seconds" in row for row in rows), rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would start")
def test_without_a_gpu_the_true_size_is_refused_in_a_sentence():
    done = CliRunner().invoke(gpu_train.bench, [])
    assert done.exit_code == 2 and "torch finds no CUDA GPU" in done.output
