"""Pictures and LoRAs, ours beside diffusers' FluxPipeline: `python -m scripts.bench_generate`.

On the CPU with the mini model the arms take turns, so that what else the machine does meets all of them. On a GPU (`python -m scripts.gpu_check
generate`) they run one after the other on a FLUX.1-dev of the true size with random weights, which says nothing of quality. Prompts are encoded
ahead in every arm. A swap is all that it takes from one LoRA on the model to another; ours was read before, diffusers' loader reads the file each time.
"""

import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from tqdm import tqdm

from infer.engine import Engine, Piece, plans
from infer.loras import LoraChoice
from infer.request import Request
from infer.settings import Settings
from lorabooth import hub
from lorabooth.device import base_dtype
from lorabooth.families import load_family
from lorabooth.families.flux1 import TARGETS, Conditioning, Flux1
from lorabooth.layout import sizes_of
from lorabooth.lora import LoraSpec
from lorabooth.lora_file import LoraFile
from scripts.bench_startup import machine_record

STEPS, GUIDANCE, SEED = 28, 3.5, 7
PROMPT = "a person in a red hoodie, smiling"
CONTEXT_BYTES = 0.6e9
"""What CUDA itself holds of a card before torch asks for anything."""
RANKS = (4, 8, 16, 32, 64)
SWAPS = 20


@dataclass
class Bench:
    """What all arms share: a base, a prompt that is encoded already, LoRAs of several ranks."""

    family: Flux1
    device: torch.device
    conditioning: Conditioning
    folder: Path
    steps: int = STEPS
    loras: list[LoraChoice] = field(default_factory=list)

    @property
    def px(self) -> int:
        """The side of the pictures."""
        return self.family.native_px

    def write_loras(self) -> None:
        """LoRAs of random numbers on attention and feed-forward, one of each rank."""
        transformer, dtype = self.family.empty_transformer(), base_dtype(self.device)
        sizes, generator = sizes_of(transformer), torch.Generator().manual_seed(0)
        names = LoraSpec(4, 4, TARGETS["attention+ff"]).module_names(transformer)
        for rank in RANKS:
            state = {}
            for name in names:
                outputs, inputs = sizes[name]
                state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype) * inputs**-0.5
                state[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype) * 0.01
            path = self.folder / f"rank{rank}.safetensors"
            save_file(state, path)
            self.loras.append(LoraChoice(LoraFile.read(path), 1.0))

    def engine(self, settings: Settings, gpu_bytes: float | None = None) -> Engine:
        """An engine of ours that knows the prompt."""
        plan = plans(self.family, settings, self.device, gpu_bytes)[0].plan if gpu_bytes else None
        engine = Engine(self.family, settings, plan)
        engine.base.prompts._known[PROMPT, ()] = self.conditioning  # random bases have no text encoders
        return engine

    def request(self, steps: int | None = None) -> Request:
        """One picture of native size."""
        return Request(PROMPT, self.px, self.px, SEED, 1, steps or self.steps, GUIDANCE)

    def pipeline(self) -> FluxPipeline:
        """diffusers' own, around the same parts."""
        dtype, schedule = base_dtype(self.device), hub.component_config(self.family.model, "scheduler", "scheduler_config.json")
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(schedule), vae=self.family.vae(self.device, dtype), text_encoder=None, tokenizer=None,
            text_encoder_2=None, tokenizer_2=None, transformer=self.family.transformer(self.device, dtype),
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: FluxPipeline) -> Any:
        """A picture by the pipeline."""
        text = self.conditioning.to(self.device, base_dtype(self.device))
        return pipe(
            prompt_embeds=text.embeds, pooled_prompt_embeds=text.pooled, width=self.px, height=self.px, num_inference_steps=self.steps,
            guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED),
        ).images  # fmt: skip


Make = Callable[[], Any]


@dataclass(frozen=True)
class Arm:
    """A way to make pictures: `build` loads it and gives the function that makes `pictures` of them."""

    name: str
    build: Callable[[Bench], Make]
    pictures: int = 1


