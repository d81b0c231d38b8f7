"""From noise to pictures: the one sampling loop, used by previews in training and by the generator."""

from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from lorabooth import flow
from lorabooth.families.flux1 import VAE_SCALE, Conditioning, Flux1

Progress = Callable[[int], None]
"""Called after each denoising step with the number of steps done."""


def noise(seed: int, width_px: int, height_px: int) -> Tensor:
    """Start noise [1, 16, h, w] of a picture; drawn on the CPU in fp32, so that a seed means the same on every device."""
    shape = (1, 16, height_px // VAE_SCALE, width_px // VAE_SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(
    family: Flux1,
    transformer: FluxTransformer2DModel,
    conditioning: Conditioning,
    start: Tensor,
    steps: int,
    guidance: float,
    progress: Progress | None = None,
) -> Tensor:
    """Noise [B, 16, h, w] -> latents of the same shape, by Euler steps along the predicted velocity."""
    height, width = start.shape[2:]
    parameter = next(transformer.parameters())
    x = flow.pack(start).to(parameter.device, parameter.dtype)
    ids = flow.image_ids(height, width, device=x.device, dtype=x.dtype)
    conditioning = conditioning.to(x.device, x.dtype)
    sigmas = family.sigmas(steps, x.shape[1])
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        predicted = family.velocity(transformer, x, torch.full((len(x),), sigma, device=x.device), guidance, conditioning, ids)
        # The step is taken in fp32: in bf16 the small last steps would be rounded away.
        x = flow.euler_step(x.float(), predicted.float(), sigma, next_sigma).to(x.dtype)
        if progress:
            progress(i + 1)
    return flow.unpack(x, height, width)


@torch.no_grad()
def decode(family: Flux1, vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """Latents [B, 16, h, w] -> RGB pictures."""
    pixels = family.decode_pictures(vae, latents).float().div(2).add(0.5).clamp(0, 1)
    return [Image.fromarray(p) for p in pixels.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
