"""Which plans fit the machine at hand: the arithmetic of train/plan.py on what is free here."""

import os
from dataclasses import replace

import torch

from lorabooth.config import TrainConfig
from lorabooth.device import check_device, free_gpu_bytes
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Flux1
from lorabooth.lora import LoraSpec
from lorabooth.machine import pinnable_bytes
from lorabooth.notes import note
from lorabooth.runs import RunDir
from lorabooth.sizes import BEST_FIRST, Estimate
from lorabooth.speed import Speed, measured
from train.checkpoint import saved_precision
from train.plan import MemoryPlan, Shapes, choose, estimate


def plans_for(config: TrainConfig, family: Flux1, device: torch.device, shards: int = 1) -> list[Estimate[MemoryPlan]]:
    """The plan for this device, and lighter ones after it. On a CPU there is nothing to fit: what the recipe asks for, in fp32.

    shards: how many processes divide the base among them.
    """
    shapes = shapes_of(config, family)
    check_device(device, family.native_px, config.model)
    if device.type == "cuda":
        # The processes of one machine share its memory (torchrun and accelerate say how many they are).
        host_bytes = pinnable_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return choose(shapes, config, measured(), free_gpu_bytes(device), host_bytes, shards)
    count = len(shapes.blocks)
    swapped = min(config.blocks_to_swap or 0, count)
    words = {"auto": count if swapped else 0, "none": 0, "all": count}
    asked = words.get(config.gradient_checkpointing)
    recomputed = min(int(config.gradient_checkpointing), count) if asked is None else asked
    precision = "fp32" if config.precision in ("auto", "bf16") else config.precision
    plan = MemoryPlan(precision, recomputed, swapped, bool(config.precompute_modulation), shards)
    return [estimate(plan, shapes, config, Speed(0.1, 10, 10, "the CPU"))]


def plans_to_go_on(run: RunDir, family: Flux1, device: torch.device, shards: int = 1) -> list[Estimate[MemoryPlan]]:
    """As `plans_for`; a run that was begun goes on with its base in the precision it had, where a plan with that fits, and lighter ones come after."""
    config = run.config
    found, before = plans_for(config, family, device, shards), saved_precision(run)
    if before not in BEST_FIRST or before == found[0].plan.precision:  # none yet, or fp32, a CPU's: such a run is refused where it is read
        return found
    try:
        same = plans_for(config.model_copy(update={"precision": before}), family, device, shards)
    except UserError as error:
        note(f"so far the base was in {before}, and from here on in {found[0].plan.precision}: {error.message}")
        return found
    return [*same, *(other for other in found if other.bytes < same[-1].bytes)]


def shapes_of(config: TrainConfig, family: Flux1) -> Shapes:
    """The sizes of a recipe's base and LoRA, from its configs alone."""
    shapes = Shapes.of(family.empty_transformer(), LoraSpec.of(config), family.text_tokens)
    if not config.train_text_encoder:
        return shapes
    clip = family.empty_clip()
    weights = sum(p.numel() for p in clip.parameters())
    adapted = LoraSpec.of(config).attach_clip(clip, config.seed)
    return replace(shapes, text_encoder=weights, lora=shapes.lora + sum(p.numel() for p in adapted))
