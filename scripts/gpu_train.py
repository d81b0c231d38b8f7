"""Training beside diffusers' script on a GPU: `python -m scripts.gpu_train`, on a FLUX.1-dev of the true size with random weights.

The arms are those of scripts/bench_train.py: the script as it is, with T5, CLIP and the VAE at each step; encoded ahead; and that compiled; ours, and ours
compiled, by the plan that training would take. They run one after another, for the GPU does not hold two of them, and the first runs again at the end: what
has changed by then is drift. Random weights say nothing of quality, and nothing is claimed of it.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lorabooth.attention import choose_kernel
from lorabooth.device import base_dtype, check_memory, compute_device
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Conditioning
from lorabooth.families.flux1_dev import CONFIGS
from scripts.bench_generate import seconds_of
from scripts.bench_startup import machine_record
from scripts.bench_train import AHEAD, AS_IT_IS, COMPILED, OURS, OURS_COMPILED, SETTINGS, Arm, our_arm
from scripts.gpu_check import WARM_UP_STEPS, failure, forget, memory, write
from scripts.peer import Batch, Peer
from scripts.random_flux import DEV, TINY, RandomFlux, Size, random_conditioning, write_model

CLIP_HEAD, CLIP_TOKENS = 64, 77


class Encoding:
    """What the script does at each step without caches, on a photo and a caption of random numbers."""

    def __init__(self, family: RandomFlux, size: Size, px: int, count: int, device: torch.device):
        dtype, generator, pooled = base_dtype(device), torch.Generator().manual_seed(0), size.transformer["pooled_projection_dim"]
        self.vae = family.vae(device, dtype)
        clip = CLIPTextConfig(**CONFIGS["text_encoder/config.json"] | {"hidden_size": pooled, "num_attention_heads": max(1, pooled // CLIP_HEAD)})
        t5 = T5Config(**CONFIGS["text_encoder_2/config.json"] | {"d_model": size.transformer["joint_attention_dim"]})
        with torch.device(device):  # without dropout, as `from_pretrained` gives them to the script
            self.clip = CLIPTextModel._from_config(clip, dtype=dtype).eval().requires_grad_(False)
            self.t5 = T5EncoderModel._from_config(t5, dtype=dtype).eval().requires_grad_(False)
        self.pixels = (torch.rand(count, 3, px, px, generator=generator) * 2 - 1).to(device, dtype)
        self.ids = [torch.randint(2, 1000, (count, length), generator=generator).to(device) for length in (CLIP_TOKENS, size.text_tokens)]

    @torch.no_grad()
    def batch(self) -> Batch:
        """The photos through the VAE (a sample of the posterior), the captions through CLIP and T5."""
        latents = (self.vae.encode(self.pixels).latent_dist.sample() - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return Batch(latents, Conditioning(self.t5(self.ids[1])[0], self.clip(self.ids[0]).pooler_output))


def makers(family: RandomFlux, size: Size, px: int, count: int, device: torch.device, folder: Path) -> dict[str, Callable[[], Arm]]:
    """How each arm is made, by name; the first one again at the end."""
    settings, dtype = SETTINGS | {"batch_size": count}, base_dtype(device)

    def ours(compiled: bool) -> Arm:
        return our_arm(Path(tempfile.mkdtemp(dir=folder)) / "run", family, size, settings, compiled, device, px)

    def theirs(name: str, compiled: bool, encoded: bool) -> Arm:
        if encoded:
            one, side = random_conditioning(size, dtype), px // 8
            latents = torch.randn(count, 16, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            ahead = Batch(latents, Conditioning(one.embeds.repeat(count, 1, 1).to(device), one.pooled.repeat(count, 1).to(device)))
            peer = Peer(family, settings, lambda: ahead, compiled, device)
        else:
            peer = Peer(family, settings, Encoding(family, size, px, count, device).batch, device=device)
        return Arm(name, peer.step, peer.plain)

    return {
        OURS_COMPILED: lambda: ours(True), OURS: lambda: ours(False), AS_IT_IS: lambda: theirs(AS_IT_IS, False, False),
        AHEAD: lambda: theirs(AHEAD, False, True), COMPILED: lambda: theirs(COMPILED, True, True), f"{OURS_COMPILED} (again)": lambda: ours(True),
    }  # fmt: skip


def timed(make: Callable[[], Arm], steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of an arm's step, one by one and in a row, of making the arm (ours compiles then) and what its first steps took besides (the script does
    then), and its peak memory; or that the memory ran out."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the script wants mixed precision of accelerate, and our arms do not
    try:
        forget(device)
        start = time.perf_counter()
        arm = make()
        making = time.perf_counter() - start
        first = sum(seconds_of(arm.step, device) for _ in range(WARM_UP_STEPS))
        times = [seconds_of(arm.step, device) for _ in tqdm(range(steps), desc=arm.name, unit="step")]
        in_a_row = seconds_of(lambda: [arm.step() for _ in range(steps)], device) / steps
    except Exception as error:  # the other arms say something all the same
        return failure(error) | memory(device)
    deciles = quantiles(times, n=10, method="inclusive")
    found = {"median_seconds": median(times), "p10_seconds": deciles[0], "p90_seconds": deciles[-1], "seconds_in_a_row": in_a_row}
    return found | {"making_seconds": making, "warm_up_seconds": first - WARM_UP_STEPS * median(times)} | memory(device)


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| pictures | arm | median | p10 to p90 | in a row | peak allocated | ours over it |", "|---|---|---|---|---|---|---|"]
    for case in record["cases"]:
        best = min((row["median_seconds"] for name, row in case["arms"].items() if name.startswith(OURS) and "median_seconds" in row), default=math.nan)
        for name, row in case["arms"].items():
            peak = f"{row['peak_allocated_gb']:.1f} GB" if "peak_allocated_gb" in row else "-"
            if "median_seconds" not in row:
                wrong = row.get("failed", "out of memory")
                lines.append(f"| {case['px']} px, batch {case['batch']} | {name} | {wrong} | - | - | {peak} | - |")
                continue
            spread = f"{row['p10_seconds']:.3f} to {row['p90_seconds']:.3f} s"
            seconds, ratio = f"{row['median_seconds']:.3f} s | {spread} | {row['seconds_in_a_row']:.3f} s", f"{best / row['median_seconds']:.2f}"
            lines.append(f"| {case['px']} px, batch {case['batch']} | {name} | {seconds} | {peak} | {ratio} |")
    return "\n".join(lines)


def check(tiny: bool) -> tuple[Size, torch.device]:
    """What is timed and where; a UserError where there is no such GPU."""
    if tiny:
        return TINY, compute_device()
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU, and a FLUX.1-dev of the true size needs one (--tiny tries this script anywhere)")
    check_memory(75_000_000_000, "the script at 1024 px with T5 beside the base", "use a GPU of 80 GB")
    return DEV, torch.device("cuda")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/gpu_train.json"), show_default=True, help="Where the figures go.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=2), help="Timed steps of each arm.")
@click.option("--px", "sides", default="", help="Sides of the pictures in px, by commas. [default: 1024,512]")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1), help="Photos a step.")
@click.option("--tiny", is_flag=True, help="A tiny model on any device: tries this script, measures nothing.")
def bench(out: Path, steps: int, sides: str, batch_size: int, tiny: bool) -> None:
    """Time training beside diffusers' script on the GPU and write both as JSON.

    \b
    Example:
      python -m scripts.gpu_train --px 1024
    """
    try:
        size, device = check(tiny)
    except UserError as error:
        print(f"gpu_train: {error}", file=sys.stderr)
        sys.exit(2)
    pictures = [int(side) for side in sides.split(",")] if sides else [size.sides_px[-1], size.sides_px[0]]
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": gpu, "model": size.name, "machine": machine_record(0.0)}
    record |= {"settings": SETTINGS, "timed_steps": steps, "cases": []}
    with tempfile.TemporaryDirectory() as name:
        family = write_model(Path(name) / "model", size)
        for px in pictures:
            case: dict[str, Any] = {"px": px, "batch": batch_size, "arms": {}}
            if gpu:  # as training does for its largest size; the script gets the same
                case["attention"] = choose_kernel(px, family, device)
            record["cases"].append(case)
            for title, make in makers(family, size, px, batch_size, device, Path(name)).items():
                case["arms"][title] = timed(make, steps, device)
                write(out, record)  # a lease that ends takes no finished arm with it
    click.echo(table(record))


if __name__ == "__main__":
    bench()
