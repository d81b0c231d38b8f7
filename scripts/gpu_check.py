"""`python -m scripts.gpu_check`: time training and generation on a FLUX.1-dev of the true size with random weights.

Nothing is downloaded: speed and memory depend on the shapes, not on what the weights know. It says nothing of quality.
The step is `train.fit`'s own and the picture is made by `lorabooth.sampling`; only the weights come from elsewhere.
"""

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from lorabooth import sampling
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, check_memory
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Flux1
from lorabooth.photos import Manifest, Photo
from lorabooth.runs import RunDir
from scripts.random_flux import DEV, TINY, Size, random_conditioning, write_model
from train import fit
from train.data import EMPTY, TRIGGER_ONLY, Sampler, items, stem, text_name

WARM_UP_STEPS = 5
SAMPLING_STEPS = 28
GUIDANCE = 3.5
PHOTO = Photo("00001.png", "random numbers", 1024, 1024, "", None)


def write_run(folder: Path, model: str, size: Size, dtype: torch.dtype, checkpointing: bool) -> RunDir:
    """A run that has been encoded: one photo at each side, of random latents and random conditioning."""
    config = TrainConfig(trigger_word="TOK", model=model, resolution=",".join(map(str, size.sides_px)), gradient_checkpointing=checkpointing, preview_every=0)
    run, manifest = RunDir.create(folder, config), Manifest((PHOTO,), ())
    (folder / "manifest.jsonl").write_text(manifest.to_jsonl(), encoding="utf-8")
    run.cache.mkdir()
    for item in items(manifest, config):
        save_file({"latents": sampling.noise(0, item.bucket.width_px, item.bucket.height_px)[0]}, run.cache / item.latents_name)
    for name in (stem(PHOTO), TRIGGER_ONLY, EMPTY):
        text = random_conditioning(size, dtype)
        save_file({"embeds": text.embeds[0], "pooled": text.pooled[0]}, run.cache / text_name(name))
    return run


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of `work`, until the GPU has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches on large matrix products of random numbers, in TFLOP/s: the yardstick of the MFU."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(25)]
    return 2 * side**3 / median(times[5:]) / 1e12


def memory(device: torch.device) -> dict[str, float]:
    """The peaks since the last reset, in GB (10**9 bytes)."""
    if device.type != "cuda":
        return {}
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {f"peak_{name}_gb": round(count / 1e9, 2) for name, count in peaks.items()}


def forget(device: torch.device) -> None:
    """Free what nothing holds any more, and let the peaks start anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_training(run: RunDir, family: Flux1, size: Size, accelerator: Accelerator, steps: int, rate: float) -> list[dict[str, Any]]:
    """Seconds of single optimiser steps, of each side apart."""
    trainer, rows = fit.start(run, run.config, family, accelerator), []
    for px in size.sides_px:
        config = run.config.model_copy(update={"resolution": str(px)})
        trainer.sampler = Sampler(items(Manifest.load(run.path), config), config.batch_size, config.seed)
        forget(accelerator.device)
        losses: list[torch.Tensor] = []
        times = [seconds_of(lambda: losses.append(fit.train_step(trainer)[0]), accelerator.device) for _ in range(WARM_UP_STEPS + steps)][WARM_UP_STEPS:]  # noqa: B023 - called at once
        values = torch.stack(losses).tolist()
        assert all(map(math.isfinite, values)), f"the loss at {px} px is not finite: {values}"
        deciles = quantiles(times, n=10, method="inclusive")
        rows.append(row("train", px, median(times), size.step_tflop(px), rate, accelerator.device) | {"p10_seconds": deciles[0], "p90_seconds": deciles[-1]})
    return rows


def time_generating(family: Flux1, size: Size, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """Seconds of one picture: the denoising, and the decoding apart."""
    dtype, px = base_dtype(device), size.sides_px[-1]
    transformer, vae, conditioning, start = (
        family.transformer(device, dtype),
        family.vae(device, dtype),
        random_conditioning(size, dtype),
        sampling.noise(1, px, px),
    )
    forget(device)
    latents: list[torch.Tensor] = []

    def denoise(steps: int) -> None:
        latents.append(sampling.denoise(family, transformer, conditioning, start, steps, GUIDANCE))

    denoise(2)  # warm-up
    sampling.decode(family, vae, latents[0])
    seconds = seconds_of(lambda: denoise(SAMPLING_STEPS), device)
    assert bool(torch.isfinite(latents[-1]).all()), "the latents are not finite"
    decoding = seconds_of(lambda: sampling.decode(family, vae, latents[-1]), device)
    return [row("generate", px, seconds, SAMPLING_STEPS * sum(size.tflop(px)), rate, device) | {"decode_seconds": decoding}]


def row(what: str, px: int, seconds: float, tflop: float, rate: float, device: torch.device) -> dict[str, Any]:
    """One measurement. MFU: the model's operations, without those of recomputing, over what plain products reach."""
    return {"what": what, "px": px, "seconds": seconds, "tflop": tflop, "tflop_per_second": tflop / seconds, "mfu": tflop / seconds / rate} | memory(device)


