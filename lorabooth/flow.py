"""Rectified flow as FLUX uses it: packing, position ids, noise levels, the velocity target. Pure torch, no model.

`sigma` is the noise level in [0, 1]: x_sigma = (1 - sigma) * x_0 + sigma * noise (Liu et al. 2022, arXiv 2209.03003;
Esser et al. 2024, arXiv 2403.03206, section 3). The velocity dx/dsigma = noise - x_0 is what the model predicts.
"""

import math

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] -> image tokens [B, (H/2)(W/2), 4C], one token a 2 x 2 patch."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Image tokens [B, N, 4C] -> latents [B, C, height, width]; height and width in latent cells, not in px."""
    b, _, c4 = tokens.shape
    return tokens.view(b, height // 2, width // 2, c4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c4 // 4, height, width)


def image_ids(height: int, width: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Position ids [(height/2)(width/2), 3] of the image tokens: (0, row, column); height and width in latent cells."""
    rows, columns = height // 2, width // 2
    ids = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None, :]
    return ids.reshape(rows * columns, 3)


def text_ids(length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Position ids [length, 3] of the text tokens: all zero, as in FLUX.1."""
    return torch.zeros(length, 3, device=device, dtype=dtype)


def logit_normal(count: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels [count] = sigmoid(N(mean, std)), the density of Esser et al. 2024, section 3.1 (rf/lognorm)."""
    return torch.sigmoid(torch.randn(count, generator=generator) * std + mean)


def sample_sigma(kind: str, count: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise levels [count] for training on pictures of `tokens` image tokens.

    kind: "logit-normal"; "uniform"; "shifted", logit-normal moved by the shift that sampling uses at that size.
    """
    if kind == "uniform":
        return torch.rand(count, generator=generator)
    sigma = logit_normal(count, generator=generator)
    return shift(sigma, resolution_mu(tokens)) if kind == "shifted" else sigma


def loss_weight(kind: str, sigma: Tensor) -> Tensor:
    """Weight [B] of each noise level in the loss; "sigma_sqrt" and "cosmap" as in Esser et al. 2024, section 3.1, and diffusers."""
    if kind == "sigma_sqrt":
        return sigma**-2.0
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def add_noise(x_0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point on the straight path at `sigma` [B]; x_0 and noise [B, ...]."""
    sigma = sigma.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - sigma) * x_0 + sigma * noise


def velocity(x_0: Tensor, noise: Tensor) -> Tensor:
    """The target: dx/dsigma of the straight path."""
    return noise - x_0


def shift(sigma: Tensor, mu: float) -> Tensor:
    """Move noise levels toward 1 by exp(mu), as FLUX does for more image tokens (Esser et al. 2024, eq. 23)."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def resolution_mu(tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """The shift for a number of image tokens: linear between two points (black-forest-labs/flux, sampling.py)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def schedule(steps: int, mu: float) -> Tensor:
    """Noise levels [steps + 1] from 1 down to 0 for sampling: uniform, then shifted by `mu`."""
    sigmas = shift(torch.linspace(1, 1 / steps, steps), mu)
    return torch.cat([sigmas, torch.zeros(1)])


def euler_step(x: Tensor, predicted_velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step along the predicted velocity."""
    return x + (next_sigma - sigma) * predicted_velocity
