"""Stage: caches -> LoRA weights. Loads the transformer only (and, for a moment at each preview, the VAE).

Loss: rectified flow (lorabooth/flow.py), as in diffusers' train_dreambooth_lora_flux.py with weighting "logit_normal":
sigma ~ logit-normal, x = (1 - sigma) x_0 + sigma noise, target = noise - x_0, guidance embedding 1.0, each sigma weighing the same.
"""

import gc
import hashlib
import math
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from lorabooth import flow, sampling
from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype, check_memory, compute_device
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX, GUIDANCE_IN_TRAINING, Flux1
from lorabooth.lora import LoraSpec
from lorabooth.photos import Manifest
from lorabooth.runs import RunDir, publish
from train.checkpoint import TrainState, load_checkpoint, save_checkpoint, verified
from train.data import Batch, Cache, Sampler, items, stem
from train.encode import preview_stem

LOG_EVERY = 10
PREVIEW_STEPS = 20
PREVIEW_GUIDANCE = 3.5


@dataclass
class Trainer:
    """A run's live objects: what the step needs, in one place."""

    run: RunDir
    config: TrainConfig
    family: Flux1
    accelerator: Accelerator
    transformer: torch.nn.Module
    state: TrainState
    sampler: Sampler
    cache: Cache

    @property
    def raw(self) -> torch.nn.Module:
        """The transformer without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.transformer)


def run(run_dir: RunDir) -> None:
    """Train to the last step, from the newest checkpoint if there is one."""
    config = run_dir.config
    if finished(run_dir):
        return
    device = compute_device()
    family = load_family(config.model)
    accelerator = Accelerator(mixed_precision="bf16" if device.type == "cuda" else "no", cpu=device.type == "cpu")
    # Only one process writes; the others compute. The lock is taken by the writer.
    with run_dir.locked() if accelerator.is_main_process else _nothing():
        trainer = start(run_dir, config, family, accelerator)
        load_checkpoint(run_dir, trainer.state)
        _loop(trainer)
        del trainer
    gc.collect()


def finished(run_dir: RunDir) -> bool:
    """Whether the last step is already in a checkpoint that is whole."""
    return verified(checkpoint_of(run_dir)) is not None


def checkpoint_of(run_dir: RunDir) -> Path:
    """The folder of the last step's checkpoint."""
    return run_dir.checkpoints / f"step-{run_dir.config.steps:06d}"


def start(run_dir: RunDir, config: TrainConfig, family: Flux1, accelerator: Accelerator) -> Trainer:
    """Load the transformer, put the LoRA and the optimiser on it."""
    device, dtype = accelerator.device, base_dtype(accelerator.device)
    if device.type == "cuda" and family.native_px >= 512:
        check_memory(24_000_000_000, f"the transformer of {config.model} in bf16", "use a GPU with at least 32 GB, or --model mini")
    transformer = family.transformer(device, dtype)
    parameters = LoraSpec(config.lora_rank, config.alpha, config.targets).attach(transformer, config.seed)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda")
    state = TrainState(0, parameters, [p.detach().clone() for p in parameters], optimizer)
    sampler = Sampler(items(Manifest.load(run_dir.path), config), config.batch_size, config.seed)
    return Trainer(run_dir, config, family, accelerator, accelerator.prepare(transformer), state, sampler, Cache(run_dir))


def loss_of(trainer: Trainer, batch: Batch, generator: torch.Generator) -> Tensor:
    """The rectified-flow loss of a batch: a scalar, fp32. `generator` (CPU) draws sigma and noise."""
    device = trainer.accelerator.device
    x_0 = flow.pack(batch.latents).to(device)
    noise = flow.pack(torch.randn(batch.latents.shape, generator=generator)).to(device)
    sigma = flow.logit_normal(len(x_0), generator=generator).to(device)
    dtype = base_dtype(device)
    height, width = batch.latents.shape[2:]
    ids = flow.image_ids(height, width, device=device, dtype=dtype)
    x = flow.add_noise(x_0, noise, sigma).to(dtype)
    with trainer.accelerator.autocast():
        predicted = trainer.family.velocity(trainer.transformer, x, sigma, GUIDANCE_IN_TRAINING, batch.conditioning.to(device, dtype), ids)
    return F.mse_loss(predicted.float(), flow.velocity(x_0, noise))


