"""The GPU check: its arithmetic against published figures, and the whole of it on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL

from lorabooth.runs import RunDir
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


def test_a_tiny_model_goes_through_training_and_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "WARM_UP_STEPS", 1)
    out = tmp_path / "results" / "gpu.json"
    assert gpu_check.main(["all", "--tiny", "--steps", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    trained = [r for r in record["rows"] if r["what"] == "train"]
    names = [f"{px} px, batch {batch}{kind}" for kind in ("", ", not compiled") for batch in (1, 4) for px in (64, 128)]
    assert {r["name"] for r in trained if r["part"] == "table"} == {*names, "64 px, batch 1, adamw", "upright, 128 px, batch 1"}
    assert [r["part"] for r in trained][:6] == ["table", "plans", "cards"] * 2, "whatever time there is, some of each"
    assert len({r["plan"] for r in trained if r["part"] == "plans"}) == len(gpu_check.PLANS)
    assert [r["card_gib"] for r in trained if r["part"] == "cards"] == [24, 12, 16, 8] * 2
    assert all(r["seconds_a_picture"] > 0 for r in record["generating"]["pictures"]) and len(record["generating"]["swaps"]) == 3
    assert all(r["seconds"] > 0 and r["mfu"] > 0 for r in record["rows"])
    assert all(r["p10_seconds"] <= r["seconds"] <= r["p90_seconds"] and min(r["estimate_gb"], r["seconds_in_a_row"]) > 0 for r in trained)
    assert record["gpu"] is None and record["gemm_tflop_per_second"] > 0 and record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert printed.count("px, ") == 26 and "FluxPipeline, load_lora_weights" in printed and "on the CPU" in printed


def test_only_what_is_asked_for_is_timed_and_nothing_after_the_last_minute(tmp_path: Path):
    assert gpu_check.main(["table", "--tiny", "--steps", "2", "--minutes", "0", "--out", str(tmp_path / "gpu.json")]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert "generating" not in record and record["rows"] == []
    assert len(record["left_out"]) == 10 and all(name.startswith("table: ") for name in record["left_out"])


def test_no_picture_is_begun_after_the_last_minute(tmp_path: Path):
    assert gpu_check.main(["generate", "--tiny", "--steps", "2", "--minutes", "0", "--out", str(tmp_path / "gpu.json")]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())["generating"]
    assert record["left_out"] == ["FluxPipeline", "merged", "beside the weights"] and not record["swaps"]


def test_a_case_that_fails_is_a_row_that_says_so_and_what_was_timed_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, timed = tmp_path / "gpu.json", gpu_check.step_times
    seen = []

    def failing(run: RunDir, *others: Any) -> Any:
        seen.append(json.loads(out.read_text())["rows"])
        if len(seen) > 1:
            raise RuntimeError("no kernel image is available")
        return timed(run, *others)

    monkeypatch.setattr(gpu_check, "step_times", failing)
    monkeypatch.setattr(gpu_check, "cases", lambda part, _: [gpu_check.Case(part, 64), gpu_check.Case(part, 64)])
    assert gpu_check.main(["plans", "--tiny", "--steps", "2", "--out", str(out)]) == 0
    first, second = json.loads(out.read_text())["rows"]
    assert seen == [[], [first]] and first["seconds"] > 0
    assert second["failed"] == "RuntimeError: no kernel image is available" and "seconds" not in second

    def dead(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_check, "step_times", timed)
    monkeypatch.setattr(gpu_check, "forget", dead)
    assert gpu_check.main(["all", "--tiny", "--steps", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["failed"] for row in record["rows"]] == ["RuntimeError: an illegal memory access was encountered"]
    assert len(record["left_out"]) == 5 and "generating" not in record, "nothing more is asked of such a GPU"


def test_a_card_that_is_too_small_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family = random_flux.write_model(tmp_path / "model", random_flux.TINY)
    case = gpu_check.Case("cards", 64, card_gib=1)
    row = gpu_check.time_case(case, tmp_path / "run", family, random_flux.TINY, Accelerator(cpu=True), 2, 1.0)
    assert "GB of GPU memory" in row["refused"] and "seconds" not in row
    monkeypatch.setattr(gpu_check.fit, "train_step", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    case = gpu_check.Case("table", 64)
    row = gpu_check.time_case(case, tmp_path / "other", family, random_flux.TINY, Accelerator(cpu=True), 2, 1.0)
    assert row["out_of_memory"] and "seconds" not in row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: torch finds no CUDA GPU") and said.count("\n") == 1


def test_one_step_is_too_few(capsys: pytest.CaptureFixture[str]):
    assert gpu_check.main(["--tiny", "--steps", "1"]) == 2
    assert "it must be 2 or more" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_model_of_the_true_size_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "cases", lambda part, _: [gpu_check.Case(part, 512), gpu_check.Case(part, 512, card_gib=12)])
    assert gpu_check.main(["table", "--steps", "2", "--out", str(tmp_path / "gpu.json")]) == 0
    whole, card = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert 0 < whole["mfu"] < 1.1 and whole["peak_allocated_gb"] > 20
    assert card["seconds"] > 0 and card["peak_reserved_gb"] < 12 * 2**30 / 1e9
