"""Compiled blocks in training: where it pays, and every shape of picture before the first step."""

import math
import random
from dataclasses import replace

import torch
from tqdm import tqdm

from lorabooth.compiled import try_compiled
from lorabooth.sizes import blocks_of
from train.objective import loss_of
from train.plan import MemoryPlan
from train.trainer import Trainer

WORTH_STEPS = 200
"""Below this many steps compiling takes longer than it saves."""


def wanted(asked: bool | None, plan: MemoryPlan, device: torch.device, steps: int) -> bool:
    """Whether to compile where the recipe leaves it open: on a GPU, for a run long enough. Blocks that come and go change
    their weights' addresses at each turn (so do divided ones), and bitsandbytes' 4-bit kernels cannot be compiled."""
    if plan.swapped or plan.shards > 1 or plan.precision == "nf4":
        return False
    return asked if asked is not None else device.type == "cuda" and steps >= WORTH_STEPS


def compile_blocks(trainer: Trainer) -> None:
    """Compile the blocks and run each shape of picture once, forward and backward; where the compiler fails, go on without it."""
    shapes = list(((trainer.others.by_bucket if trainer.others else {}) | trainer.sampler.by_bucket).values())

    expected = trainer.config.preservation_rate * trainer.config.batch_size
    preserving = sorted({math.floor(expected), math.ceil(expected)})

    def each_shape() -> None:
        for group in tqdm(shapes, desc="compile (once, a minute or two)", unit="shape", disable=not trainer.accelerator.is_main_process):
            # The whole batch that training will have: its size is part of the shape.
            picked = (group * trainer.config.batch_size)[: trainer.config.batch_size]
            batch = trainer.cache.batch(picked, trainer.config, random.Random(0))
            for preserved in preserving:
                first = replace(batch, preserved=preserved, preserving=preserved > 0)
                loss_of(trainer, first, torch.Generator().manual_seed(0)).backward()

    try:
        try_compiled(blocks_of(trainer.transformer), len(shapes) > 1, each_shape, "training")
    finally:
        for p in trainer.live:
            p.grad = None
