"""`MemoryPlan`: how a training fits into the GPU it runs on, chosen by arithmetic before anything loads.

All sizes are bytes of 10**9 to the GB. Activations were counted with `torch.autograd.graph.saved_tensors_hooks`
(tests/test_plan.py counts them again); speeds come from the GPU itself where there is one, else from a card of that size (lorabooth/speed.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import cast

import torch
from torch import nn

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families.flux1 import NORMS, VAE_SCALE
from lorabooth.lora import LoraSpec
from lorabooth.pinned import pinned_bytes
from lorabooth.sizes import BEST_FIRST, BYTES, GB, MFU, RESERVE_BYTES, RESERVE_SHARE, BaseSizes, Estimate, cheaper, lacking, spread, steps_down
from lorabooth.speed import Speed

SAVED: dict[str, dict[str, tuple[float, float]]] = {
    "attention": {
        "lean": (13.2, 12.1), "compiled": (13.2, 12.1), "sparing": (12.2, 11.1),
        "dropout": (22.1, 19.1), "DoRA": (23.1, 20.1), "DoRA and dropout": (30.1, 25.1),
    },
    "attention+ff": {
        "lean": (14.3, 12.2), "compiled": (18.2, 17.1), "sparing": (12.2, 16.1),
        "dropout": (32.1, 31.1), "DoRA": (38.1, 35.1), "DoRA and dropout": (50.1, 47.1),
    },
    "all-linear": {
        "lean": (18.3, 14.2), "compiled": (19.2, 18.1), "sparing": (13.2, 17.1),
        "dropout": (36.2, 33.1), "DoRA": (43.0, 37.4), "DoRA and dropout": (54.1, 49.1),
    },
}  # fmt: skip
"""What a (double, single) block keeps for its backward, for each token: multiples of the width in bf16 values, by what computes it: train/lean.py,
the compiler, the compiler where some blocks have no room (lorabooth/compiled.py), or PEFT's own layers."""
SAVED_RANKS = {"attention": (4, 3), "attention+ff": (6, 5), "all-linear": (6, 5)}
"""Multiples of the rank besides."""
SAVED_BY_CLIP = (4.0, 2.0)
"""Multiples of the width besides where CLIP is trained: gates and norms then have gradients, too."""
WORTH_STEPS = 200
"""Below this many steps compiling takes longer than it saves."""
WORKSPACE = 12.0
"""Gradients and temporaries of the block at work, in the same units: twice the feed-forward's width, and the residual streams."""
FP8_WORKSPACE = 5.0
"""What fp8 products hold besides: their input scaled, and in fp8, of up to five widths."""


@dataclass(frozen=True)
class MemoryPlan:
    """Precision of the base's linears, how many blocks recompute their activations, how many live in host memory,
    whether the modulation is computed ahead, so that its linears need not be on the GPU (27 % of FLUX.1-dev), and how many
    GPUs divide the blocks among them (FSDP2)."""

    precision: str
    recomputed: int
    swapped: int
    precomputed: bool
    shards: int = 1

    @property
    def in_parts(self) -> bool:
        """Whether the base goes to the GPU part by part, by way of host memory."""
        return self.precision not in ("bf16", "fp32") or self.swapped > 0 or self.precomputed or self.shards > 1

    def __str__(self) -> str:
        parts = [f"base {self.precision}", f"{self.recomputed} blocks recomputed" if self.recomputed else "nothing recomputed"]
        parts += [f"{self.swapped} blocks in host memory"] if self.swapped else []
        parts += ["modulation computed ahead"] if self.precomputed else []
        parts += [f"divided among {self.shards} GPUs"] if self.shards > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Shapes(BaseSizes):
    """The base's sizes, the weights that a LoRA would have, and those of CLIP where it is trained, too."""

    lora: int
    adapts_modulation: bool
    """Whether the LoRA sits on the modulation's linears."""
    text_encoder: int = 0

    @classmethod
    def of(cls, transformer: nn.Module, spec: LoraSpec, text_tokens: int) -> "Shapes":
        """Count them on a transformer, which may be on the meta device."""
        names = spec.module_names(transformer)
        chosen = [cast(nn.Linear, transformer.get_submodule(name)) for name in names]
        lora = sum(spec.rank * (m.in_features + m.out_features) for m in chosen)
        adapts_modulation = any(re.search(rf"\.{NORMS}$", name) for name in names)
        return cls(**vars(BaseSizes.count(transformer, text_tokens)), lora=lora, adapts_modulation=adapts_modulation)


