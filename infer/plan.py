"""`ServingPlan`: how a base model fits into the GPU that makes the pictures, chosen by arithmetic before anything loads."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from lorabooth.errors import UserError
from lorabooth.families.flux1 import VAE_SCALE
from lorabooth.pinned import pinned_bytes
from lorabooth.sizes import BEST_FIRST, BYTES, GB, MFU, RESERVE_BYTES, RESERVE_SHARE, BaseSizes, Estimate, cheaper, lacking, spread, steps_down
from lorabooth.speed import Speed

STEPS = 28
WORKSPACE = 20.0
"""What a block at work holds without gradients, for each token: multiples of the width, in bf16 values."""
DECODE_BYTES_PX, TILE_PX = 2_600, 512
"""What the VAE holds for each pixel that it decodes at once (about ten activations of 128 channels in bf16), and the side of a tile."""
STACK_PLACES, STACK_RANK, FAST_RANK = 5, 32, 64
"""Sets of LoRAs that stand beside the weights, and the rank for which they have room; compiled, that of which none is larger without compiling again."""
STACKED_COST = 1.18
"""LoRAs beside the weights take this much longer than merged ones (replicate and diffusers report 15 to 20 %)."""
SWAPS = 0.25
"""Changes of LoRAs for each picture, where they cost something."""
DISK_SECONDS = 12.0
"""Reading the text encoders anew, for each new prompt."""
ENCODERS = ("gpu", "host", "disk")
ENCODERS_SHARE = 0.14
"""Of the text encoders, what is on the GPU where T5's blocks come from host memory: CLIP, T5's table of tokens, and places for two of its 24 blocks."""
FP8_WORKSPACE = 3.0
"""What fp8 products hold besides, in the units of WORKSPACE: their input scaled, and in fp8."""


@dataclass(frozen=True)
class ServingPlan:
    """How the linears are stored; how many blocks live in host memory; whether LoRAs are merged into the weights, with the untouched ones
    kept on the GPU or in host memory, or stand beside them (stacked); where the text encoders are between two prompts; whether the VAE works in tiles."""

    precision: str
    swapped: int = 0
    loras: str = "merged"
    untouched_on: str = "gpu"
    encoders: str = "gpu"
    tiled: bool = False

    @property
    def ready_bytes(self) -> float:
        """How much of the LoRAs of late requests is kept on the GPU: FLUX.1-dev's of rank 16 have 0.2 GB in bf16."""
        return 2 * GB if self.loras == "merged" and self.untouched_on == "gpu" else 0.5 * GB

    def __str__(self) -> str:
        parts = [f"base {self.precision}"] + ([f"{self.swapped} blocks in host memory"] if self.swapped else [])
        kept = {"gpu": "on the GPU", "host": "in host memory"}
        parts.append(f"LoRAs merged, the untouched weights {kept[self.untouched_on]}" if self.loras == "merged" else "LoRAs beside the weights")
        parts.append(
            {"gpu": "text encoders on the GPU", "host": "text encoders in host memory", "disk": "text encoders read for each new prompt"}[self.encoders]
        )
        return ", ".join(parts + (["VAE in tiles"] if self.tiled else []))


@dataclass(frozen=True)
class Needs:
    """What is asked of a plan: pictures of `tokens` image tokens, `batch` at once; bytes of the text encoders and of the VAE."""

    sizes: BaseSizes
    tokens: int
    encoder_bytes: float
    vae_bytes: float
    batch: int = 1
    mixed: bool = False
    fast: bool = False
    steps: int = STEPS


