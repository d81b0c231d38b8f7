"""The configs of FLUX.1-dev, which FLUX.1-Krea-dev shares: a plan can be made before anyone has access to the weights."""

from typing import Any

from lorabooth.config import FLUX_DEV
from lorabooth.families.flux1 import Flux1

NAMES = (FLUX_DEV, "black-forest-labs/FLUX.1-Krea-dev")
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    },
    "vae/config.json": {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
    "text_encoder/config.json": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408,
    },
    "text_encoder_2/config.json": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    },
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
    "scheduler/scheduler_config.json": {
        "use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    },
}  # fmt: skip
"""As the repository has them, but for what changes neither shapes nor schedule."""


class Flux1Dev(Flux1):
    """FLUX.1-dev by its configs alone; its weights come from the hub, as those of any other."""

    def __init__(self, model: str = NAMES[0]):
        super().__init__(model)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A config, from here."""
        return CONFIGS[f"{component}/{name}"]
