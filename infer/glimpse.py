"""A glimpse of a picture while it is being made: a linear map from latents to colours, one pixel for each latent cell.

The map is fitted to the VAE at hand, so it holds for every base model: smooth coloured pictures go through the encoder, and
the least squares of their mean colours over the latents are the map. It costs a moment once, and nothing for each glimpse.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from lorabooth.families.flux1 import VAE_SCALE, Flux1

PICTURES, SIDE_PX, PATCHES = 48, 64, 4


class Glimpse:
    """The map of one VAE: colours [.., 3] in -1..1 = latents [.., 16] @ weights [16, 3] + offset [3]."""

    @torch.no_grad()
    def __init__(self, family: Flux1, vae: AutoencoderKL):
        patches = torch.rand(PICTURES, 3, PATCHES, PATCHES, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pixels = F.interpolate(patches, size=(SIDE_PX, SIDE_PX), mode="bicubic").clamp(-1, 1)
        latents = torch.cat([family.encode_pictures(vae, one[None]).float().cpu() for one in pixels])
        rows = latents.movedim(1, -1).flatten(0, -2)
        colours = F.avg_pool2d(pixels, VAE_SCALE).movedim(1, -1).flatten(0, -2)
        solved = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), colours).solution
        self.weights, self.offset = solved[:-1], solved[-1]

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """RGB pictures of latents [B, 16, h, w], w x h px each."""
        colours = (latents.float().cpu().movedim(1, -1) @ self.weights + self.offset).clamp(-1, 1)
        return [Image.fromarray(one) for one in ((colours + 1) * 127.5).round().byte().numpy()]
