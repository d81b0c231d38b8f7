"""A memory plan made real on a transformer: what is stored how, what is recomputed, what comes and goes."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lorabooth.quantized import put_blocks, put_rest
from lorabooth.sizes import blocks_of, spread
from lorabooth.swap import BlockSwap
from train.modulation import Modulation
from train.plan import MemoryPlan


def place(transformer: nn.Module, plan: MemoryPlan, device: torch.device) -> Modulation | None:
    """Move a frozen transformer from host memory to where the plan wants its parts; before a LoRA is put on it."""
    modulation = Modulation(transformer, device) if plan.precomputed else None
    blocks = blocks_of(transformer)
    if plan.shards == 1:  # else `shard` takes them to the GPU
        put_blocks(blocks, plan.precision, plan.swapped, device)
    put_rest(transformer, device)
    return modulation


def shard(transformer: nn.Module) -> None:
    """Divide the frozen blocks among the processes (FSDP2); each is put together when its turn comes. The LoRA is whole everywhere.

    From here on every process must take part in each pass of the transformer.
    """
    blocks = blocks_of(transformer)
    adapted = {p for p in transformer.parameters() if p.requires_grad}
    divided = {p for block in blocks for p in block.parameters()} - adapted
    for block in blocks:
        fully_shard(block, ignored_params=adapted)
    # The rest is small and stays whole; the root only lets a block come while the one before it is at work.
    fully_shard(transformer, ignored_params=set(transformer.parameters()) - divided)


def start_plan(transformer: nn.Module, plan: MemoryPlan, device: torch.device, random: bool) -> None:
    """Recompute the first blocks and swap what the plan swaps, after the LoRA was put on. random: whether a block draws random numbers (dropout)."""
    blocks = blocks_of(transformer)
    if plan.swapped:
        BlockSwap(spread(blocks, plan.swapped), device)
    if not plan.recomputed:
        return
    # The first ones: when their turn comes in the backward pass, the activations of those behind them are gone already.
    recomputed = {id(block) for block in blocks[: plan.recomputed]}

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=random) if id(block) in recomputed else block(*inputs)

    transformer.enable_gradient_checkpointing(run)  # type: ignore[operator]
