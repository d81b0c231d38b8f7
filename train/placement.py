"""A memory plan made real on a transformer: what is stored how, what is recomputed, what comes and goes."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorabooth.swap import BlockSwap
from train.modulation import Modulation
from train.plan import MemoryPlan, blocks_of, linears
from train.quantized import quantized


def place(transformer: nn.Module, plan: MemoryPlan, device: torch.device) -> Modulation | None:
    """Move a frozen transformer from host memory to where the plan wants its parts; before a LoRA is put on it."""
    modulation = Modulation(transformer, device) if plan.precomputed else None
    blocks = blocks_of(transformer)
    for i, block in enumerate(blocks):
        if plan.precision not in ("bf16", "fp32"):
            for name, linear in linears(block):
                block.set_submodule(name, quantized(linear, plan.precision, device))
        block.to("cpu" if i >= len(blocks) - plan.swapped else device)
    for name, part in transformer.named_children():
        if name not in ("transformer_blocks", "single_transformer_blocks"):
            part.to(device)
    return modulation


def start_plan(transformer: nn.Module, plan: MemoryPlan, device: torch.device, random: bool) -> None:
    """Recompute the first blocks and swap the last ones, after the LoRA was put on. random: whether a block draws random numbers (dropout)."""
    blocks = blocks_of(transformer)
    if plan.swapped:
        BlockSwap(blocks[len(blocks) - plan.swapped :], device)
    if not plan.recomputed:
        return
    # The first ones: when their turn comes in the backward pass, the activations of those behind them are gone already.
    recomputed = {id(block) for block in blocks[: plan.recomputed]}

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=random) if id(block) in recomputed else block(*inputs)

    transformer.enable_gradient_checkpointing(run)  # type: ignore[operator]
