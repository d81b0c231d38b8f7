"""diffusers' `train_dreambooth_lora_flux.py` (0.42), restated from its documented behaviour: its training step, and its whole job.

The job, from photos with captions to a LoRA file, by `python -m scripts.peer PHOTOS OUT --steps 120`: the script as it is, that is, with a
caption for each photo and without --cache_latents, so that the VAE and both text encoders run at each step. That a step has the
loss and the gradients of ours for the same noise is a test (tests/test_objective.py).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lorabooth.captions import PLACEHOLDER
from lorabooth.device import base_dtype
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning, Flux1
from lorabooth.lora import LoraSpec

CPU = torch.device("cpu")
TRIGGER = "TOK"
LAST_STEPS = 40
"""How many steps at the end of a job its loss is the mean of."""


@dataclass(frozen=True)
class Batch:
    """Latents [B, 16, h, w] as the VAE gives them, scaled, and the encoded captions."""

    latents: Tensor
    conditioning: Conditioning


class Peer:
    """The script's trainer: `batch()` gives what a step trains on, cached or made anew. On a GPU in bf16, as with --mixed_precision bf16."""

    def __init__(self, family: Flux1, settings: dict[str, Any], batch: Callable[[], Batch], compiled: bool = False, device: torch.device = CPU, seed: int = 0):
        self.family, self.batch, self.device, self.dtype = family, batch, device, base_dtype(device)
        # device_placement: everything is on the device already.
        on_gpu = device.type == "cuda"
        self.accelerator = Accelerator(cpu=not on_gpu, device_placement=False, mixed_precision="bf16" if on_gpu else "no")
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.plain = family.transformer(device, self.dtype)
        self.parameters = LoraSpec(settings["lora_rank"], settings["lora_rank"], settings["targets"], init="gaussian").attach(self.plain, seed)
        for p in self.parameters:  # which the script keeps in the base's precision
            p.data = p.data.to(device, self.dtype)
        self.plain.train()
        optimizer = torch.optim.AdamW(self.parameters, lr=settings["learning_rate"], betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        rates = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        self.transformer, self.optimizer, self.rates = self.accelerator.prepare(self.plain, optimizer, rates)
        if compiled and on_gpu:  # 57 blocks compiled as one take minutes of a lease; diffusers compiles the two kinds of them
            self.plain.compile_repeated_blocks()
        elif compiled:
            self.transformer.compile()

    def step(self) -> float:
        """One optimiser step; its loss."""
        with self.accelerator.accumulate(self.transformer):
            batch = self.batch()
            x_0, count = batch.latents, len(batch.latents)
            height, width = x_0.shape[2:]
            ids = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, self.device, self.dtype)
            noise = torch.randn_like(x_0)
            places = (compute_density_for_timestep_sampling("none", count, 0.0, 1.0, 1.29) * self.scheduler.config.num_train_timesteps).long()
            timesteps = self.scheduler.timesteps[places].to(self.device)
            # The script looks each level up in the table by value, and waits for the answer.
            table, sigmas = self.scheduler.timesteps.to(self.device), self.scheduler.sigmas.to(self.device, x_0.dtype)
            levels = sigmas[[(table == t).nonzero().item() for t in timesteps]].view(-1, 1, 1, 1)
            packed = FluxPipeline._pack_latents((1.0 - levels) * x_0 + levels * noise, count, 16, height, width)
            predicted = self.transformer(
                hidden_states=packed,
                timestep=timesteps / 1000,
                guidance=torch.tensor([1.0], device=self.device).expand(count) if self.family.uses_guidance else None,
                pooled_projections=batch.conditioning.pooled,
                encoder_hidden_states=batch.conditioning.embeds,
                txt_ids=torch.zeros(batch.conditioning.embeds.shape[1], 3, device=self.device, dtype=self.dtype),
                img_ids=ids,
                return_dict=False,
            )[0]
            predicted = FluxPipeline._unpack_latents(predicted, height=8 * height, width=8 * width, vae_scale_factor=8)
            weighting = compute_loss_weighting_for_sd3("none", levels)
            loss = torch.mean((weighting.float() * (predicted.float() - (noise - x_0).float()) ** 2).reshape(count, -1), 1).mean()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
        return float(loss.detach().item())

    def save(self, folder: Path) -> None:
        """Write the LoRA as the script does."""
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(self.plain))


class Encoding:
    """What the script does at each step without caches: photos through the VAE (a sample of the posterior), captions through CLIP and T5."""

    def __init__(self, family: Flux1, pixels: Tensor, captions: list[str], batch_size: int, seed: int = 0):
        self.family, self.pixels, self.captions, self.batch_size = family, pixels, captions, batch_size
        self.vae, self.encoders = family.vae(CPU, torch.float32), family.text_encoders(CPU, torch.float32)
        self.random, self.left = random.Random(seed), list[int]()

    @torch.no_grad()
    def batch(self) -> Batch:
        """The next photos of an order that is drawn anew for each pass over them."""
        while len(self.left) < self.batch_size:
            self.left += self.random.sample(range(len(self.pixels)), len(self.pixels))
        chosen, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        drawn = self.vae.encode(self.pixels[chosen]).latent_dist.sample()
        latents = (drawn - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return Batch(latents, self.family.encode_prompts(self.encoders, [self.captions[i] for i in chosen]))


def read_photos(folder: Path, side: int) -> tuple[Tensor, list[str]]:
    """Photos [N, 3, side, side] in -1..1 and the captions beside them."""
    rows, files = [], photo_files(folder)
    for file in files:
        with Image.open(file) as image:
            picture = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        rows.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(rows), [caption_of(file) for file in files]


def photo_files(folder: Path) -> list[Path]:
    """The photos in a folder, in one order."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))


def caption_of(photo: Path) -> str:
    """The text beside a photo, with the trigger word that the benchmarks use."""
    return photo.with_suffix(".txt").read_text(encoding="utf-8").strip().replace(PLACEHOLDER, TRIGGER)


@click.command()
@click.argument("photos", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", default="mini", show_default=True, help="Base model.")
@click.option("--steps", default=120, show_default=True, help="Optimiser steps.")
@click.option("--batch-size", default=4, show_default=True, help="Photos a step.")
@click.option("--rank", default=16, show_default=True, help="Rank of the LoRA.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="Learning rate.")
@click.option("--targets", default="attention+ff", show_default=True, help="Layers that get a LoRA.")
@click.option("--seed", default=42, show_default=True, help="Seed of the order of photos and of the noise.")
def main(photos: Path, out: Path, model: str, steps: int, batch_size: int, rank: int, learning_rate: float, targets: str, seed: int) -> None:
    """Train on PHOTOS with captions beside them, as the script does, and write OUT/pytorch_lora_weights.safetensors.

    \b
    Example:
      python -m scripts.peer photos out --steps 120
    """
    family = load_family(model)
    encoding = Encoding(family, *read_photos(photos, family.native_px), batch_size, seed)
    peer = Peer(family, {"lora_rank": rank, "targets": targets, "learning_rate": learning_rate}, encoding.batch, seed=seed)
    losses = [peer.step() for _ in tqdm(range(steps), desc="peer", unit="step")]
    peer.save(out)
    click.echo(f"mean loss of the last {LAST_STEPS} steps: {mean(losses[-LAST_STEPS:])}")


if __name__ == "__main__":
    main()
