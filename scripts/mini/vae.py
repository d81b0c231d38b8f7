"""Stage 2: an AutoencoderKL for the drawings (16 latent channels, 8x), trained on 64 px crops."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from scripts.mini import draw
from scripts.mini.common import Training, autocast, device

BATCH = 16
CROP_PX = 64


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(work: Path, out: Path, steps: int, seed: int) -> None:
    """Train the VAE and save its averaged weights, with the latents' mean and spread as shift and scaling factor."""
    torch.manual_seed(seed)
    vae = new_vae().to(device())
    training = Training(vae, work / "vae.safetensors", peak=2e-3, steps=steps)
    pictures, _ = draw.load(work / "drawings", (128, 128))
    weights = draw.importance((128, 128))[..., None]
    rng = np.random.default_rng(seed + training.step)
    bar = tqdm(range(training.step, steps), initial=training.step, total=steps, desc="vae", mininterval=5)
    for _ in bar:
        crops, weight = zip(*[crop(pictures[rng.integers(len(pictures))], weights, rng) for _ in range(BATCH)], strict=True)
        x, w = to_tensor(np.stack(crops)), torch.from_numpy(np.stack(weight)).to(device()).permute(0, 3, 1, 2)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = (w * (y - x).abs()).mean() + 2 * (w * (y - x).square()).mean() + 1e-3 * kl
        training.update(loss)
        if training.step % 100 == 0:
            bar.set_postfix(psnr=f"{10 * np.log10(4 / F.mse_loss(y, x).item()):.1f}", kl=f"{kl.item():.2f}")
        if training.step % 1000 == 0:
            training.save()
    training.save()
    training.load_ema()
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_tensor(pictures[i : i + 50])).latent_dist.mean for i in range(0, 1000, 50)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(out / "vae")
    print(json.dumps({"psnr_db": psnr(vae, pictures[:200]), "latent_std": latents.std().item()}))


def crop(picture: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same random square of a picture and of its weights."""
    y, x = rng.integers(0, picture.shape[0] - CROP_PX + 1), rng.integers(0, picture.shape[1] - CROP_PX + 1)
    return picture[y : y + CROP_PX, x : x + CROP_PX], weights[y : y + CROP_PX, x : x + CROP_PX]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures (uint8 [N, H, W, 3]) through the VAE; peak 255."""
    ratios = []
    for i in range(0, len(pictures), 50):
        x = to_tensor(pictures[i : i + 50])
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (x - y).square().mean((1, 2, 3))))
    return torch.cat(ratios).mean().item()
