"""`python -m scripts.gpu_check`: time training and generation on a FLUX.1-dev of the true size with random weights.

Nothing is downloaded: speed and memory depend on the shapes, not on what the weights know. It says nothing of quality.
The step is `train.fit`'s own and the picture is made by `lorabooth.sampling`; only the weights come from elsewhere.
Every figure is written as soon as it is there, and what fails is a row that says so: a lease that ends, or one case, takes nothing with it.
"""

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import diffusers
import torch
import torch._dynamo
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from infer.settings import Settings
from lorabooth import sampling
from lorabooth.attention import choose_kernel
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, check_memory, compute_device
from lorabooth.errors import UserError, out_of_memory
from lorabooth.families.flux1 import Flux1
from lorabooth.machine import memory_bytes, pinnable_bytes
from lorabooth.photos import Manifest, Photo
from lorabooth.quantized import QuantizedLinear, wide
from lorabooth.runs import RunDir
from lorabooth.sizes import Estimate
from lorabooth.speed import assumed
from scripts.bench_generate import COMPILED_ARMS, CONTEXT_BYTES, CPU_ARMS, GPU_ARMS, STEPS, Arm, Bench, in_turns, one_by_one, plain_swaps, seconds_of, swaps
from scripts.bench_generate import table as generating_table
from scripts.random_flux import DEV, TINY, Size, random_conditioning, write_model
from train import fit
from train.compiled import compile_blocks
from train.data import CLASS_SUFFIX, EMPTY, TRIGGER_ONLY, items, stem, text_name
from train.plan import MemoryPlan, choose, wanted
from train.planning import plans_for, shapes_of

WARM_UP_STEPS = 5
PHOTO = Photo("00001.png", "random numbers", 1024, 1024, "", None)
UPRIGHT = Photo("00001.png", "random numbers", 896, 1152, "", None)
"""As phones make them; attention's kernels get tokens that fill no whole tiles."""


@dataclass(frozen=True)
class Case:
    """One training to time: settings of the recipe, on the whole GPU or on as much of it as a card of `card_gib` has."""

    part: str
    px: int
    settings: dict[str, Any] = field(default_factory=dict)
    card_gib: int | None = None
    photo: Photo = PHOTO

    @property
    def name(self) -> str:
        """What to call it in a table."""
        card = f"{self.card_gib} GB card: " if self.card_gib else ""
        shape = "upright, " if self.photo is UPRIGHT else ""
        eager = ", not compiled" if self.settings.get("compile_blocks") is False else ""
        optimizer = f", {self.settings['optimizer']}" if "optimizer" in self.settings else ""
        return f"{card}{shape}{self.px} px, batch {self.settings.get('batch_size', 1)}{eager}{optimizer}"


PARTS = ("table", "plans", "cards")
PLANS: list[dict[str, Any]] = [
    {"precision": "fp8", "gradient_checkpointing": "none"},
    {"precision": "bf16", "gradient_checkpointing": "all"},
    {"precision": "int8", "gradient_checkpointing": "none"},
    {"precision": "bf16", "gradient_checkpointing": "none", "precompute_modulation": True},
    {"precision": "int8", "blocks_to_swap": 30},
    {"precision": "nf4", "gradient_checkpointing": "none"},
    {"precision": "bf16", "blocks_to_swap": 57, "precompute_modulation": True},
    {"precision": "bf16", "gradient_checkpointing": "none"},
]


def cases(part: str, size: Size) -> list[Case]:
    """What a part times, what says most first: every size and batch with the automatic plan; each way to save memory at the largest size; small cards."""
    if part == "table":
        kinds: tuple[dict[str, Any], ...] = ({}, {"compile_blocks": False})
        sides = (size.sides_px[-1], *size.sides_px[:-1])
        found = [Case(part, px, {"batch_size": batch} | kind) for kind in kinds for batch in (1, 4) for px in sides]
        others = Case(part, sides[0], {"batch_size": 1}, photo=UPRIGHT), Case(part, sides[1], {"batch_size": 1, "optimizer": "adamw"})
        return [*found[:2], *others, *found[2:]]
    if part == "plans":
        return [Case(part, size.sides_px[-1], plan) for plan in PLANS]
    return [Case(part, px, {}, card) for px in reversed(size.sides_px) for card in (24, 12, 16, 8)]


