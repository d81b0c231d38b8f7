"""What a training step makes small: rectified flow (lorabooth/flow.py), as in diffusers' train_dreambooth_lora_flux.py.

x = (1 - sigma) x_0 + sigma noise, target = noise - x_0, guidance embedding 1.0. Noise levels and their weights are choices of the recipe.
"""

import torch
from torch import Tensor

from lorabooth import flow
from lorabooth.device import base_dtype, sent
from lorabooth.families.flux1 import GUIDANCE_IN_TRAINING, Conditioning
from train.data import Batch
from train.trainer import Trainer, evaluating, with_weights

HIGHEST_OF = 8
"""What preserves gets the highest of so many noise levels (docs/LOG.md, 2026-11-24)."""


def loss_of(trainer: Trainer, batch: Batch, generator: torch.Generator) -> Tensor:
    """The loss of a batch: a scalar, fp32. `generator` (CPU) draws noise and noise levels, for the whole batch, so that several
    processes train on what one would."""
    noise, sigma = drawn(trainer, batch, generator)
    weight = sent(flow.loss_weight(trainer.config.loss_weighting, sigma).view(-1, 1, 1), trainer.accelerator.device)
    return (weight * squared_error(trainer, batch, noise, sigma)).mean()


def drawn(trainer: Trainer, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noise, as the batch's latents, and the noise levels [B] that a generator draws for it.

    An item that preserves and its twin that learns have the same, at a high level. What both pull at cancels, and what stays is what the trigger word
    makes; and under little noise the model sees who it is, whatever the prompt says, so that preserving teaches it to blur.
    """

    def levels() -> Tensor:
        return flow.sample_sigma(trainer.config.sigma_sampling, batch.whole, batch.weights.shape[1], generator)

    noise, sigma, count = torch.randn((batch.whole, *batch.latents.shape[1:]), generator=generator), levels(), batch.preserved
    if count:
        twins = min(count, batch.whole - count)  # where less than half learn, the first have none
        sigma[:count] = torch.stack([levels() for _ in range(HIGHEST_OF)]).amax(0)[:count]
        sigma[batch.whole - twins :] = sigma[count - twins : count]
        noise[:count] = noise[batch.whole - count :].clone()
    return noise[batch.mine], sigma[batch.mine]


def squared_error(trainer: Trainer, batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
    """[B, N, 64], fp32, weighted by the photos' masks; noise as the latents, sigma [B].

    Where an item preserves, the target is the base's own prediction (as in learning without forgetting, Li and Hoiem 2016, arXiv 1606.09282).
    """
    device = trainer.accelerator.device
    x_0, noise, levels = (sent(t, device) for t in (flow.pack(batch.latents), flow.pack(noise), sigma))
    x = flow.add_noise(x_0, noise, levels).to(base_dtype(device))
    ids = flow.image_ids(*batch.latents.shape[2:], device=device, dtype=x.dtype)
    target, weights = flow.velocity(x_0, noise), sent(batch.weights, device)

    def predict(x: Tensor, sigma: Tensor, levels: Tensor, prompts: Conditioning) -> Tensor:
        if trainer.modulation:
            trainer.modulation.show(sigma, GUIDANCE_IN_TRAINING, prompts.pooled)
        return trainer.family.velocity(trainer.transformer, x, levels, GUIDANCE_IN_TRAINING, trainer.conditioned(prompts), ids).float()

    if batch.preserved:
        count = batch.own_preserved
        asked = max(1, count)  # all processes, even those without such items: where they share the base's weights, none can pass alone
        with with_weights(trainer, trainer.untrained), evaluating(trainer):
            own = predict(x[:asked], sigma[:asked], levels[:asked], batch.conditioning.first(asked))
        target = torch.cat([own[:count], target[count:]])
        weights = torch.cat([torch.ones_like(weights[:count]), weights[count:]])
    return weights * (predict(x, sigma, levels, batch.conditioning) - target).square()