def estimate(plan: MemoryPlan, shapes: Shapes, config: TrainConfig, speed: Speed) -> Estimate[MemoryPlan]:
    """What a plan takes for the largest picture of the recipe, and its mean time over all of them."""
    each, wide = BYTES[plan.precision], 4 if plan.precision == "fp32" else 2
    blocks = _blocks(plan, shapes)
    swapped = spread(blocks, plan.swapped)
    # Places for the blocks that come and go: one at work, one on its way; FSDP2 keeps what the one before was gathered in until the next has been copied out.
    slots = 3 * max(blocks) if plan.shards > 1 else 2 * max(swapped, default=0)
    tokens = config.batch_size * max(_tokens(shapes, px) for px in config.resolutions_px)
    items = {
        "base": ((sum(blocks) - sum(swapped)) / plan.shards + slots) * each + shapes.rest * wide,
        "text encoder": shapes.text_encoder * wide,
        # In the base's precision: live, their gradients, the start where the base is asked; in fp32: master copy, its gradient, averaged weights.
        "LoRA": shapes.lora * ((2 * wide if wide == 2 else 0) + 3 * 4 + (wide if config.preservation_rate else 0)),
        "optimiser": shapes.lora * optimizer_bytes(config.optimizer),
        "activations": tokens * 2 * _saved(plan, shapes, config),
        "block at work": tokens * 2 * (WORKSPACE + (FP8_WORKSPACE if plan.precision == "fp8" else 0)) * shapes.width,
        "modulation ahead": _ahead(shapes, config) * wide if plan.precomputed else 0.0,
        "dequantised weights": 0.0 if plan.precision in ("bf16", "fp32") else 2 * shapes.largest * wide,
    }
    items["reserve"] = RESERVE_BYTES + RESERVE_SHARE * sum(items.values())
    host = pinned_bytes(sum(swapped) * each) + pinned_bytes(shapes.modulation * wide if plan.precomputed else 0)
    seconds = sum(_seconds(plan, shapes, config, speed, px) for px in config.resolutions_px) / len(config.resolutions_px)
    return Estimate(plan, items, host, seconds)


def _blocks(plan: MemoryPlan, shapes: Shapes) -> tuple[int, ...]:
    """The weights of each block as the plan has them; the modulation computed ahead is no part of them."""
    return shapes.blocks if plan.precomputed else shapes.whole_blocks


def _ahead(shapes: Shapes, config: TrainConfig) -> float:
    """Values that are computed ahead: what the modulation's linears make of each photo of a window."""
    return WINDOW * config.batch_size * shapes.modulation / shapes.width


def optimizer_bytes(name: str) -> float:
    """Bytes of an optimiser's state for each weight; `auto` is adamw8bit where memory matters."""
    return {"auto": 2.1, "adamw8bit": 2.1, "adam8bit": 2.1, "lion8bit": 1.05, "lion": 4, "adagrad": 4, "adafactor": 1, "prodigy": 16}.get(name, 8.0)


