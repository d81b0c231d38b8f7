"""Serving plans: the choice for each card, from sizes that are counted without weights."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel

from infer import engine as engine_module
from infer.engine import plans
from infer.plan import candidates, choose
from infer.settings import Settings
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.sizes import GB
from lorabooth.speed import RTX_4090, assumed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vram_gb", "plan"),
    [
        (141, "base bf16, LoRAs merged, the untouched weights on the GPU, text encoders on the GPU"),
        (80, "base bf16, LoRAs merged, the untouched weights on the GPU, text encoders on the GPU"),
        (48, "base bf16, LoRAs merged, the untouched weights in host memory, text encoders on the GPU"),
    ],
)
def test_a_large_card_has_everything_on_it(vram_gb: int, plan: str):
    assert str(choose(true_needs(), RTX_4090, vram_gb * 0.97 * GB, 100 * GB)[0].plan) == plan


@pytest.mark.parametrize("vram_gb", [24, 16, 12, 8])
def test_each_smaller_card_has_a_plan_that_keeps_to_it(vram_gb: int):
    estimates = choose(true_needs(), assumed(vram_gb * GB), vram_gb * 0.95 * GB, 48 * GB)
    assert all(one.bytes <= vram_gb * 0.95 * GB for one in estimates)
    assert estimates[0].plan.precision != "nf4", "exactness that shows is lost last"
    assert all(a.bytes > b.bytes for a, b in pairwise(estimates))


def test_what_cannot_fit_is_refused_before_anything_loads():
    with pytest.raises(UserError, match=r"generating needs at least \d\.\d GB of GPU memory \(3\.0 GB are free\)\n") as caught:
        choose(true_needs(), RTX_4090, 3 * GB, 48 * GB)
    assert "--megapixels 0.25" in caught.value.hint and "nvidia-smi" in caught.value.hint
    with pytest.raises(UserError, match=r"needs at least [\d.]+ GB of host memory \(1\.0 GB are free\) or [\d.]+ GB of GPU memory \(6\.0 GB are free\)\n"):
        choose(true_needs(), RTX_4090, 6 * GB, 1 * GB)
    assert not any(plan.loras == "merged" for plan in candidates(true_needs(mixed=True)))
    with pytest.raises(UserError, match="blocks stored as nf4 stay on the GPU"):
        plans(load_family("mini"), Settings(precision="nf4", swapped=2), CPU)


def true_needs(mixed: bool = False) -> engine_module.Needs:
    """FLUX.1-dev at 1024 px."""
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    return engine_module.Needs(engine_module.BaseSizes.count(transformer, 512), 4096, 4.9e9 * 2, 84e6 * 2, 1, mixed)


def test_needs_are_counted_from_configs(tmp_path: Path):
    needs = engine_module.needs_of(load_family("mini"), Settings(), 4)
    encoders = load_family("mini").text_encoders(CPU, torch.float32)
    assert needs.encoder_bytes == sum(4 * p.numel() for part in (encoders.text_encoder, encoders.text_encoder_2) for p in part.parameters())
    assert needs.vae_bytes == sum(4 * p.numel() for p in load_family("mini").vae(CPU, torch.float32).parameters()) and needs.tokens == 64
