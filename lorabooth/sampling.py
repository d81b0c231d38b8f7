"""From noise to pictures: the one sampling loop, used by previews in training and by the generator."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from lorabooth import flow
from lorabooth.families.flux1 import VAE_SCALE, Conditioning, Flux1

Progress = Callable[[int, Callable[[], Tensor]], None]
"""Called after each step: steps done, and what gives the latents [B, 16, h, w] of the pictures that are expected so far, which few look at."""


@dataclass(frozen=True)
class Known:
    """A picture to start from, as latents [B, 16, h, w], and the share of the steps that are done on it, 0 to 1.

    mask: [B, 1, h, w] in 0..1; where it is 0 the picture stays.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None


@dataclass(frozen=True)
class Negative:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) by `scale` away from a prompt."""

    conditioning: Conditioning
    scale: float


def noise(seed: int, width_px: int, height_px: int) -> Tensor:
    """Start noise [1, 16, h, w] of a picture; drawn on the CPU in fp32, so that a seed means the same on every device."""
    shape = (1, 16, height_px // VAE_SCALE, width_px // VAE_SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_done(steps: int, strength: float) -> int:
    """How many of the last steps a picture to start from goes through: as many as in diffusers' image-to-image pipelines."""
    return min(steps, math.ceil(steps * strength))


@torch.no_grad()
def denoise(
    family: Flux1,
    transformer: FluxTransformer2DModel,
    conditioning: Conditioning,
    start: Tensor,
    steps: int,
    guidance: float | Tensor,
    progress: Progress | None = None,
    negative: Negative | None = None,
    known: Known | None = None,
) -> Tensor:
    """Noise [B, 16, h, w] -> latents of the same shape, by Euler steps along the predicted velocity. guidance: one, or [B]."""
    height, width = start.shape[2:]
    parameter = next(transformer.parameters())
    device, dtype = parameter.device, parameter.dtype
    drawn = flow.pack(start).to(device, torch.float32)
    ids = flow.image_ids(height, width, device=device, dtype=dtype)
    conditioning = conditioning.to(device, dtype)
    guidance = guidance.to(device) if isinstance(guidance, Tensor) else guidance
    away = negative.conditioning.to(device, dtype) if negative else None
    sigmas = family.sigmas(steps, drawn.shape[1]).tolist()
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()  # what the picture before left in it
    x = drawn.to(dtype)
    if known:
        sigmas = sigmas[steps - steps_done(steps, known.strength) :]
        picture = flow.pack(known.latents).to(device, torch.float32)
        changes = flow.pack(known.mask.expand(-1, start.shape[1], -1, -1)).to(device) if known.mask is not None else None
        x = torch.lerp(picture, drawn, sigmas[0]).to(dtype)
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        level = torch.full((len(x),), sigma, device=device)
        with transformer.cache_context("cond"):
            predicted = family.velocity(transformer, x, level, guidance, conditioning, ids).float()
        if negative and away:
            with transformer.cache_context("uncond"):
                other = family.velocity(transformer, x, level, guidance, away, ids).float()
            predicted = other + negative.scale * (predicted - other)
        # The step is taken in fp32: in bf16 the small last steps would be rounded away.
        moved = flow.euler_step(x.float(), predicted, sigma, next_sigma)
        if known and changes is not None:
            moved = torch.lerp(torch.lerp(picture, drawn, next_sigma), moved, changes)
        if progress:
            progress(i + 1, partial(_expected, x, predicted, sigma, height, width))
        x = moved.to(dtype)
    return flow.unpack(x, height, width)


def _expected(x: Tensor, predicted: Tensor, sigma: float, height: int, width: int) -> Tensor:
    """The latents without noise, as a step's velocity points to them."""
    return flow.unpack(x.float() - sigma * predicted, height, width)


@torch.no_grad()
def decode(family: Flux1, vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents [B, 16, h, w] -> RGB pictures."""
    pixels = family.decode_pictures(vae, latents).float().div(2).add(0.5).clamp(0, 1)
    return [Image.fromarray(p) for p in pixels.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
