"""Training beside diffusers' script, on this machine's CPU: `python -m scripts.bench_train`.

Steps: ours, and ours compiled, against three arms of the script (scripts/peer.py): as it is, with photos and captions encoded at each step; with
everything encoded ahead, which it cannot do for captions; and that compiled. Same base, LoRA, optimiser and batch; the arms take turns, and ratios are
of medians. Two bases: FLUX.1-dev's 57 blocks made so narrow that nothing but the host's work for each operator is left, and the mini model.
Besides seconds: the operators of a step, and the bytes that its forward pass keeps for the backward, which is the memory that grows with the picture.
Job: each from a folder of photos to a LoRA file on the mini model, as processes of their own, in turns; `--peer-script` runs the original besides.
"""

import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import click
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from lorabooth.device import base_dtype
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning, Flux1
from lorabooth.mini.people import DEMO_ZIP
from scripts import original
from scripts.bench_generate import seconds_of
from scripts.bench_startup import machine_record
from scripts.gpu_check import Case, write_run
from scripts.peer import CPU, LAST_STEPS, Batch, Encoding, Peer, read_photos
from scripts.random_flux import TINY, Size, random_conditioning, write_model
from train import fit
from train.compiled import compile_blocks

DEEP = replace(TINY, name="57 blocks, 16 wide", transformer=TINY.transformer | {"num_layers": 19, "num_single_layers": 38}, text_tokens=64, sides_px=(128,))
WARM_UP_STEPS = 3
SETTINGS: dict[str, Any] = {"lora_rank": 16, "targets": "attention+ff", "optimizer": "adamw", "caption_dropout_rate": 0.0, "learning_rate": 1e-3}
OURS, OURS_COMPILED = "lorabooth", "lorabooth, compiled"
AS_IT_IS, AHEAD, COMPILED, ORIGINAL = "script as it is", "script, encoded ahead", "script, encoded ahead, compiled", "the original script"


@dataclass(frozen=True)
class Arm:
    """One way to make an optimiser step."""

    name: str
    step: Callable[[], Any]
    model: torch.nn.Module


