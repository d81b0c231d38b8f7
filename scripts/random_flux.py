"""A FLUX.1 of given shapes whose weights are random numbers: what speed and memory depend on, without the download."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel

from lorabooth.families.flux1 import VAE_SCALE, Conditioning, Flux1
from lorabooth.families.flux1_dev import CONFIGS

POOL = 2**23 + 9
"""How many random numbers are drawn; no divisor of a width, so that no two rows are alike."""


@dataclass(frozen=True)
class Size:
    """Shapes of a FLUX.1 and the work it is timed on."""

    name: str
    transformer: dict[str, Any]
    vae_channels: tuple[int, ...]
    vae_groups: int
    text_tokens: int
    sides_px: tuple[int, ...]
    """Sides of the square pictures to train on; the last one is generated too."""
    gemm: int
    """Side of the square matrices whose product gives the machine's own rate."""

    @property
    def vae(self) -> dict[str, Any]:
        """Arguments of the autoencoder: FLUX.1's own but for the channels."""
        own = {"block_out_channels": self.vae_channels, "norm_num_groups": self.vae_groups, "sample_size": self.sides_px[-1]}
        return CONFIGS["vae/config.json"] | own

    def tflop(self, px: int) -> tuple[float, float]:
        """Forward pass over one picture: matrix products of the blocks, and attention, in 10**12 operations."""
        t = self.transformer
        width, blocks = t["num_attention_heads"] * t["attention_head_dim"], t["num_layers"] + t["num_single_layers"]
        tokens = self.text_tokens + (px // (2 * VAE_SCALE)) ** 2
        return blocks * 24 * width**2 * tokens / 1e12, blocks * 4 * width * tokens**2 / 1e12

    def step_tflop(self, px: int) -> float:
        """A training step: the frozen weights need no gradient, so backward is one more GEMM pass and two of attention."""
        gemm, attention = self.tflop(px)
        return 2 * gemm + 3 * attention


DEV = Size(
    "FLUX.1-dev, random weights", CONFIGS["transformer/config.json"],
    vae_channels=(128, 256, 512, 512), vae_groups=32, text_tokens=512, sides_px=(512, 768, 1024), gemm=8192,
)  # fmt: skip
TINY = Size(
    "tiny, random weights",
    {
        "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    },
    vae_channels=(4, 4, 8, 8), vae_groups=2, text_tokens=16, sides_px=(64, 128), gemm=256,
)  # fmt: skip


class RandomFlux(Flux1):
    """A FLUX.1 by its configs alone; its weights are random numbers made on the device."""

    def transformer(self, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
        """The transformer, frozen."""
        return random_weights(FluxTransformer2DModel, self.config("transformer"), device, dtype)

    def vae(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder, frozen."""
        return random_weights(AutoencoderKL, self.config("vae"), device, dtype)


def random_weights(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model of std 0.02, scales of norms at one. Not zeros: a GPU multiplies those faster and cooler than it ever will real weights."""
    with init_empty_weights():
        module = kind.from_config(config)
    assert not any(True for _ in module.buffers()), "a buffer would be left without a value"
    module = module.to(dtype).to_empty(device=device)
    # Drawn once and repeated: 12 billion numbers take a CPU minutes to draw, and seconds to copy.
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        else:
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), POOL):
                part = flat[start : start + POOL]
                part.copy_(pool[: len(part)])
    return module.eval().requires_grad_(False)


def write_model(folder: Path, size: Size) -> RandomFlux:
    """The configs of a model, as a pipeline's folder has them."""
    files = {"model_index.json": {"_class_name": "FluxPipeline"}, **CONFIGS}
    files |= {"transformer/config.json": {"_class_name": "FluxTransformer2DModel"} | size.transformer, "vae/config.json": size.vae}
    files |= {"tokenizer_2/tokenizer_config.json": {"model_max_length": size.text_tokens}}
    # The text encoders take room in a plan, and are never made.
    files["text_encoder_2/config.json"] = CONFIGS["text_encoder_2/config.json"] | {"d_model": size.transformer["joint_attention_dim"]}
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return RandomFlux(str(folder))


def random_conditioning(size: Size, dtype: torch.dtype) -> Conditioning:
    """What the text encoders would give for one prompt, by its shapes."""
    t, generator = size.transformer, torch.Generator().manual_seed(0)
    embeds = torch.randn(1, size.text_tokens, t["joint_attention_dim"], generator=generator)
    return Conditioning(embeds.to(dtype), torch.randn(1, t["pooled_projection_dim"], generator=generator).to(dtype))
