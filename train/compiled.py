"""The transformer's blocks compiled one by one: 57 blocks are two kinds of code, so two compilations do for all (regional compilation)."""

import random
import sys

import torch
from tqdm import tqdm

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
    blocks, shapes = blocks_of(trainer.transformer), list(((trainer.others.by_bucket if trainer.others else {}) | trainer.sampler.by_bucket).values())
    for block in blocks:
        block.compile(dynamic=len(shapes) > 1)
    try:
        for group in tqdm(shapes, desc="compile (once, a minute or two)", unit="shape", disable=not trainer.accelerator.is_main_process):
            # The whole batch that training will have: its size is part of the shape.
            picked = (group * trainer.config.batch_size)[: trainer.config.batch_size]
            batch = trainer.cache.batch(picked, trainer.config, random.Random(0))
            loss_of(trainer, batch, torch.Generator().manual_seed(0)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in ways of their own: none on the machine, a kernel it cannot build
        for block in blocks:
            block._compiled_call_impl = None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"note: the blocks cannot be compiled here, training goes on without ({type(error).__name__}: {reason})", file=sys.stderr)
    finally:
        for p in trainer.live:
            p.grad = None
