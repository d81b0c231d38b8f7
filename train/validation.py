"""A loss that can be compared between steps and runs: held-out photos at fixed noise levels and with fixed noise.

The training loss says little of progress: most of its swings come from the noise levels that a step happened to draw.
"""

import random

import torch

from lorabooth.families.flux1 import GUIDANCE_IN_TRAINING
from lorabooth.photos import Manifest
from train.data import validation_items
from train.objective import squared_error
from train.trainer import Trainer, averaged

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(trainer: Trainer) -> float:
    """The mean loss of the held-out photos with the averaged weights, over `SIGMAS`."""
    plain = trainer.config.model_copy(update={"caption_dropout_rate": 0.0, "preservation_rate": 0.0})
    batches = [(item, trainer.cache.batch([item], plain, random.Random(0))) for item in validation_items(Manifest.load(trainer.run.path), trainer.config)]
    errors = []
    with averaged(trainer):
        if trainer.modulation:  # once for all of them: each time, its linears come to the GPU
            pooled = torch.cat([batch.conditioning.pooled for _, batch in batches])
            trainer.modulation.expect(torch.tensor(SIGMAS).repeat_interleave(len(batches)), GUIDANCE_IN_TRAINING, pooled.repeat(len(SIGMAS), 1))
        for item, batch in batches:
            for i, sigma in enumerate(SIGMAS):
                noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1000 * int(item.photo) + i))
                errors.append(squared_error(trainer, batch, noise, torch.tensor([sigma])).mean())
    return torch.stack(errors).mean().item()
