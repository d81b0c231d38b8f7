"""Compiled blocks in training: every shape of picture before the first step."""

import math
import random
from dataclasses import replace

import torch
from tqdm import tqdm

from lorabooth.compiled import try_compiled
from lorabooth.sizes import blocks_of
from train.data import CLASS_PREFIX
from train.objective import loss_of
from train.trainer import Trainer


def compile_blocks(trainer: Trainer) -> None:
    """Compile the blocks and run each shape of picture once, forward and backward; where the compiler fails, go on without it."""
    shapes = list(((trainer.others.by_bucket if trainer.others else {}) | trainer.sampler.by_bucket).values())

    config, accelerator = trainer.config, trainer.accelerator
    size, number = config.batch_size, accelerator.process_index
    expected = config.preservation_rate * size * accelerator.num_processes
    # This process's part of them, at least one where there are any: as in `objective.squared_error`.
    mine = {len(range(whole)[number * size : (number + 1) * size]) if whole else None for whole in (math.floor(expected), math.ceil(expected))}

    def each_shape() -> None:
        for group in tqdm(shapes, desc="compile (once, a minute or two)", unit="shape", disable=not accelerator.is_main_process):
            # The whole batch that training will have: its size is part of the shape.
            batch = trainer.cache.batch((group * size)[:size], config, random.Random(0))
            for preserved in {None} if group[0].photo.startswith(CLASS_PREFIX) else mine:
                first = replace(batch, preserved=preserved or 0, preserving=preserved is not None)
                loss_of(trainer, first, torch.Generator().manual_seed(0)).backward()

    try:
        try_compiled(blocks_of(trainer.transformer), len(shapes) > 1, each_shape, "training")
    finally:
        for p in trainer.live:
            p.grad = None
