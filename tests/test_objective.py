"""What a training step makes small: the loss of diffusers' script, in what order photos come, and what the LoRA must leave alone."""

import random
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image
from safetensors.torch import load_file
from trainers import trainer_of

from lorabooth.cli import main
from lorabooth.lora import LoraSpec
from lorabooth.photos import Bucket, Manifest
from lorabooth.runs import RunDir
from train import encode, fit
from train.data import Cache, Item, Sampler, items

SQUARE, PORTRAIT = Bucket(128, 128), Bucket(160, 96)


# The loss


def loss_as_in_diffusers(
    transformer: torch.nn.Module, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, conditioning, scheme: str
) -> torch.Tensor:
    """The loss of examples/dreambooth/train_dreambooth_lora_flux.py with --guidance_scale 1, at given noise levels."""
    b, c, h, w = latents.shape
    sigmas = sigmas.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    predicted = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w),
        timestep=sigmas.flatten() * 1000 / 1000,
        guidance=torch.tensor([1.0]).expand(b),
        pooled_projections=conditioning.pooled,
        encoder_hidden_states=conditioning.embeds,
        txt_ids=torch.zeros(conditioning.embeds.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    predicted = FluxPipeline._unpack_latents(predicted, height=h * 8, width=w * 8, vae_scale_factor=8)
    target = noise - latents
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    return torch.mean((weighting.float() * (predicted.float() - target.float()) ** 2).reshape(b, -1), 1).mean()


# How the script draws noise levels (compute_density_for_timestep_sampling); the last with the shift that FLUX samples with.
LEVELS = {
    "logit-normal": lambda count, _, generator: torch.sigmoid(torch.randn(count, generator=generator)),
    "uniform": lambda count, _, generator: torch.rand(count, generator=generator),
    "shifted": lambda count, tokens, generator: shifted_as_in_diffusers(torch.sigmoid(torch.randn(count, generator=generator)), tokens),
}


def shifted_as_in_diffusers(sigmas: torch.Tensor, tokens: int) -> torch.Tensor:
    return FlowMatchEulerDiscreteScheduler().time_shift(calculate_shift(tokens), 1.0, sigmas)


@pytest.mark.parametrize(
    ("levels", "weighting"), [("logit-normal", "none"), ("uniform", "none"), ("shifted", "none"), ("logit-normal", "sigma_sqrt"), ("uniform", "cosmap")]
)
def test_loss_and_gradients_are_those_of_the_script_in_diffusers(run: RunDir, levels: str, weighting: str):
    trainer = trainer_of(run)
    trainer.config = run.config.model_copy(update={"sigma_sampling": levels, "loss_weighting": weighting})
    with torch.no_grad():  # lora_B starts at zero, which would make every gradient of lora_A zero
        for p in trainer.state.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batch = trainer.cache.batch(trainer.sampler.batch(0), trainer.config, random.Random(0))
    generator = torch.Generator().manual_seed(7)
    loss = fit.loss_of(trainer, batch, generator)
    ours = torch.autograd.grad(loss, trainer.state.parameters)
    generator.manual_seed(7)
    noise = torch.randn(batch.latents.shape, generator=generator)
    sigmas = LEVELS[levels](len(noise), noise[0, 0].numel() // 4, generator)
    plain = trainer.family.transformer(torch.device("cpu"), torch.float32)
    parameters = LoraSpec.of(run.config).attach(plain, seed=0)
    for p, mine in zip(parameters, trainer.state.parameters, strict=True):
        p.data = mine.detach().clone()
    reference = loss_as_in_diffusers(plain.train(), batch.latents, noise, sigmas, batch.conditioning, weighting)
    theirs = torch.autograd.grad(reference, parameters)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert len(ours) == len(theirs) > 0 and all(g.abs().max() > 0 for g in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


# The order of photos


def counts(sampler: Sampler, batches: int) -> Counter[str]:
    return Counter(item.photo for i in range(batches) for item in sampler.batch(i))


@pytest.mark.parametrize(
    ("square", "portrait", "batch_size"), [(12, 0, 4), (5, 0, 2), (3, 0, 4), (1, 0, 4), (11, 1, 4), (7, 3, 2)], ids=lambda value: str(value)
)
def test_every_photo_is_seen_equally_often_in_batches_of_one_shape(square: int, portrait: int, batch_size: int):
    items = [Item(f"s{i}", SQUARE) for i in range(square)] + [Item(f"p{i}", PORTRAIT) for i in range(portrait)]
    sampler = Sampler(items, batch_size, seed=1)
    for i in range(50):
        batch = sampler.batch(i)
        assert len(batch) == batch_size and len({item.bucket for item in batch}) == 1
    seen = counts(sampler, 1200)
    assert len(seen) == square + portrait
    # A photo alone in its shape must not be learned more than the others: its person would always stand that way.
    assert max(seen.values()) <= 1.1 * min(seen.values())


def test_the_order_is_a_function_of_the_seed_alone():
    items = [Item(f"s{i}", SQUARE) for i in range(7)] + [Item(f"p{i}", PORTRAIT) for i in range(4)]
    orders = [[Sampler(items, 2, seed).batch(i) for i in range(30)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    backwards = Sampler(items, 2, 1)
    assert [backwards.batch(i) for i in reversed(range(30))][::-1] == orders[0]


def test_a_dropped_caption_is_the_bare_trigger(run: RunDir):
    cache, sampler = Cache(run), trainer_of(run).sampler
    picked = sampler.batch(0)
    configs = (run.config.model_copy(update={"caption_dropout_rate": rate}) for rate in (1.0, 0.0))
    dropped, kept = (cache.batch(picked, config, random.Random(0)).conditioning.embeds for config in configs)
    trigger = load_file(run.cache / "trigger.text.safetensors")["embeds"]
    assert all(torch.equal(row, trigger) for row in dropped)
    assert not any(torch.equal(row, trigger) for row in kept)


def test_what_a_mask_hides_is_not_in_the_loss(demo_photos: Path, tiny_command: list[str], tmp_path: Path):
    photos = tmp_path / "photos"
    with zipfile.ZipFile(demo_photos) as archive:
        archive.extractall(photos)
    for file in sorted(photos.glob("*.png")):
        mask = Image.new("L", Image.open(file).size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(file.with_suffix(".mask.png"))
    run = RunDir(tmp_path / "run")
    assert main(["train", str(photos), *tiny_command[2:], "--horizontal-flip", "true", "--preview-every", "0", "--out", str(run.path)]) == 0
    shutil.rmtree(run.checkpoints)
    trainer = trainer_of(run)
    for flipped in (False, True):
        [item] = [item for item in items(Manifest.load(run.path), run.config) if item.photo == "00001" and item.flipped == flipped]
        batch = trainer.cache.batch([item], trainer.config, random.Random(0))
        weights = batch.weights.reshape(item.bucket.height_px // 16, item.bucket.width_px // 16)
        shown, hidden = weights.chunk(2, dim=1)[:: -1 if flipped else 1]
        assert weights.mean() == pytest.approx(1) and (hidden < 0.01).all() and (shown > 1.9).all()
        other = batch.latents.clone()
        other.unflatten(3, (2, -1))[:, :, :, 0 if flipped else 1] += 1
        # The model sees the hidden half, so what it says of the other changes a little; what it says of the hidden one does not count.
        noisy = [fit.loss_of(trainer, replace(batch, latents=latents), torch.Generator().manual_seed(3)).item() for latents in (batch.latents, other)]
        even = [
            fit.loss_of(trainer, replace(batch, latents=latents, weights=torch.ones_like(batch.weights)), torch.Generator().manual_seed(3)).item()
            for latents in (batch.latents, other)
        ]
        assert abs(noisy[1] - noisy[0]) < 0.3 * abs(even[1] - even[0])


def test_mirrored_photos_are_photos_of_their_own(run: RunDir):
    run._write_config(run.config.model_copy(update={"horizontal_flip": True}))
    manifest = Manifest.load(run.path)
    found = items(manifest, run.config)
    assert len(found) == 2 * len(manifest.photos) and sum(item.flipped for item in found) == len(manifest.photos)
    plain, mirrored = (item for item in found if item.photo == found[0].photo)
    file = run.photos / f"{plain.photo}.png"
    assert torch.equal(encode.pixels(file, plain).flip(-1), encode.pixels(file, mirrored))
    encode.run(run)
    assert all((run.cache / item.latents_name).exists() for item in found)