class Operators(TorchDispatchMode):
    """Counts the operators that reach the device's kernels; views are free and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kept_bytes(model: torch.nn.Module) -> Iterator[Counter[int]]:
    """Bytes that forward passes inside keep for their backward, by the memory they lie in; the model's own weights are not counted."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: Counter[int] = Counter()
    alive = []  # what is freed could give its place to the next

    def keep(t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage()
        if place.data_ptr() not in weights:
            kept[place.data_ptr()] = place.nbytes()
            alive.append(place)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield kept


def our_arm(folder: Path, family: Flux1, size: Size, settings: dict[str, Any], compiled: bool = False, device: torch.device = CPU, px: int = 0) -> Arm:
    """`train.fit.train_step` on a run of random latents, by default of the size's smallest pictures."""
    run = write_run(folder, family, size, base_dtype(device), Case("step", px or size.sides_px[0], settings))
    trainer = fit.start(run, run.config, family, Accelerator(cpu=device.type == "cpu"))
    if compiled:
        compile_blocks(trainer)
    return Arm(OURS_COMPILED if compiled else OURS, lambda: fit.train_step(trainer), trainer.transformer)


def peer_arms(family: Flux1, size: Size, settings: dict[str, Any], photos: Path, compiled: bool) -> list[Arm]:
    """The script's; as it is only where the base has text encoders."""
    batch, side = settings["batch_size"], size.sides_px[0] // 8
    latents, one = torch.randn(batch, 16, side, side, generator=torch.Generator().manual_seed(0)), random_conditioning(size, torch.float32)
    ahead = Batch(latents, Conditioning(one.embeds.repeat(batch, 1, 1), one.pooled.repeat(batch, 1)))
    peers = {}
    if family.model == "mini":
        peers[AS_IT_IS] = Peer(family, settings, Encoding(family, *read_photos(photos, size.sides_px[0]), batch).batch)
    peers[AHEAD] = Peer(family, settings, lambda: ahead)
    if compiled:
        peers[COMPILED] = Peer(family, settings, lambda: ahead, compiled=True)
    return [Arm(name, peer.step, peer.plain) for name, peer in peers.items()]


def mini_size() -> Size:
    """The mini model's shapes."""
    family = load_family("mini")
    return replace(TINY, name="mini", transformer=family.config("transformer"), text_tokens=family.text_tokens, sides_px=(128,))


def compare(arms: list[Arm], steps: int, name: str) -> dict[str, Any]:
    """Seconds, operators and kept MB of each arm's step; the arms take turns, so that what else the machine does meets all."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for i in tqdm(range(WARM_UP_STEPS + steps), desc=name, unit="step of each"):
        for arm in arms:
            seconds = seconds_of(arm.step, CPU)
            if i >= WARM_UP_STEPS:
                times[arm.name].append(seconds)
    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        deciles = quantiles(times[arm.name], n=10, method="inclusive")
        rows[arm.name] = {"median_seconds": median(times[arm.name]), "p10_seconds": deciles[0], "p90_seconds": deciles[-1]}
        if arm.name not in (OURS_COMPILED, COMPILED):  # whose kernels are not torch's operators
            with Operators() as operators:
                arm.step()
            with kept_bytes(arm.model) as kept:
                arm.step()
            rows[arm.name] |= {"operators": sum(operators.counts.values()), "kept_mb": sum(kept.values()) / 1e6}
    seconds = {name: row["median_seconds"] for name, row in rows.items()}
    strongest, best = (min(set(seconds) & set(names), key=lambda name: seconds[name]) for names in ((AS_IT_IS, AHEAD, COMPILED), (OURS, OURS_COMPILED)))
    ratios = {"strongest": strongest, "our_best": best, "over_strongest": seconds[best] / seconds[strongest]}
    ratios |= {"over_as_it_is": seconds[OURS] / seconds[AS_IT_IS]} if AS_IT_IS in seconds else {}
    ratios |= {f"{what}_ratio": rows[OURS][of] / rows[AHEAD][of] for what, of in (("operator", "operators"), ("kept", "kept_mb"))}
    return {"arms": rows, **ratios}


def compare_jobs(photos: Path, folder: Path, steps: int, rounds: int, peer_script: Path | None) -> dict[str, Any]:
    """Wall seconds from photos with captions to a LoRA file, and the mean loss of the last steps, each side `rounds` times, in turns.

    The same work: without previews and preservation, which the script does not have, and without a LoRA on CLIP.
    """
    times, losses = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for i in tqdm(range(rounds), desc="whole job", unit="round"):
        outs = {name: folder / f"{name}-{i}" for name in (OURS, AS_IT_IS, ORIGINAL)}
        common = (str(photos), "--steps", str(steps), "--batch-size", "4", "--learning-rate", str(SETTINGS["learning_rate"]))
        commands = {
            OURS: [
                *(sys.executable, "-m", "lorabooth", "train", *common, "--trigger", "TOK", "--model", "mini", "--out", str(outs[OURS])),
                *("--preview-every", "0", "--preservation-rate", "0", "--train-text-encoder", "false"),
            ],
            AS_IT_IS: [sys.executable, "-m", "scripts.peer", *common, str(outs[AS_IT_IS])],
        }
        if peer_script:
            commands[ORIGINAL] = original.command(peer_script, photos, outs[ORIGINAL], SETTINGS | {"batch_size": 4}, steps)
        for name, command in commands.items():
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | original.ON_THE_CPU)
            times[name].append(time.perf_counter() - start)
            if done.returncode:
                raise click.ClickException(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
            if name == AS_IT_IS:  # prints the mean itself
                losses[name].append(float(done.stdout.split()[-1]))
            else:
                each = step_losses(outs[OURS] / "metrics.jsonl") if name == OURS else [event.value for event in original.losses(outs[ORIGINAL])]
                losses[name].append(mean(each[-LAST_STEPS:]))
    ratios = {name: median(times[OURS]) / median(seconds) for name, seconds in times.items() if name != OURS}
    return {
        "steps": steps,
        "seconds": times,
        "ours_over": ratios,
        f"loss_of_the_last_{LAST_STEPS}": {name: [round(x, 4) for x in found] for name, found in losses.items()},
    }


def step_losses(metrics: Path) -> list[float]:
    """The loss of each step of a run."""
    return [row["loss"] for line in metrics.read_text(encoding="utf-8").splitlines() if "loss" in (row := json.loads(line))]


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| base | arm | median | p10 to p90 | operators | kept | ours over it |", "|---|---|---|---|---|---|---|"]
    for name, base in record["bases"].items():
        ours = base["arms"][OURS]["median_seconds"]
        for arm, row in base["arms"].items():
            spread = f"{row['p10_seconds'] * 1000:.0f} to {row['p90_seconds'] * 1000:.0f} ms"
            counted = f"{row['operators']:,}" if "operators" in row else "-"
            kept = f"{row['kept_mb']:.1f} MB" if "kept_mb" in row else "-"
            lines.append(f"| {name} | {arm} | {row['median_seconds'] * 1000:.0f} ms | {spread} | {counted} | {kept} | {ours / row['median_seconds']:.2f} |")
    if job := record.get("job"):
        for arm, seconds in job["seconds"].items():
            over = median(job["seconds"][OURS]) / median(seconds)
            spread = f"{min(seconds):.0f} to {max(seconds):.0f} s"
            lines.append(f"| mini: zip to LoRA, {job['steps']} steps | {arm} | {median(seconds):.1f} s | {spread} | - | - | {over:.2f} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/train.json"), show_default=True, help="Where the figures go.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=2), help="Timed steps of each arm.")
@click.option("--job-steps", default=120, show_default=True, type=click.IntRange(min=0), help="Steps of the whole job; 0 leaves it out.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="How often the whole job is done by each.")
@click.option("--compiled/--not-compiled", default=True, show_default=True, help="Whether there is an arm with torch.compile, which takes minutes.")
@click.option(
    "--peer-script", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The original train_dreambooth_lora_flux.py, a third side of the job."
)
def bench(out: Path, steps: int, job_steps: int, rounds: int, compiled: bool, peer_script: Path | None) -> None:
    """Time training beside diffusers' script and write both as JSON.

    \b
    Example:
      python -m scripts.bench_train --steps 30
    """
    load = os.getloadavg()[0]
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "timed_steps": steps, "bases": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(DEMO_ZIP) as archive:
            archive.extractall(folder / "photos")
        deep = write_model(folder / "model", DEEP)
        for family, size, batch in ((deep, DEEP, 1), (load_family("mini"), mini_size(), 4)):
            settings = SETTINGS | {"batch_size": batch}
            arms = [our_arm(folder / f"{size.name} {with_it}", family, size, settings, with_it) for with_it in ([False, True] if compiled else [False])]
            arms += peer_arms(family, size, settings, folder / "photos", compiled)
            record["bases"][size.name] = settings | compare(arms, steps, size.name)
            del arms
            gc.collect()
        if job_steps:
            record["job"] = compare_jobs(folder / "photos", folder, job_steps, rounds, peer_script)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(table(record))


if __name__ == "__main__":
    bench()
