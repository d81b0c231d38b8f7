"""Preview pictures of a run, by the generator's own sampling code."""

from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorabooth import sampling
from lorabooth.device import base_dtype
from lorabooth.errors import unless_out_of_memory
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX
from lorabooth.runs import RunDir, durable_file
from train.encode import preview_stem
from train.trackers import log_pictures
from train.trainer import Trainer, averaged

PREVIEW_STEPS = 20
PREVIEW_GUIDANCE = 3.5


@torch.no_grad()
def preview(trainer: Trainer) -> None:
    """Pictures of the preview prompts with the averaged weights, by the generator's own sampling code."""
    config, family, run_dir = trainer.config, trainer.family, trainer.run
    px = min(max(config.resolutions_px), family.native_px) // BUCKET_MULTIPLE_PX * BUCKET_MULTIPLE_PX
    latents = []
    with averaged(trainer):
        for i in range(len(config.preview_prompts)):
            cached = trainer.cache.conditioning([preview_stem(i)])
            start = sampling.noise(config.preview_seed, px, px)
            sigmas = family.sigmas(PREVIEW_STEPS, start[0, 0].numel() // 4)[:-1]
            with trainer.modulation.sampling(sigmas, PREVIEW_GUIDANCE, cached.pooled) if trainer.modulation else nullcontext():
                latents.append(sampling.denoise(family, trainer.transformer, trainer.conditioned(cached), start, PREVIEW_STEPS, PREVIEW_GUIDANCE))
    if not trainer.accelerator.is_main_process:  # it was here to put a divided base together
        return
    run_dir.samples.mkdir(exist_ok=True)
    pictures = _decoded(trainer, torch.cat(latents))
    log_pictures(trainer.accelerator, trainer.state.step, {f"preview {i}": picture for i, picture in enumerate(pictures)})
    for picture, path in zip(pictures, picture_files(run_dir, trainer.state.step), strict=True):
        with durable_file(path) as file:
            picture.save(file, "PNG")


def picture_files(run_dir: RunDir, step: int) -> list[Path]:
    """Where the pictures after a step are, one for each preview prompt."""
    return [run_dir.samples / f"step-{step:06d}-{i}.png" for i in range(len(run_dir.config.preview_prompts))]


def _decoded(trainer: Trainer, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents [B, 16, h, w]; made on the CPU where the training has left the GPU no room for them."""
    device = trainer.accelerator.device
    with unless_out_of_memory():
        vae = trainer.family.vae(device, base_dtype(device))
        return [sampling.decode(trainer.family, vae, row[None])[0] for row in latents]
    vae = trainer.family.vae(torch.device("cpu"), torch.float32)
    return [sampling.decode(trainer.family, vae, row[None])[0] for row in latents]
