"""The GPU check: its arithmetic against published figures, and the whole of it on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL

from scripts import gpu_check, random_flux


@pytest.mark.parametrize(("px", "gemm", "attention", "step"), [(512, 19.9, 1.7, 44.8), (768, 36.4, 5.6, 89.7), (1024, 59.5, 14.9, 164.1)])
def test_operations_of_flux_dev(px: int, gemm: float, attention: float, step: float):
    assert random_flux.DEV.tflop(px) == pytest.approx((gemm, attention), rel=0.03)
    assert random_flux.DEV.step_tflop(px) == pytest.approx(step, rel=0.01)


def test_the_autoencoder_has_the_size_of_flux_dev():
    with init_empty_weights():
        vae = AutoencoderKL.from_config(random_flux.DEV.vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


def test_random_weights_are_neither_zero_nor_missing(tmp_path: Path):
    family = random_flux.write_model(tmp_path, random_flux.TINY)
    for module in (family.transformer(torch.device("cpu"), torch.float32), family.vae(torch.device("cpu"), torch.float32)):
        assert all(p.isfinite().all() and (p.ndim < 2 or 0.01 < p.std() < 0.03) for p in module.parameters())
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())


def test_a_tiny_model_goes_through_training_and_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results" / "gpu.json"
    assert gpu_check.main(["all", "--tiny", "--steps", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [(r["what"], r["px"]) for r in record["rows"]] == [("train", 64), ("train", 128), ("generate", 128)]
    assert all(r["seconds"] > 0 and r["mfu"] > 0 for r in record["rows"])
    assert all(r["p10_seconds"] <= r["seconds"] <= r["p90_seconds"] for r in record["rows"][:2])
    assert record["gpu"] is None and record["gemm_tflop_per_second"] > 0 and record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert printed.count("\n| one ") == 3 and "on the CPU" in printed


def test_only_what_is_asked_for_is_timed(tmp_path: Path):
    for what in ("train", "generate"):
        assert gpu_check.main([what, "--tiny", "--steps", "2", "--gradient-checkpointing", "--out", str(tmp_path / what)]) == 0
        assert {r["what"] for r in json.loads((tmp_path / what).read_text())["rows"]} == {what}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: torch finds no CUDA GPU") and said.count("\n") == 1


def test_one_step_is_too_few(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main(["--tiny", "--steps", "1"]) == 2
    assert "it must be 2 or more" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_model_of_the_true_size_trains_and_generates(tmp_path: Path):
    assert gpu_check.main(["all", "--steps", "2", "--out", str(tmp_path / "gpu.json")]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert all(0 < r["mfu"] < 1.1 and r["peak_allocated_gb"] > 20 for r in record["rows"])
