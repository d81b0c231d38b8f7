"""A FLUX.1 of given shapes whose weights are random numbers: what speed and memory depend on, without the download."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel

from lorabooth import hub
from lorabooth.families.flux1 import VAE_SCALE, Conditioning, Flux1

POOL = 2**23 + 9
"""How many random numbers are drawn; no divisor of a width, so that no two rows are alike."""
SCHEDULER = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}

CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408}
T5 = {"d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
"""Those of FLUX.1-dev's text encoders that say how large they are: they take room in a plan, and are never made."""


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
        return {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": self.vae_channels,
            "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": self.vae_groups, "sample_size": self.sides_px[-1],
            "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        }  # fmt: skip

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


# transformer/config.json and vae/config.json of black-forest-labs/FLUX.1-dev.
DEV = Size(
    "FLUX.1-dev, random weights",
    {
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    },
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
        return random_weights(FluxTransformer2DModel, hub.component_config(self.model, "transformer"), device, dtype)

    def vae(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder, frozen."""
        return random_weights(AutoencoderKL, hub.component_config(self.model, "vae"), device, dtype)


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
    files = {"model_index.json": {"_class_name": "FluxPipeline"}, "scheduler/scheduler_config.json": SCHEDULER}
    files |= {"transformer/config.json": {"_class_name": "FluxTransformer2DModel"} | size.transformer, "vae/config.json": size.vae}
    files |= {"tokenizer_2/tokenizer_config.json": {"model_max_length": size.text_tokens}}
    files |= {"text_encoder/config.json": CLIP, "text_encoder_2/config.json": T5 | {"d_model": size.transformer["joint_attention_dim"]}}
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return RandomFlux(str(folder))


def random_conditioning(size: Size, dtype: torch.dtype) -> Conditioning:
    """What the text encoders would give for one prompt, by its shapes."""
    t, generator = size.transformer, torch.Generator().manual_seed(0)
    embeds = torch.randn(1, size.text_tokens, t["joint_attention_dim"], generator=generator)
    return Conditioning(embeds.to(dtype), torch.randn(1, t["pooled_projection_dim"], generator=generator).to(dtype))