def ours(name: str, settings: Settings, ranks: tuple[int | None, ...] = (None,), card_gib: int | None = None) -> Arm:
    """Our engine; for each picture of a batch the rank of its LoRA, or none."""

    def build(bench: Bench) -> Make:
        engine = bench.engine(settings, card_gib * 2**30 - CONTEXT_BYTES if card_gib else None)
        chosen = [() if rank is None else (bench.loras[RANKS.index(rank)],) for rank in ranks]
        pieces = [Piece(bench.request(), SEED + i, loras) for i, loras in enumerate(chosen)]
        return lambda: engine.together(pieces)

    return Arm(name, build, len(ranks))


def plain(name: str, lora: bool = False, compiled: bool = False) -> Arm:
    """diffusers' pipeline, with a LoRA by its own loader, and compiled as its documentation says."""

    def build(bench: Bench) -> Make:
        pipe = bench.pipeline()
        if lora:
            pipe.load_lora_weights(str(bench.loras[RANKS.index(16)].file.path))
        if compiled:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        return lambda: bench.draw(pipe)

    return Arm(name, build)


CPU_ARMS = (
    plain("FluxPipeline"),
    plain("FluxPipeline, load_lora_weights", lora=True),
    ours("lorabooth", Settings()),
    ours("lorabooth, LoRA merged", Settings(), (16,)),
    ours("lorabooth, LoRA beside the weights", Settings(mixed=True), (16,)),
    ours("lorabooth, batch of 4 LoRAs", Settings(mixed=True, batch=4), (4, 8, 16, 32)),
    ours("lorabooth, cache balanced", Settings(cache="balanced")),
    ours("lorabooth, cache max", Settings(cache="max")),
)
GPU_ARMS = (
    plain("FluxPipeline"),
    ours("lorabooth bf16", Settings(precision="bf16")),
    ours("lorabooth bf16, LoRA merged", Settings(precision="bf16"), (16,)),
    plain("FluxPipeline, load_lora_weights", lora=True),
    ours("lorabooth bf16, LoRA beside the weights", Settings(precision="bf16", mixed=True), (16,)),
    ours("lorabooth bf16, batch of 4 LoRAs", Settings(precision="bf16", mixed=True, batch=4), (4, 8, 16, 32)),
    ours("24 GB card", Settings(), (16,), 24),
    ours("16 GB card", Settings(), (16,), 16),
    ours("12 GB card", Settings(), (16,), 12),
)
COMPILED_ARMS = (
    ours("lorabooth fast, LoRA merged", Settings(fast=True), (16,)),
    plain("FluxPipeline, compiled", compiled=True),
    ours("lorabooth bf16 compiled, LoRA merged", Settings(precision="bf16", fast=True), (16,)),
    plain("FluxPipeline, compiled, load_lora_weights", lora=True, compiled=True),
    ours("lorabooth fast, cache balanced", Settings(fast=True, cache="balanced")),
    ours("lorabooth fast, cache max", Settings(fast=True, cache="max")),
)


