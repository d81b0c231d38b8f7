"""The plans' arithmetic against bytes counted over whole training steps and passes at FLUX.1-dev's width (scripts/count_memory.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from infer import plan as serving
from lorabooth import flow, quantized
from lorabooth.sizes import BaseSizes, blocks_of
from scripts import count_memory
from scripts.bench_train import SETTINGS
from scripts.count_memory import META, Weightless, counting, our_step, peak, script_step
from scripts.random_flux import DEV, TINY, random_conditioning, write_model
from train.plan import MemoryPlan

SHALLOW = replace(DEV, transformer=DEV.transformer | {"num_layers": 2, "num_single_layers": 4})
ONE = SETTINGS | {"batch_size": 1}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Weightless:
    return Weightless(write_model(tmp_path_factory.mktemp("shallow"), SHALLOW).model)


def test_what_lives_together_is_counted_once_and_no_longer_than_it_lives():
    with counting() as counted:
        kept = torch.empty(1000, device=META)
        view = kept[:10] * 1
        more = kept + 1
        assert (counted.now, counted.peak) == (8040, 8040)
        del more, view
        assert (counted.now, counted.peak) == (4000, 8040)
        kept.add_(1)
        assert counted.peak == 8040


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, MemoryPlan("bf16", 0, 0, False)),
        ({"batch_size": 4}, MemoryPlan("bf16", 3, 0, False)),
        ({}, MemoryPlan("bf16", 6, 0, False)),
        ({"targets": "all-linear"}, MemoryPlan("bf16", 0, 0, False)),
        ({"targets": "attention", "optimizer": "adagrad"}, MemoryPlan("bf16", 0, 0, False)),
        ({"batch_size": 4, "preservation_rate": 0.25}, MemoryPlan("bf16", 0, 0, False)),
        ({}, MemoryPlan("int8", 6, 0, False)),
    ],
)  # fmt: skip
def test_a_plan_expects_what_a_step_takes(family: Weightless, tmp_path: Path, changes: dict[str, Any], plan: MemoryPlan):
    make, planned = our_step(family, SHALLOW, tmp_path / "run", 1024, ONE | changes | {"precision": plan.precision}, plan)
    assert 0.99 < planned / peak(make) < 1.12


def test_a_plan_expects_the_copies_of_fp8_products(family: Weightless, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized, "multiplies_fp8", lambda _: True)
    for recomputed in (0, 6):
        settings, plan = ONE | {"batch_size": 4, "precision": "fp8"}, MemoryPlan("fp8", recomputed, 0, False)
        make, planned = our_step(family, SHALLOW, tmp_path / f"run{recomputed}", 1024, settings, plan)
        assert 0.99 < planned / peak(make) < 1.12


def test_a_plan_expects_what_the_modulation_makes_ahead(family: Weightless, tmp_path: Path):
    plans = [MemoryPlan("bf16", 6, 0, ahead) for ahead in (False, True)]
    made = [our_step(family, SHALLOW, tmp_path / str(i), 512, ONE | {"batch_size": 4}, plan) for i, plan in enumerate(plans)]
    here, ahead = (peak(make) for make, _ in made)
    linears = 2 * BaseSizes.count(family.empty_transformer(), SHALLOW.text_tokens).modulation  # which are in host memory
    assert made[1][1] - made[0][1] + linears == pytest.approx(ahead - here, rel=0.05)


def test_a_step_takes_less_than_the_scripts(family: Weightless, tmp_path: Path):
    make, _ = our_step(family, SHALLOW, tmp_path / "run", 1024, ONE, MemoryPlan("bf16", 0, 0, False))
    assert peak(make) < 0.9 * peak(script_step(family, SHALLOW, 1024, ONE, recompute=False))


def test_the_table_has_every_setting(tmp_path: Path):
    found = count_memory.rows(Weightless(write_model(tmp_path / "model", TINY).model), TINY, tmp_path, [64], [1])
    assert len(count_memory.table({"rows": found}).splitlines()) == 2 + len(found) == 8
    assert [("script" in row) for row in found] == [True, False, True, False, False, False]


# What generating takes (infer/plan.py)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_serving_plan_expects_what_a_pass_takes(family: Weightless, precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized, "multiplies_fp8", lambda _: True)
    one, tokens = random_conditioning(SHALLOW, torch.bfloat16), 512 + 64**2
    with counting() as counted, torch.no_grad():
        transformer = family.transformer(META, torch.bfloat16)
        quantized.put_blocks(list(blocks_of(transformer)), precision, 0, META)
        x, ids = torch.empty(1, 64**2, 64, device=META, dtype=torch.bfloat16), flow.image_ids(128, 128, device=META, dtype=torch.bfloat16)
        counted.peak = before = counted.now
        family.velocity(transformer, x, torch.empty(1, device=META), 3.5, one.to(META, torch.bfloat16), ids)
    expected = serving.WORKSPACE + (serving.FP8_WORKSPACE if precision == "fp8" else 0)
    assert 1 < expected * tokens * 2 * 3072 / (counted.peak - before) < 1.25


@pytest.mark.parametrize("px", [512, 1440])
def test_a_serving_plan_expects_what_decoding_takes_and_room_for_convolutions(family: Weightless, px: int):
    with counting() as counted, torch.no_grad():
        with META:
            vae = AutoencoderKL.from_config(family.config("vae")).bfloat16()
        counted.peak = before = counted.now
        vae.decode(torch.empty(1, 16, px // 8, px // 8, device=META, dtype=torch.bfloat16))
    assert 1.5 < serving.DECODE_BYTES_PX * px**2 / (counted.peak - before) < 2
