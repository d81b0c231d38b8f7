"""Compiled blocks in training: every shape of picture before the first step."""

import torch
from tqdm import tqdm

from lorabooth.compiled import try_compiled
from lorabooth.sizes import blocks_of
from train.data import CLASS_PREFIX, preserving
from train.lean_blocks import join
from train.objective import loss_of
from train.trainer import Trainer, backward

FEW = 8
"""So few blocks, in one shape of picture, are compiled as one: that takes a CPU no longer, and a step is 5 to 9 % shorter (docs/LOG.md, 2026-11-28)."""


def compile_blocks(trainer: Trainer) -> None:
    """Compile the blocks and run each shape of picture once, forward and backward; where the compiler fails, go on without it."""
    torch._dynamo.reset()  # code of a plan that did not fit keeps what that plan kept, and torch would take it again
    shapes = list(((trainer.others.by_bucket if trainer.others else {}) | trainer.sampler.by_bucket).values())

    config, accelerator = trainer.config, trainer.accelerator
    whole = config.batch_size * accelerator.num_processes
    shares = {preserving(config, whole, draw) for draw in (0, 0.999)}  # every share of preserved items that more than one batch in a thousand has

    def each_shape() -> None:
        for group in tqdm(shapes, desc="compile (once, a minute or two)", unit="shape", disable=not accelerator.is_main_process):
            # The whole batch that training will have, and this process's part of it: its size and what of it preserves are parts of the shape.
            picked = (group * whole)[:whole]
            for preserved in {0} if group[0].photo.startswith(CLASS_PREFIX) else shares:
                batch = trainer.cache.compose(picked, [item.photo for item in picked], preserved, trainer.part)
                backward(loss_of(trainer, batch, torch.Generator().manual_seed(0)))

    if trainer.mixed:
        join(trainer.transformer)
    try:
        blocks = blocks_of(trainer.transformer)
        as_one = len(blocks) <= FEW and len(shapes) == 1 and not trainer.plan.recomputed
        try_compiled([trainer.transformer] if as_one else blocks, len(shapes) > 1, each_shape, "training", sparing=trainer.plan.recomputed > 0)
    finally:
        for p in trainer.live:
            p.grad = None