def in_turns(bench: Bench, arms: tuple[Arm, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each arm's pictures, the arms taking turns, after one to warm up."""
    made = [arm.build(bench) for arm in arms]
    times: list[list[float]] = [[] for _ in arms]
    for i in tqdm(range(rounds + 1), desc="pictures", unit="round"):
        for make, taken in zip(made, times, strict=True):
            seconds = seconds_of(make, bench.device)
            if i:
                taken.append(seconds)
    return [_row(arm, taken) for arm, taken in zip(arms, times, strict=True)]


def one_by_one(bench: Bench, arms: tuple[Arm, ...], rounds: int) -> list[dict[str, Any]]:
    """The same with one arm in memory at a time, and its peak; on a GPU."""
    rows = []
    for arm in tqdm(arms, desc="ways to make a picture", unit="way"):
        _forget()
        card = next((int(word) for word in arm.name.split() if word.isdigit()), None) if "card" in arm.name else None
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card * 2**30 - CONTEXT_BYTES) / total) if card else 1.0)
        try:
            make = arm.build(bench)
            first = seconds_of(make, bench.device)
            rows.append(_row(arm, [seconds_of(make, bench.device) for _ in range(rounds)]) | {"first_seconds": first})
        except Exception as error:  # the other arms say something all the same
            rows.append({"arm": arm.name, "failed": (str(error).splitlines() or [type(error).__name__])[0]})
        rows[-1] |= {"peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9, "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
        make = None
    torch.cuda.set_per_process_memory_fraction(1.0)
    _forget()
    return rows


def swaps(bench: Bench, settings: Settings) -> dict[str, Any]:
    """Milliseconds of changes between LoRAs of several ranks, and how much was compiled again by the pictures after them."""
    engine, draw, times = bench.engine(settings), random.Random(0), []
    choices = [(bench.loras[i],) for i in range(len(RANKS))]
    for loras in (*choices, ()):  # read, and what is untouched is put by
        engine.together([Piece(bench.request(1), SEED, loras)])
    before = counters["stats"]["unique_graphs"]
    place = 0
    for _ in range(SWAPS):
        place = draw.choice([i for i in range(len(choices)) if i != place])
        weighted, _ = engine.adapters.weighted(choices[place])
        times.append(1000 * seconds_of(lambda weighted=weighted: engine.base.transformer([weighted]), bench.device))
    for loras in choices if settings.fast else ():
        engine.together([Piece(bench.request(1), SEED, loras)])
    return {"median_ms": median(times), "largest_ms": max(times), "compiled_again": counters["stats"]["unique_graphs"] - before}


def plain_swaps(bench: Bench) -> dict[str, Any]:
    """The same by diffusers' loader: the old adapter off, the new one on."""
    pipe, draw, times, place = bench.pipeline(), random.Random(0), [], 0
    pipe.load_lora_weights(str(bench.loras[0].file.path))

    def swap(path: Path) -> None:
        pipe.unload_lora_weights()
        pipe.load_lora_weights(str(path))

    for _ in range(SWAPS):
        place = draw.choice([i for i in range(len(RANKS)) if i != place])
        times.append(1000 * seconds_of(lambda place=place: swap(bench.loras[place].file.path), bench.device))
    return {"median_ms": median(times), "largest_ms": max(times)}


def _row(arm: Arm, times: list[float]) -> dict[str, Any]:
    return {"arm": arm.name, "pictures": arm.pictures, "seconds_a_picture": median(times) / arm.pictures, "spread": [min(times), max(times)]}


def seconds_of(work: Make, device: torch.device) -> float:
    """Wall seconds of `work`, until the GPU has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _forget() -> None:
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def table(record: dict[str, Any]) -> str:
    """The measurements as Markdown, each beside the plain pipeline of the same run."""
    base = next((row["seconds_a_picture"] for row in record["pictures"] if row["arm"] == "FluxPipeline" and "failed" not in row), float("nan"))
    peaks = any("peak_allocated_gb" in row for row in record["pictures"])
    lines = ["| | seconds a picture | over FluxPipeline |" + " peak GB |" * peaks, "|---|---|---|" + "---|" * peaks]
    for row in record["pictures"]:
        timed = f"{row['seconds_a_picture']:.3f} | {row['seconds_a_picture'] / base:.2f}" if "failed" not in row else f"{row['failed']} | "
        lines.append(f"| {row['arm']} | {timed} |" + (f" {row['peak_allocated_gb']:.1f} |" if peaks else ""))
    lines += ["", "| a LoRA for another | median, ms | largest, ms | compiled again |", "|---|---|---|---|"]
    for name, row in record["swaps"].items():
        timed = f"{row['median_ms']:.1f} | {row['largest_ms']:.1f} | {row.get('compiled_again', '')}" if "failed" not in row else f"{row['failed']} | | "
        lines.append(f"| {name} | {timed} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/generate.json"), show_default=True, help="Where the figures go.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=1), help="Timed pictures of each arm.")
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(min=1), help="Denoising steps of a picture.")
def bench(out: Path, rounds: int, steps: int) -> None:
    """Time pictures and changes of LoRAs on the mini model beside diffusers' pipeline, and write both as JSON.

    \b
    Example:
      python -m scripts.bench_generate --rounds 10
    """
    load, cpu, family = os.getloadavg()[0], torch.device("cpu"), load_family("mini")
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "rounds": rounds, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        conditioning = family.encode_prompts(family.text_encoders(cpu, torch.float32), [PROMPT])
        shared = Bench(family, cpu, conditioning, Path(folder), steps)
        shared.write_loras()
        record["pictures"] = in_turns(shared, CPU_ARMS, rounds)
        record["swaps"] = {"FluxPipeline": plain_swaps(shared), "merged": swaps(shared, Settings()), "beside the weights": swaps(shared, Settings(mixed=True))}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(table(record))


if __name__ == "__main__":
    bench()
