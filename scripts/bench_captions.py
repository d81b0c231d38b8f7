"""`python -m scripts.bench_captions`: photos a second of LLaVA-1.5-7B with random weights, one and eight at a time, in bf16 and in 4 bits.

It goes the way of a user's captions, `captioning.vision`, from files on the disk; only the weights come from elsewhere. Each caption is made as long as one may
be, for random weights never come to an end: a true one is shorter, so the figures are a lower bound.
"""

import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from captioning.styles import prompt_of
from captioning.vision import NEW_TOKENS, VisionCaptioner
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, compute_device
from lorabooth.machine import installed_version
from scripts.bench_startup import machine_record
from scripts.gpu_check import forget, memory, seconds_of, write
from scripts.random_llava import SEVEN_B, TINY, LlavaSize, write_llava

BATCHES = (1, 8)
PRECISIONS = ("bf16", "nf4")
LIBRARIES = ("transformers", "accelerate", "bitsandbytes")


def write_photos(folder: Path, count: int) -> list[Path]:
    """Upright photos of 768 x 1024 px, of random numbers."""
    rng, files = np.random.default_rng(0), [folder / f"{i:05d}.png" for i in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)).resize((768, 1024)).save(file)
    return files


def time_precision(model: Path, photos: list[Path], precision: str, rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each batch size: seconds of a batch, photos and new tokens a second, peak memory."""
    forget(device)
    captioner = VisionCaptioner(str(model), prompt_of(TrainConfig(trigger_word="TOK")), precision)
    load_seconds = seconds_of(lambda: captioner.loaded, device)
    captioner.loaded.model.generation_config.min_new_tokens = NEW_TOKENS
    for batch in BATCHES:
        captioner.caption(photos[:batch])  # warm-up
        forget(device)
        times = [seconds_of(lambda n=batch: captioner.caption(photos[:n]), device) for _ in range(rounds)]  # type: ignore[misc]
        seconds, deciles = median(times), quantiles(times, n=10, method="inclusive")
        figures = {"seconds": seconds, "p10_seconds": deciles[0], "p90_seconds": deciles[-1], "load_seconds": load_seconds}
        figures |= {"photos_per_second": batch / seconds, "new_tokens_per_second": batch * NEW_TOKENS / seconds}
        yield {"precision": precision, "batch": batch} | figures | memory(device)


def measure(size: LlavaSize, device: torch.device, rounds: int, out: Path) -> dict[str, Any]:
    """Both precisions, each at every batch size; each row is written as soon as it is there, and what fails is one that says so."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": gpu, "machine": machine_record(os.getloadavg()[0])}
    record["machine"]["versions"] |= {name: installed_version(name) for name in LIBRARIES}
    record |= {"model": size.name, "new_tokens": NEW_TOKENS, "timed_batches": rounds, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), max(BATCHES))
        model = write_llava(Path(folder) / "model", size, device, base_dtype(device))
        for precision in tqdm(PRECISIONS, desc=size.name):
            try:
                for row in time_precision(model, photos, precision, rounds, device):
                    record["rows"].append(row)
                    write(out, record)
            except Exception as error:
                record["rows"].append({"precision": precision, "failed": f"{type(error).__name__}: {error}"})
    write(out, record)
    return record


def table(record: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"{record['model']} on {record['gpu'] or 'the CPU'}; {record['new_tokens']} new tokens a photo", ""]
    lines += ["| precision | photos at once | photos a second | seconds a batch (p10-p90) | loading, s | peak allocated, GB |", "|---|---|---|---|---|---|"]
    for r in record["rows"]:
        if "failed" in r:
            lines.append(f"| {r['precision']} | {r['failed']} | | | | |")
            continue
        spread = f"{r['seconds']:.2f} ({r['p10_seconds']:.2f}-{r['p90_seconds']:.2f})"
        lines.append(
            f"| {r['precision']} | {r['batch']} | {r['photos_per_second']:.2f} | {spread} | {r['load_seconds']:.1f} | {r.get('peak_allocated_gb', '')} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/captions.json"), show_default=True, help="Where the figures go.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2), help="Timed batches of each size, after one to warm up.")
@click.option("--tiny", is_flag=True, help="A tiny model on any device: tries this script, measures nothing.")
def bench(out: Path, rounds: int, tiny: bool) -> None:
    """Time captions by a LLaVA of random weights and write the figures as JSON.

    \b
    Example:
      TMPDIR=/dev/shm python -m scripts.bench_captions
    """
    if not tiny and not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA GPU, and a LLaVA of the true size needs one (--tiny tries this script anywhere)")
    record = measure(TINY if tiny else SEVEN_B, compute_device(), rounds, out)
    click.echo(table(record))


if __name__ == "__main__":
    bench()
