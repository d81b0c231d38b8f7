"""A training step beside the one of diffusers' script, on this machine's CPU: `python -m scripts.bench_step`.

The peer is the step of `train_dreambooth_lora_flux.py` (diffusers 0.42) as it runs with cached latents and one prompt encoded ahead: noise
levels by `compute_density_for_timestep_sampling`, looked up in the scheduler's table; autograd, clipping, AdamW; the loss read back at each step.
Its base, LoRA, batch and number of steps are ours. That both have the same loss and gradients is a test (tests/test_train.py). Two bases:
FLUX.1-dev's 57 blocks made so narrow that nothing but the host's work for each operator is left, and the mini model. The arms take turns; the ratio is of
their medians.
"""

import gc
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from lorabooth import hub
from lorabooth.families import load_family
from lorabooth.families.flux1 import Flux1
from lorabooth.lora import LoraSpec
from scripts.bench_generate import seconds_of
from scripts.bench_startup import machine_record
from scripts.gpu_check import Case, write_run
from scripts.random_flux import TINY, Size, random_conditioning, write_model
from train import fit

CPU = torch.device("cpu")
DEEP = replace(TINY, name="57 blocks, 16 wide", transformer=TINY.transformer | {"num_layers": 19, "num_single_layers": 38}, text_tokens=64, sides_px=(128,))
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Arm:
    """One way to make an optimiser step."""

    name: str
    step: Callable[[], Any]


class Operators(TorchDispatchMode):
    """Counts the operators that reach the device's kernels; views are free and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def our_arm(folder: Path, family: Flux1, size: Size, settings: dict[str, Any]) -> Arm:
    """`train.fit.train_step` on a run of random latents."""
    run = write_run(folder, family, size, torch.float32, Case("step", size.sides_px[0], settings))
    trainer = fit.start(run, run.config, family, Accelerator(cpu=True))
    return Arm("lorabooth", lambda: fit.train_step(trainer))


def peer_arm(family: Flux1, size: Size, settings: dict[str, Any]) -> Arm:
    """The script's step, by its documented behaviour."""
    accelerator, scheduler = Accelerator(cpu=True), FlowMatchEulerDiscreteScheduler()
    transformer = family.transformer(CPU, torch.float32)
    parameters = LoraSpec(settings["lora_rank"], settings["lora_rank"], settings["targets"]).attach(transformer, seed=0)
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    transformer, optimizer, rates = accelerator.prepare(transformer, optimizer, rates)
    batch, side = settings["batch_size"], size.sides_px[0] // 8
    latents = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))
    conditioning = random_conditioning(size, torch.float32)

    def step() -> float:
        with accelerator.accumulate(transformer):
            x_0 = latents.repeat(batch, 1, 1, 1).to(torch.float32)
            embeds, pooled = conditioning.embeds.repeat(batch, 1, 1), conditioning.pooled.repeat(batch, 1)
            ids = FluxPipeline._prepare_latent_image_ids(batch, side // 2, side // 2, CPU, torch.float32)
            noise = torch.randn_like(x_0)
            places = (compute_density_for_timestep_sampling("none", batch, 0.0, 1.0, 1.29) * scheduler.config.num_train_timesteps).long()
            timesteps = scheduler.timesteps[places]
            # The script looks each level up in the table by value.
            levels = scheduler.sigmas[[(scheduler.timesteps == t).nonzero().item() for t in timesteps]].view(-1, 1, 1, 1)
            packed = FluxPipeline._pack_latents((1.0 - levels) * x_0 + levels * noise, batch, 16, side, side)
            predicted = transformer(
                hidden_states=packed,
                timestep=timesteps / 1000,
                guidance=torch.tensor([1.0]).expand(batch) if family.uses_guidance else None,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=torch.zeros(embeds.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0]
            predicted = FluxPipeline._unpack_latents(predicted, height=8 * side, width=8 * side, vae_scale_factor=8)
            weighting = compute_loss_weighting_for_sd3("none", levels)
            loss = torch.mean((weighting.float() * (predicted.float() - (noise - x_0).float()) ** 2).reshape(batch, -1), 1).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        return float(loss.detach().item())

    return Arm("diffusers' script", step)


def mini_size() -> Size:
    """The mini model's shapes."""
    family, config = load_family("mini"), hub.component_config("mini", "transformer")
    return replace(TINY, name="mini", transformer=config, text_tokens=family.text_tokens, sides_px=(128,))


def compare(arms: list[Arm], steps: int, name: str) -> dict[str, Any]:
    """Seconds and operators of each arm's step; the arms take turns, so that what else the machine does meets both."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for i in tqdm(range(WARM_UP_STEPS + steps), desc=name, unit="step of each"):
        for arm in arms:
            seconds = seconds_of(arm.step, CPU)
            if i >= WARM_UP_STEPS:
                times[arm.name].append(seconds)
    rows = {}
    for arm in arms:
        with Operators() as operators:
            arm.step()
        deciles = quantiles(times[arm.name], n=10, method="inclusive")
        spread = {"median_seconds": median(times[arm.name]), "p10_seconds": deciles[0], "p90_seconds": deciles[-1]}
        rows[arm.name] = spread | {"operators": sum(operators.counts.values())}
    ours, peer = (rows[arm.name] for arm in arms)
    return {"arms": rows, "time_ratio": ours["median_seconds"] / peer["median_seconds"], "operator_ratio": ours["operators"] / peer["operators"]}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/step.json"), show_default=True, help="Where the figures go.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=2), help="Timed steps of each arm.")
def bench(out: Path, steps: int) -> None:
    """Time a training step beside the one of diffusers' script and write both as JSON.

    \b
    Example:
      python -m scripts.bench_step --steps 30
    """
    load = os.getloadavg()[0]
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_record(load), "timed_steps": steps, "bases": {}}
    with tempfile.TemporaryDirectory() as folder:
        deep = write_model(Path(folder) / "model", DEEP)
        for family, size, batch in ((deep, DEEP, 1), (load_family("mini"), mini_size(), 4)):
            settings = {"batch_size": batch, "lora_rank": 16, "targets": "attention+ff", "optimizer": "adamw", "caption_dropout_rate": 0.0}
            arms = [our_arm(Path(folder) / size.name, family, size, settings), peer_arm(family, size, settings)]
            result = record["bases"][size.name] = settings | compare(arms, steps, size.name)
            del arms
            gc.collect()
            for name, row in result["arms"].items():
                click.echo(f"{size.name:20} {name:18} {row['median_seconds'] * 1000:7.1f} ms ({row['operators']} operators)")
            click.echo(f"{size.name:20} {'ratio':18} {result['time_ratio']:7.3f}    ({result['operator_ratio']:.3f})")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    bench()