def estimate(plan: ServingPlan, needs: Needs, speed: Speed) -> Estimate[ServingPlan]:
    """What a plan takes of the GPU, of the host, and of time."""
    sizes, each, wide = needs.sizes, BYTES[plan.precision], 4 if plan.precision == "fp32" else 2
    blocks = sizes.whole_blocks
    swapped = spread(blocks, plan.swapped)
    linears = sum(blocks)
    tokens = needs.batch * (sizes.text_tokens + needs.tokens)
    stack = STACK_PLACES * (FAST_RANK if needs.fast else STACK_RANK) * wide * sizes.ends
    pixels = needs.tokens * (2 * VAE_SCALE) ** 2
    decoding = DECODE_BYTES_PX * (min(pixels, TILE_PX**2) if plan.tiled else pixels)
    sampling = tokens * 2 * (WORKSPACE + (FP8_WORKSPACE if plan.precision == "fp8" else 0)) * sizes.width + (0 if each >= 2 else 2 * sizes.largest * wide)
    items = {
        "base": (linears - sum(swapped) + 2 * max(swapped, default=0)) * each + sizes.rest * wide,
        "untouched weights": linears * wide if plan.loras == "merged" and plan.untouched_on == "gpu" else 0.0,
        "LoRAs": plan.ready_bytes + (stack if plan.loras == "stacked" else 0.0),
        "text encoders": needs.encoder_bytes * {"gpu": 1.0, "host": ENCODERS_SHARE, "disk": 0.0}[plan.encoders],
        "VAE": needs.vae_bytes,
        "at work": max(sampling, decoding, 1.5 * GB, ENCODERS_SHARE * needs.encoder_bytes if plan.encoders == "disk" else 0.0),
    }
    items["reserve"] = RESERVE_BYTES + RESERVE_SHARE * sum(items.values())
    host = pinned_bytes(sum(swapped) * each) + pinned_bytes(linears * wide if plan.loras == "merged" and plan.untouched_on == "host" else 0)
    host += pinned_bytes(needs.encoder_bytes) if plan.encoders == "host" else 0
    seconds = needs.steps * max(_computing(plan, needs, speed), sum(swapped) * each / (speed.host_gb * GB))
    seconds += {"gpu": 0.1, "host": needs.encoder_bytes / (speed.host_gb * GB), "disk": DISK_SECONDS}[plan.encoders]
    if plan.loras == "merged" and plan.untouched_on == "host":
        seconds += SWAPS * linears * wide / (speed.host_gb * GB)
    return Estimate(plan, items, host, seconds)


def _computing(plan: ServingPlan, needs: Needs, speed: Speed) -> float:
    """Seconds of a step. FLOPs: 2 for each weight and token, 4 d N^2 for attention in each block."""
    sizes, tokens = needs.sizes, needs.sizes.text_tokens + needs.tokens
    operations = needs.batch * (2 * sum(sizes.blocks) * tokens + 4 * len(sizes.blocks) * sizes.width * tokens**2)
    seconds = operations / 1e12 / (speed.tflop * MFU)
    if BYTES[plan.precision] < 2:  # read, write as bf16, in each pass
        seconds += sum(sizes.blocks) * (BYTES[plan.precision] + 2) / (speed.memory_gb * GB)
    return seconds * (STACKED_COST if plan.loras == "stacked" else 1)


def candidates(needs: Needs, precision: str = "auto", swapped: int | None = None) -> Iterator[ServingPlan]:
    """Every plan that can be run. Merged LoRAs need weights that can be written anew and stay on the GPU."""
    count = len(needs.sizes.blocks)
    precisions = BEST_FIRST if precision == "auto" else (precision,)
    counts = range(count + 1) if swapped is None else (min(swapped, count),)
    ways = (("merged", "gpu"), ("merged", "host"), ("stacked", "gpu"))
    for chosen, k, (loras, kept), encoders, tiled in product(precisions, counts, ways, ENCODERS, (False, True)):
        if loras == "merged" and (chosen == "nf4" or k or needs.mixed):
            continue
        if k and chosen == "nf4":
            continue
        yield ServingPlan(chosen, k, loras, kept, encoders, tiled)


def choose(needs: Needs, speed: Speed, gpu_bytes: float, host_bytes: float, precision: str = "auto", swapped: int | None = None) -> list[Estimate[ServingPlan]]:
    """The fastest plan that fits, and after it those that take less memory; a UserError that says what is missing.

    nf4 comes last, for it alone loses exactness that shows.
    """
    every = [estimate(plan, needs, speed) for plan in candidates(needs, precision, swapped)]
    found = [e for e in every if e.bytes <= gpu_bytes and e.host_bytes <= host_bytes]
    if not found:
        lacks, hint = lacking(every, gpu_bytes, host_bytes)
        raise UserError(f"generating needs {lacks}", hint=f"make smaller pictures (--megapixels 0.25), leave --precision at auto; or {hint}")

    def rank(e: Estimate[ServingPlan]) -> tuple[object, ...]:
        plan = e.plan
        exact = BEST_FIRST.index(plan.precision), plan.tiled
        return plan.precision == "nf4", round(e.seconds, 2), *exact, plan.loras, plan.untouched_on, ENCODERS.index(plan.encoders), plan.swapped, e.bytes

    found.sort(key=rank)
    return steps_down(found)


def table(estimates: list[Estimate[ServingPlan]], speed: Speed, picture: str) -> str:
    """The first plan in full and the next cheaper one, as text. picture: what they were made for."""
    best = estimates[0]
    lines = best.table()
    lines += ["", f"time: about {best.seconds:.1f} s for {picture} on {speed.name}"]
    lines += cheaper(estimates)
    return "\n".join(lines)