def write_run(folder: Path, family: Flux1, size: Size, dtype: torch.dtype, case: Case) -> RunDir:
    """A run that has been encoded: one photo, of random latents and random conditioning."""
    config = TrainConfig.model_validate({"trigger_word": "TOK", "model": family.model, "resolution": case.px, "preview_every": 0} | case.settings)
    run, manifest = RunDir.create(folder, config), Manifest((case.photo,), ())
    (folder / "manifest.jsonl").write_text(manifest.to_jsonl(), encoding="utf-8")
    run.cache.mkdir()
    for item in items(manifest, config):
        save_file({"latents": sampling.noise(0, item.bucket.width_px, item.bucket.height_px)[0]}, run.cache / item.latents_name)
    for name in (stem(PHOTO), stem(PHOTO) + CLASS_SUFFIX, TRIGGER_ONLY, EMPTY):
        text = random_conditioning(size, dtype)
        save_file({"embeds": text.embeds[0], "pooled": text.pooled[0]}, run.cache / text_name(name))
    return run


def planned(config: TrainConfig, family: Flux1, device: torch.device, card_gib: int | None) -> Estimate[MemoryPlan]:
    """The plan that training would take, on this GPU or on a smaller card."""
    if card_gib is None:
        return plans_for(config, family, device)[0]
    gpu_bytes = card_gib * 2**30 - CONTEXT_BYTES
    return choose(shapes_of(config, family), config, assumed(gpu_bytes), gpu_bytes, pinnable_bytes())[0]


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


def failure(error: Exception) -> dict[str, Any]:
    """What a row says in place of figures."""
    return {"out_of_memory": True} if out_of_memory(error) else {"failed": f"{type(error).__name__}: {error}"}


def forget(device: torch.device) -> None:
    """Free what nothing holds any more, and let the peaks start anew."""
    torch._dynamo.reset()  # what one case compiled must neither help nor hinder the next
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_case(case: Case, folder: Path, family: Flux1, size: Size, accelerator: Accelerator, steps: int, rate: float) -> dict[str, Any]:
    """Seconds of single optimiser steps, and the memory they took beside what was expected."""
    device = accelerator.device
    run = write_run(folder, family, size, base_dtype(device), case)
    result: dict[str, Any] = {"what": "train", "part": case.part, "name": case.name, "px": case.px, "card_gib": case.card_gib}
    try:
        expected = planned(run.config, family, device, case.card_gib)
    except UserError as error:
        return result | {"refused": str(error)}
    result |= {"plan": str(expected.plan), "estimate_gb": expected.bytes / 1e9, "estimate_seconds": expected.seconds}
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if case.card_gib and total:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.card_gib * 2**30 - CONTEXT_BYTES) / total))
    try:
        forget(device)
        timed = step_times(run, family, accelerator, expected.plan, steps)
        assert all(map(math.isfinite, timed.losses)), f"the loss of {case.name} is not finite: {timed.losses}"
        deciles = quantiles(timed.singly, n=10, method="inclusive")
        result |= speed(median(timed.singly), run.config.batch_size * size.step_tflop(case.px), rate)
        result |= {"p10_seconds": deciles[0], "p90_seconds": deciles[-1], "seconds_in_a_row": timed.in_a_row, "compile_seconds": timed.compiling}
        return result | memory(device)
    except Exception as error:  # a kernel that fails, a loss that is not finite: the other cases say something all the same
        return result | failure(error) | memory(device)
    finally:
        accelerator.free_memory()  # it keeps what it prepared: a second transformer in the next figure
        forget(device)
        if total:
            torch.cuda.set_per_process_memory_fraction(1.0)


@dataclass(frozen=True)
class Timed:
    """Seconds of steps one by one, after the warm-up; of one where the host runs ahead as it does in training; of compiling; and all losses."""

    singly: list[float]
    in_a_row: float
    compiling: float
    losses: list[float]


def step_times(run: RunDir, family: Flux1, accelerator: Accelerator, plan: MemoryPlan, steps: int) -> Timed:
    """Time training's own step."""
    trainer, device, compiling = fit.start(run, run.config, family, accelerator, plan), accelerator.device, 0.0
    if wanted(run.config.compile_blocks, plan, device, run.config.steps):
        compiling = seconds_of(lambda: compile_blocks(trainer), device)
    losses: list[torch.Tensor] = []

    def take(count: int) -> None:
        losses.extend(fit.train_step(trainer)[0] for _ in range(count))

    singly = [seconds_of(lambda: take(1), device) for _ in range(WARM_UP_STEPS + steps)]
    in_a_row = seconds_of(lambda: take(steps), device) / steps
    return Timed(singly[WARM_UP_STEPS:], in_a_row, compiling, torch.stack(losses).tolist())