def _tokens(shapes: Shapes, px: int) -> int:
    return shapes.text_tokens + (px // (2 * VAE_SCALE)) ** 2


def _targets(shapes: Shapes, config: TrainConfig) -> str:
    """The kind of target that keeps what the recipe's layers keep; for a regular expression the one that keeps more than any like it."""
    if config.targets in SAVED and not config.layers_to_optimize_regex:
        return config.targets
    return "all-linear" if shapes.adapts_modulation else "attention+ff"


def wanted(asked: bool | None, plan: MemoryPlan, device: torch.device, steps: int) -> bool:
    """Whether to compile the blocks, where the recipe leaves it open: on a GPU, for a run long enough. Blocks that come and go change
    their weights' addresses at each turn (so do divided ones), and bitsandbytes' 4-bit kernels cannot be compiled."""
    if plan.swapped or plan.shards > 1 or plan.precision == "nf4":
        return False
    return asked if asked is not None else device.type == "cuda" and steps >= WORTH_STEPS


def _widths(plan: MemoryPlan, shapes: Shapes, config: TrainConfig) -> tuple[float, float]:
    """What a (double, single) block keeps for each token, in multiples of the width."""
    loose = [name for name, given in (("DoRA", config.use_dora), ("dropout", config.lora_dropout)) if given]
    compiled = wanted(config.compile_blocks, plan, torch.device("cuda"), config.steps)
    targets = _targets(shapes, config)
    double, single = SAVED[targets][" and ".join(loose) or (("sparing" if plan.recomputed else "compiled") if compiled else "lean")]
    more = SAVED_BY_CLIP if config.train_text_encoder and targets != "all-linear" else (0.0, 0.0)
    return double + more[0], single + more[1]


def _saved(plan: MemoryPlan, shapes: Shapes, config: TrainConfig) -> float:
    """Values kept for the backward pass for each token, when there are most: after the forward pass, or when all that is left are the first blocks, which
    recompute, and one of them has."""
    widths, ranks = _widths(plan, shapes, config), SAVED_RANKS[_targets(shapes, config)]
    kept = [widths[i >= shapes.double] * shapes.width + ranks[i >= shapes.double] * config.lora_rank for i in range(len(shapes.blocks))]
    return plan.recomputed * shapes.width + max(sum(kept[plan.recomputed :]), kept[0] if plan.recomputed else 0.0)


def _seconds(plan: MemoryPlan, shapes: Shapes, config: TrainConfig, speed: Speed, px: int) -> float:
    """A step's computing, or the transfers beside it where they take longer. FLOPs: 2 for each weight and token, 4 d N^2 for attention."""
    tokens, count = _tokens(shapes, px), len(shapes.blocks)
    recomputed = plan.recomputed / count
    products = 2e-12 * sum(shapes.blocks) * tokens * config.batch_size
    attention = 4e-12 * count * shapes.width * tokens**2 * config.batch_size
    computing = ((2 + recomputed) * products + (3 + recomputed) * attention) / (speed.tflop * MFU)
    if plan.precision not in ("bf16", "fp32"):  # read, write as bf16, in each pass
        computing += (2 + recomputed) * sum(shapes.blocks) * (BYTES[plan.precision] + 2) / (speed.memory_gb * GB)
    weights = sum(spread(_blocks(plan, shapes), plan.swapped)) * BYTES[plan.precision]
    moving = 2 * weights / (speed.host_gb * GB)
    if plan.shards > 1:  # what the others have comes over the same bus, or a faster one
        moving = 2 * sum(shapes.whole_blocks) * BYTES[plan.precision] * (1 - 1 / plan.shards) / (speed.host_gb * GB)
    ahead = shapes.modulation * 2 / (speed.host_gb * GB) / WINDOW if plan.precomputed else 0.0
    return (max(computing, moving) + ahead) * config.gradient_accumulation


WINDOW = 64
"""Batches whose modulation is computed at a time: the linears pass through the GPU once for all of them."""


def candidates(shapes: Shapes, config: TrainConfig, shards: int = 1) -> Iterator[MemoryPlan]:
    """Every plan that the recipe allows. shards: GPUs that divide the blocks among them, whole in bf16 and nowhere else."""
    count = len(shapes.blocks)
    reads_base = config.use_dora or config.lora_init == "pissa"
    precisions: tuple[str, ...] = BEST_FIRST if config.precision == "auto" else (config.precision,)
    if reads_base or shards > 1:
        precisions = tuple(p for p in precisions if p == "bf16")
    counts = {"auto": range(count + 1), "none": (0,), "all": (count,)}
    recomputed = counts.get(config.gradient_checkpointing) or (min(int(config.gradient_checkpointing), count),)
    swapped = range(count + 1) if config.blocks_to_swap is None else (min(config.blocks_to_swap, count),)
    # Ahead only where nothing that is trained has a part in it: a LoRA on its linears, or on CLIP.
    adapts_modulation = shapes.adapts_modulation or config.train_text_encoder
    ahead = (False, True) if config.precompute_modulation is None else (config.precompute_modulation,)
    for precision, k, s, m in product(precisions, recomputed, swapped, ahead):
        if (s and k < count) or (m and adapts_modulation) or (s and precision == "nf4"):
            continue  # a swapped block's weights are gone when its backward wants them, unless it runs again
        if shards > 1 and (s or m):
            continue
        yield MemoryPlan(precision, k, s, m, shards)


def fitting(shapes: Shapes, config: TrainConfig, speed: Speed, gpu_bytes: float, host_bytes: float, shards: int = 1) -> list[Estimate[MemoryPlan]]:
    """The plans that fit, the fastest first. nf4 comes last, for it alone loses exactness that shows."""
    found = [estimate(plan, shapes, config, speed) for plan in candidates(shapes, config, shards)]
    found = [e for e in found if e.bytes <= gpu_bytes and e.host_bytes <= host_bytes]

    def rank(e: Estimate[MemoryPlan]) -> tuple[object, ...]:
        return e.plan.precision == "nf4", round(e.seconds, 4), BEST_FIRST.index(e.plan.precision), e.plan.precomputed, e.plan.swapped, e.bytes

    return sorted(found, key=rank)


def choose(shapes: Shapes, config: TrainConfig, speed: Speed, gpu_bytes: float, host_bytes: float, shards: int = 1) -> list[Estimate[MemoryPlan]]:
    """The fastest plan that fits, and after it those that take less memory, each the fastest of its kind; a UserError that says what would fit."""
    found = fitting(shapes, config, speed, gpu_bytes, host_bytes, shards)
    if not found:
        raise _does_not_fit(shapes, config, speed, gpu_bytes, host_bytes, shards)
    return steps_down(found)


def _does_not_fit(shapes: Shapes, config: TrainConfig, speed: Speed, gpu_bytes: float, host_bytes: float, shards: int) -> UserError:
    """The sentence, with the settings that would fit."""
    every = [estimate(plan, shapes, config, speed) for plan in candidates(shapes, config, shards)]
    if not every and shards > 1:
        return UserError("these settings exclude each other: a base divided among GPUs (FSDP) stays on them and in bf16, without precompute_modulation")
    if not every:
        return UserError("these settings exclude each other: DoRA and PiSSA need precision bf16, and swapped blocks are recomputed and not nf4")
    needs, hint = lacking(every, gpu_bytes, host_bytes)
    free: dict[str, object] = {"precision": "auto", "gradient_checkpointing": "auto", "blocks_to_swap": None, "precompute_modulation": None}
    changes: list[dict[str, object]] = [free, {"batch_size": 1}, free | {"batch_size": 1}]
    changes += [free | {"batch_size": 1, "resolution": str(px)} for px in (1024, 768, 512, 256) if px <= max(config.resolutions_px)]
    for change in changes:
        if fitting(shapes, config.model_copy(update=change), speed, gpu_bytes, host_bytes, shards):
            flags = {f"--{name.replace('_', '-')}": value for name, value in change.items() if value != getattr(config, name)}
            hint = "these would fit: " + " ".join(f"{flag} {value}" if value is not None else f"(no {flag})" for flag, value in flags.items())
            break
    return UserError(f"this training needs {needs}", hint=hint)


def next_lighter(plan: MemoryPlan, estimates: list[Estimate[MemoryPlan]]) -> MemoryPlan | None:
    """The plan to try after `plan` ran out of memory; None where there is none."""
    plans = [e.plan for e in estimates]
    place = plans.index(plan) if plan in plans else -1
    return plans[place + 1] if place + 1 < len(plans) else None


def table(estimates: list[Estimate[MemoryPlan]], config: TrainConfig, speed: Speed) -> str:
    """The first plan in full and the next cheaper one, as text."""
    best = estimates[0]
    lines = best.table()
    total = best.seconds * config.steps
    lines += ["", f"time: about {best.seconds:.2f} s a step, {total / 60:.0f} minutes for {config.steps} steps on {speed.name}"]
    lines += cheaper(estimates)
    return "\n".join(lines)