def check(what: str, steps: int, size: Size, device: torch.device, checkpointing: bool) -> dict[str, Any]:
    """Do it, and return what to write down."""
    accelerator = Accelerator(mixed_precision="bf16" if device.type == "cuda" else "no", cpu=device.type == "cpu")
    rate = gemm_rate(size.gemm, device, base_dtype(device))
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": gpu, "model": size.name, "versions": versions}
    record |= {"gradient_checkpointing": checkpointing, "timed_steps": steps, "gemm_tflop_per_second": rate, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        family = write_model(Path(folder) / "model", size)
        if what in ("train", "all"):
            run = write_run(Path(folder) / "run", family.model, size, base_dtype(device), checkpointing)
            record["rows"] += time_training(run, family, size, accelerator, steps, rate)
            accelerator.free_memory()  # it keeps what it prepared: a second transformer in the next figure
            forget(device)
        if what in ("generate", "all"):
            record["rows"] += time_generating(family, size, device, rate)
    return record


def table(record: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"{record['model']} on {record['gpu'] or 'the CPU'}; GEMM {record['gemm_tflop_per_second']:.3g} TFLOP/s", ""]
    lines += ["| | px | seconds | p10-p90 | decoding, s | TFLOP/s | MFU | peak allocated / reserved, GB |", "|---|---|---|---|---|---|---|---|"]
    for r in record["rows"]:
        spread = f"{r['p10_seconds']:.3f}-{r['p90_seconds']:.3f}" if "p10_seconds" in r else ""
        decoding = f"{r['decode_seconds']:.3f}" if "decode_seconds" in r else ""
        peaks = f"{r['peak_allocated_gb']} / {r['peak_reserved_gb']}" if "peak_allocated_gb" in r else ""
        name = "one training step" if r["what"] == "train" else f"one picture, {SAMPLING_STEPS} steps"
        lines.append(f"| {name} | {r['px']} | {r['seconds']:.3f} | {spread} | {decoding} | {r['tflop_per_second']:.3g} | {r['mfu']:.1%} | {peaks} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("train", "generate", "all"), default="all")
    parser.add_argument("--steps", type=int, default=20, help=f"timed training steps at each size, 2 or more, after {WARM_UP_STEPS} to warm up [default: 20]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="[default: benchmarks/results/gpu.json]")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for GPUs of less than 64 GB")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries this script, measures nothing")
    a = parser.parse_args(arguments)
    try:
        if a.steps < 2:
            raise UserError(f"--steps is {a.steps}; it must be 2 or more")
        if not a.tiny and not torch.cuda.is_available():
            raise UserError("torch finds no CUDA GPU, and a FLUX.1-dev of the true size needs one (--tiny tries this script on the CPU)")
        if not a.tiny:
            check_memory(28_000_000_000, "FLUX.1-dev in bf16", "use a GPU with at least 32 GB")
        record = check(a.what, a.steps, TINY if a.tiny else DEV, torch.device("cpu" if a.tiny else "cuda"), a.gradient_checkpointing)
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