def products(side: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of one frozen linear [side, side] of as many tokens in each precision, forward and backward; in fp8 also a backward in bf16, from the same
    weight made wide, which reads it as it lies."""
    found = {}
    linear = nn.Linear(side, side, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for precision in ("bf16", "int8", "fp8"):
        layer = linear if precision == "bf16" else QuantizedLinear(linear, precision)
        y = layer(x)
        ways: dict[str, Callable[[], Any]] = {"forward": partial(layer, x), "backward": partial(torch.autograd.grad, y, x, gradient, retain_graph=True)}
        if isinstance(layer, QuantizedLinear):
            ways["backward in bf16"] = lambda layer=layer: gradient @ wide(layer.weight, layer.scale, gradient.dtype)
        found[precision] = {name: 1000 * median([seconds_of(way, device) for _ in range(15)][5:]) for name, way in ways.items()}
    return found


def has_8bit_optimizers(device: torch.device) -> bool:
    """Whether bitsandbytes, training's default on a GPU, takes a step on this one."""
    weights = torch.zeros(1 << 16, device=device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    try:
        from bitsandbytes.optim import AdamW8bit

        AdamW8bit([weights]).step()
    except Exception:  # not installed, or without a library for this CUDA
        return False
    return True


def time_generating(family: Flux1, size: Size, device: torch.device, folder: Path, rounds: int, end: float) -> Iterator[dict[str, Any]]:
    """Seconds of a picture and milliseconds between two LoRAs, ours beside diffusers' pipeline: all that is there, whenever there is more.

    end: by the monotonic clock; nothing is begun after it.
    """
    bench = Bench(family, device, random_conditioning(size, base_dtype(device)), folder, STEPS if device.type == "cuda" else 2)
    bench.write_loras()
    found: dict[str, Any] = {"pictures": [], "swaps": {}}
    eager, compiled = {"merged": Settings(precision="bf16")}, {"fast, merged": Settings(fast=True), "fast, beside the weights": Settings(fast=True, mixed=True)}
    if device.type == "cpu":
        found["pictures"], eager, compiled = in_turns(bench, CPU_ARMS, 1), {"merged": Settings()}, {"beside the weights": Settings(mixed=True)}

    def drawn(arm: Arm) -> None:
        found["pictures"] += one_by_one(bench, (arm,), rounds)

    def swapped(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        forget(device)
        try:
            found["swaps"][name] = measure()
        except Exception as error:  # out of memory too: the others say something all the same
            found["swaps"][name] = {"failed": f"{type(error).__name__}: {error}"}

    def of(arms: tuple[Arm, ...]) -> list[tuple[str, Callable[[], None]]]:
        return [(arm.name, partial(drawn, arm)) for arm in arms if device.type != "cpu"]

    def between(kinds: dict[str, Settings]) -> list[tuple[str, Callable[[], None]]]:
        return [(name, partial(swapped, name, partial(swaps, bench, settings))) for name, settings in kinds.items()]

    plain = [("FluxPipeline", partial(swapped, "FluxPipeline", partial(plain_swaps, bench)))]
    for name, measure in [*of(GPU_ARMS), *plain, *between(eager), *of(COMPILED_ARMS), *between(compiled)]:  # what says most for its time first
        if time.monotonic() > end:
            found.setdefault("left_out", []).append(name)
            continue
        measure()
        yield found
    yield found


def speed(seconds: float, tflop: float, rate: float) -> dict[str, float]:
    """A time, and what it means. MFU: the model's operations, without those of recomputing, over what plain products reach."""
    return {"seconds": seconds, "tflop": tflop, "tflop_per_second": tflop / seconds, "mfu": tflop / seconds / rate}


def check(what: str, steps: int, size: Size, device: torch.device, out: Path, minutes: float) -> dict[str, Any]:
    """Do it, and write down what is there after each figure; nothing is begun after so many minutes."""
    end = time.monotonic() + 60 * minutes
    accelerator = Accelerator(cpu=device.type == "cpu")
    rate = gemm_rate(size.gemm, device, base_dtype(device))
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": gpu, "model": size.name, "versions": versions}
    record |= {"timed_steps": steps, "gemm_tflop_per_second": rate, "host_memory_bytes": memory_bytes(), "cudnn": torch.backends.cudnn.version(), "rows": []}
    settings: dict[str, Any] = {} if device.type == "cpu" or has_8bit_optimizers(device) else {"optimizer": "adamw"}
    with tempfile.TemporaryDirectory() as folder:
        family = write_model(Path(folder) / "model", size)
        if device.type == "cuda":
            largest = TrainConfig(trigger_word="TOK", model=family.model, resolution=str(size.sides_px[-1]))
            record["attention"] = choose_kernel(max(largest.resolutions_px), family, device)
            try:
                record["products_ms"] = products(size.gemm // 2, device)
            except Exception as error:  # the trainings say something all the same
                record["products_ms"] = failure(error)
        write(out, record)
        parts = PARTS if what in ("train", "all") else tuple(part for part in PARTS if part == what)
        turns = zip_longest(*(cases(part, size) for part in parts))  # some of each part, however early the end comes
        every, lost = [replace(case, settings=settings | case.settings) for turn in turns for case in turn if case], False
        for i, case in enumerate(tqdm(every, desc="trainings", disable=not parts)):
            if lost or time.monotonic() > end:
                record["left_out"] = [*record.get("left_out", ()), f"{case.part}: {case.name} {case.settings}"]
                continue
            try:
                row = time_case(case, Path(folder) / f"run{i}", family, size, accelerator, steps, rate)
            except Exception as error:  # after some errors a GPU answers this process nothing any more
                row, lost = {"what": "train", "part": case.part, "name": case.name, **failure(error)}, True
            record["rows"].append(row)
            write(out, record)
        if what in ("generate", "all") and not lost:
            for found in time_generating(family, size, device, Path(folder), min(steps, 3), end):
                write(out, record | {"generating": found})
            record["generating"] = found
    write(out, record)
    return record


def write(out: Path, record: dict[str, Any]) -> None:
    """The figures so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"{record['model']} on {record['gpu'] or 'the CPU'}; GEMM {record['gemm_tflop_per_second']:.3g} TFLOP/s", ""]
    lines += [
        "| | plan | seconds | p10-p90 | in a row | TFLOP/s | MFU | compiling, s | peak allocated / reserved, GB | estimate, GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        spread = f"{r['p10_seconds']:.3f}-{r['p90_seconds']:.3f}" if "p10_seconds" in r else ""
        peaks = f"{r['peak_allocated_gb']} / {r['peak_reserved_gb']}" if "peak_allocated_gb" in r else ""
        timed = " | | | | | "
        if "seconds" in r:
            timed = f"{r['seconds']:.3f} | {spread} | {r['seconds_in_a_row']:.3f} | {r['tflop_per_second']:.3g} | {r['mfu']:.1%} | {r['compile_seconds']:.0f}"
        wrong = ": out of memory" if "out_of_memory" in r else f": {r['failed']}" if "failed" in r else ""
        plan = f"{r.get('plan') or r.get('refused', '')}{wrong}"
        expected = f"{r['estimate_gb']:.1f}" if "estimate_gb" in r else ""
        lines.append(f"| {r['name']} | {plan} | {timed} | {peaks} | {expected} |")
    if "generating" in record:
        lines += ["", generating_table(record["generating"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_check", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("train", *PARTS, "generate", "all"), default="all", help="train is table, plans and cards")
    parser.add_argument(
        "--steps", type=int, default=20, help=f"timed training steps of each training, 2 or more, after {WARM_UP_STEPS} to warm up [default: 20]"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="[default: benchmarks/results/gpu.json]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many [default: no end]")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on any device: tries this script, measures nothing")
    a = parser.parse_args(arguments)
    try:
        if a.steps < 2:
            raise UserError(f"--steps is {a.steps}; it must be 2 or more")
        if not a.tiny and not torch.cuda.is_available():
            raise UserError("torch finds no CUDA GPU, and a FLUX.1-dev of the true size needs one (--tiny tries this script anywhere)")
        if not a.tiny:
            check_memory(28_000_000_000, "FLUX.1-dev in bf16", "use a GPU with at least 32 GB")
        record = check(a.what, a.steps, TINY if a.tiny else DEV, compute_device(), a.out, a.minutes)
    except UserError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