def train_step(trainer: Trainer) -> tuple[Tensor, tuple[str, ...]]:
    """One optimiser step; the loss (on the device, not read back) and the photos it saw."""
    config, state = trainer.config, trainer.state
    index = state.step * trainer.accelerator.num_processes + trainer.accelerator.process_index
    rng, generator = _randomness(config.seed, index)
    batch = trainer.cache.batch(trainer.sampler.batch(index), config.caption_dropout_rate, rng)
    loss = loss_of(trainer, batch, generator)
    trainer.accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.warmup_steps))
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    decay = min(config.ema_decay, state.step / (10 + state.step)) if config.ema_decay else 0.0
    torch._foreach_lerp_(state.ema, [p.detach() for p in state.parameters], 1 - decay)
    return loss.detach(), batch.photos


def _randomness(seed: int, index: int) -> tuple[random.Random, torch.Generator]:
    """Generators of one batch: a function of the seed and the batch's index, so that nothing need be stored for a resume."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    number = int.from_bytes(digest[:7], "little")
    return random.Random(number), torch.Generator().manual_seed(number)


def _loop(trainer: Trainer) -> None:
    config, state, main = trainer.config, trainer.state, trainer.accelerator.is_main_process
    pending: list[tuple[int, Tensor, tuple[str, ...]]] = []
    average = math.nan
    if main and state.step == 0:
        preview(trainer)
    bar = tqdm(total=config.steps, initial=state.step, desc="train", unit="step", disable=not main, smoothing=0.05)
    with bar, _stop_requests() as stopped:
        while state.step < config.steps:
            loss, photos = train_step(trainer)
            pending.append((state.step, loss, photos))
            bar.update()
            last = state.step == config.steps
            if stopped or last or state.step % LOG_EVERY == 0:
                average = _flush(trainer, pending, average)
                bar.set_postfix(loss=f"{average:.3f}")
            if main and (stopped or last or state.step % config.checkpoint_every == 0):
                average = _flush(trainer, pending, average)
                save_checkpoint(trainer.run, state)
            if main and not stopped and config.preview_every and (last or state.step % config.preview_every == 0):
                preview(trainer)
            if stopped:
                # Asked again: the signal may have come during the preview, after the question above.
                if main:
                    save_checkpoint(trainer.run, state)
                raise KeyboardInterrupt


def _flush(trainer: Trainer, pending: list[tuple[int, Tensor, tuple[str, ...]]], average: float) -> float:
    """Read the losses back (the only host sync of the loop) and log them; stops the run at a loss that is not finite."""
    for step, loss, photos in pending:
        value = loss.item()
        if not math.isfinite(value):
            names = {stem(photo): photo.original for photo in Manifest.load(trainer.run.path).photos}
            raise UserError(
                f"the loss became {value} at step {step} (photos {', '.join(names[p] for p in photos)}); training stopped, the last checkpoint is kept",
                hint="lower --learning-rate and start a new run, or look at those photos",
            )
        average = value if math.isnan(average) else 0.95 * average + 0.05 * value
        if trainer.accelerator.is_main_process:
            trainer.run.log(step=step, loss=round(value, 6))
    pending.clear()
    return average


@torch.no_grad()
def preview(trainer: Trainer) -> None:
    """Pictures of the preview prompts with the averaged weights, by the generator's own sampling code."""
    config, family, run_dir = trainer.config, trainer.family, trainer.run
    if not config.preview_every:
        return
    px = min(max(config.resolutions_px), family.native_px) // BUCKET_MULTIPLE_PX * BUCKET_MULTIPLE_PX
    raw = trainer.raw
    raw.eval()
    latents = []
    with _averaged(trainer.state), trainer.accelerator.autocast():
        for i in range(len(config.preview_prompts)):
            conditioning = trainer.cache.conditioning([preview_stem(i)])
            latents.append(sampling.denoise(family, raw, conditioning, sampling.noise(config.preview_seed, px, px), PREVIEW_STEPS, PREVIEW_GUIDANCE))
    raw.train()
    device = trainer.accelerator.device
    vae = family.vae(device, base_dtype(device))
    run_dir.samples.mkdir(exist_ok=True)
    for i, row in enumerate(latents):
        part = run_dir.samples / f".{i}.part.png"
        sampling.decode(family, vae, row)[0].save(part)
        publish(part, run_dir.samples / f"step-{trainer.state.step:06d}-{i}.png")


@contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """The LoRA's averaged weights in place of the raw ones."""
    raw = [p.detach().clone() for p in state.parameters]
    torch._foreach_copy_(state.parameters, state.ema)
    try:
        yield
    finally:
        torch._foreach_copy_(state.parameters, raw)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM become entries of the list, so that the step at hand is finished and saved first."""
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def final_weights(run_dir: RunDir) -> list[Tensor]:
    """The averaged LoRA weights of the last checkpoint, in the parameters' order."""
    state = load_file(checkpoint_of(run_dir) / "ema.safetensors")
    return [state[str(i)] for i in range(len(state))]
