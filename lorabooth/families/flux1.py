"""FLUX.1: dev, Krea-dev, schnell, and the mini model. All that is particular to this family stands here.

Each component loads alone, by a class named here and never by what a repository asks for, so that no code of a
model repository can run and no two heavy components need to be resident together.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from lorabooth import flow, hub, mini
from lorabooth.device import free_gpu_bytes, sent
from lorabooth.errors import UserError, out_of_memory
from lorabooth.licences import Licence, licence_of
from lorabooth.machine import memory_bytes
from lorabooth.pinned import pinned_bytes
from lorabooth.swap import BlockSwap

transformers_logging.disable_progress_bar()  # a bar for the tensors of each encoder would hide ours

BUCKET_MULTIPLE_PX = 16
VAE_SCALE = 8
T5_TOKENS = 512
T5_WORKSPACE_BYTES = 1.5e9
"""What encoding a batch of prompts takes beside the weights."""
GUIDANCE_IN_TRAINING = 1.0
"""FLUX.1-dev is guidance-distilled; at 1.0 the embedding asks for the data's own velocity, which is what photos are."""

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out"
NORMS = r"norm(1|1_context)?\.linear"
BLOCK = r"(single_)?transformer_blocks\.\d+\."
TARGETS = {
    "attention": rf"{BLOCK}({ATTENTION})",
    "attention+ff": rf"{BLOCK}({ATTENTION}|{FEED_FORWARD})",
    "all-linear": rf"{BLOCK}({ATTENTION}|{FEED_FORWARD}|{NORMS})",
}
"""Regular expressions (full match) over module names of the transformer."""
CLIP_TARGETS = ("self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj")
"""Ends of the names of the layers of CLIP that get a LoRA where CLIP is trained, as in diffusers' script."""


@dataclass(frozen=True)
class TextEncoders:
    """CLIP and T5 with their tokenizers."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5Tokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: embeds [B, L, D] from T5, pooled [B, P] from CLIP, and the token ids [B, 77] that CLIP made it from, for training it."""

    embeds: Tensor
    pooled: Tensor
    clip_ids: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """The same on another device or in another precision."""
        return Conditioning(sent(self.embeds, device).to(dtype), sent(self.pooled, device).to(dtype), self.clip_ids)

    def first(self, count: int) -> "Conditioning":
        """Only the first prompts."""
        return Conditioning(self.embeds[:count], self.pooled[:count], None if self.clip_ids is None else self.clip_ids[:count])


Part = TypeVar("Part")
Module = TypeVar("Module", bound=torch.nn.Module)


class Flux1:
    """A FLUX.1 model by reference: 'mini', a local folder, or a hub repository."""

    name = "flux1"

    def __init__(self, model: str):
        self.model = model

    @property
    def licence(self) -> Licence:
        """The licence by the model's name."""
        return licence_of(self.model)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """The configuration of a component, without its weights."""
        return hub.component_config(self.model, component, name)

    @cached_property
    def native_px(self) -> int:
        """Side of the square picture the model was made for: 1024 for FLUX.1-dev, 128 for mini."""
        return int(self.config("vae")["sample_size"])

    @cached_property
    def uses_guidance(self) -> bool:
        """Whether the transformer takes a guidance scale (dev) or not (schnell)."""
        return bool(self.config("transformer")["guidance_embeds"])

    def vae(self, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder, frozen."""
        return _frozen(self._load(AutoencoderKL, "vae", torch_dtype=dtype, use_safetensors=True), device)

    def transformer(self, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
        """The transformer, frozen."""
        return _frozen(self._load(FluxTransformer2DModel, "transformer", torch_dtype=dtype, use_safetensors=True), device)

    def empty_transformer(self) -> FluxTransformer2DModel:
        """The transformer on the meta device: names and shapes without memory."""
        with init_empty_weights():
            return FluxTransformer2DModel.from_config(self.config("transformer"))

    @cached_property
    def text_tokens(self) -> int:
        """Length to which T5 pads a prompt: 512 for FLUX.1-dev."""
        return min(self.config("tokenizer_2", "tokenizer_config.json")["model_max_length"], T5_TOKENS)

    def clip(self, device: torch.device, dtype: torch.dtype) -> CLIPTextModel:
        """The CLIP text encoder, frozen."""
        return _frozen(self._load(CLIPTextModel, "text_encoder", dtype=dtype, use_safetensors=True), device)

    def empty_clip(self) -> CLIPTextModel:
        """CLIP on the meta device: names and shapes without memory."""
        with init_empty_weights():
            return CLIPTextModel(CLIPTextConfig(**self.config("text_encoder")))

    def count_weights(self, component: str) -> int:
        """How many weights the VAE or a text encoder has, from its config."""
        config = self.config(component)
        with torch.device("meta"):  # which keeps tied weights one
            if component == "vae":
                part: torch.nn.Module = AutoencoderKL.from_config(config)
            else:
                part = T5EncoderModel(T5Config(**config)) if component == "text_encoder_2" else CLIPTextModel(CLIPTextConfig(**config))
        return sum(p.numel() for p in part.parameters())

    def text_encoders(self, device: torch.device, dtype: torch.dtype, free_bytes: float | None = None) -> TextEncoders:
        """Both text encoders, frozen, with their tokenizers. free_bytes: room for T5 on the device; by itself what is free there."""
        return TextEncoders(
            self._load(CLIPTokenizer, "tokenizer"),
            self._load(T5Tokenizer, "tokenizer_2"),
            self.clip(device, dtype),
            fitted_encoder(_frozen(self._load(T5EncoderModel, "text_encoder_2", dtype=dtype, use_safetensors=True), torch.device("cpu")), device, free_bytes),
        )

    @torch.no_grad()
    def encode_prompts(self, encoders: TextEncoders, prompts: list[str]) -> Conditioning:
        """Prompts -> conditioning. T5 is padded to its tokenizer's own length (512 for dev): FLUX has no text mask."""
        clip = self.clip_ids(encoders.tokenizer, prompts)
        t5 = encoders.tokenizer_2(prompts, padding="max_length", max_length=t5_length(encoders.tokenizer_2), truncation=True, return_tensors="pt").input_ids
        pooled = self.pooled(encoders.text_encoder, clip)
        embeds = encoders.text_encoder_2(t5.to(encoders.text_encoder_2.device))[0]
        return Conditioning(embeds, pooled, clip)

    @staticmethod
    def clip_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
        """Prompts as CLIP reads them: token ids [B, 77]."""
        ids: Tensor = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids
        return ids

    @staticmethod
    def pooled(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
        """CLIP's one vector for each prompt, [B, P], of token ids [B, 77]."""
        vectors: Tensor = text_encoder(sent(ids, text_encoder.device)).pooler_output
        return vectors

    def cut(self, prompt: str) -> str:
        """The end of a prompt that does not fit T5's length and will not be seen; empty where all fits."""
        tokenizer = self._t5_tokenizer
        ids, length = tokenizer(prompt).input_ids, t5_length(tokenizer)
        return str(tokenizer.decode(ids[length - 1 : -1])) if len(ids) > length else ""

    def sees_all_of(self, prompt: str) -> bool:
        """Whether a prompt fits T5's length."""
        return len(self._t5_tokenizer(prompt).input_ids) <= t5_length(self._t5_tokenizer)

    @cached_property
    def _t5_tokenizer(self) -> T5Tokenizer:
        return self._load(T5Tokenizer, "tokenizer_2")

    @torch.no_grad()
    def encode_pictures(self, vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> scaled latents [B, 16, H/8, W/8]; the posterior's mean, so that a cache is exact."""
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
        return (mean - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.no_grad()
    def decode_pictures(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Scaled latents [B, 16, h, w] -> pixels [B, 3, 8h, 8w] in -1..1 (not clamped)."""
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents).sample

    def velocity(
        self, transformer: torch.nn.Module, x: Tensor, sigma: Tensor, guidance: float | Tensor, conditioning: Conditioning, image_ids: Tensor
    ) -> Tensor:
        """Predicted velocity [B, N, 64] of packed latents x [B, N, 64] at noise levels sigma [B]; image_ids [N, 3]; one guidance, or one for each [B]."""
        if not isinstance(guidance, Tensor):
            guidance = torch.full((x.shape[0],), guidance, device=x.device, dtype=torch.float32)
        return transformer(
            hidden_states=x,
            timestep=sigma.to(x.dtype),  # the library multiplies by 1000 inside
            guidance=guidance if self.uses_guidance else None,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.embeds,
            txt_ids=flow.text_ids(conditioning.embeds.shape[1], x.device, x.dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    @cached_property
    def shift_config(self) -> dict[str, Any]:
        """Arguments of `flow.resolution_mu` from the scheduler's config; schnell has a fixed shift of none."""
        config = self.config("scheduler", "scheduler_config.json")
        if not config.get("use_dynamic_shifting"):
            return {"base_shift": 0.0, "max_shift": 0.0}
        return {
            "base_tokens": config["base_image_seq_len"],
            "max_tokens": config["max_image_seq_len"],
            "base_shift": config["base_shift"],
            "max_shift": config["max_shift"],
        }

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """Sampling noise levels [steps + 1] for a number of image tokens."""
        return flow.schedule(steps, flow.resolution_mu(tokens, **self.shift_config))

    def _load(self, part: type[Part], component: str, **options: Any) -> Part:
        """One component by its class; a UserError where its files are missing, damaged or of another class."""
        folder = hub.component_folder(self.model, component)
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # it logs, as an error of its own, what our sentence says
        try:
            return part.from_pretrained(folder, **options)  # type: ignore[attr-defined]
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:  # what the libraries raise on such files
            if out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.model}: its {component} cannot be loaded: {reason}", hint="download the model again, or check the folder") from error
        finally:
            diffusers_logging.set_verbosity(verbosity)


def t5_length(tokenizer: T5Tokenizer) -> int:
    """Padded prompt length in T5 tokens: the tokenizer's own, at most FLUX's 512."""
    return min(tokenizer.model_max_length, T5_TOKENS)


def fitted_encoder(encoder: T5EncoderModel, device: torch.device, free_bytes: float | None = None) -> T5EncoderModel:
    """T5 (9.5 GB for FLUX.1-dev in bf16) on a device; where that has not the room, its blocks come from host memory one after the other; from pinned
    memory, where there is enough for a copy."""
    if free_bytes is None:
        free_bytes = free_gpu_bytes(device) if device.type == "cuda" else math.inf
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    if size + T5_WORKSPACE_BYTES < free_bytes:
        return _frozen(encoder, device)
    blocks = list(encoder.encoder.block)
    swapped = {id(p) for block in blocks for p in block.parameters()}
    for p in encoder.parameters():
        if id(p) not in swapped:
            p.data = p.data.to(device)
    BlockSwap(blocks, device, pin=pinned_bytes(size) < memory_bytes()[1])
    return encoder


def _frozen(module: Module, device: torch.device) -> Module:
    return module.to(device).eval().requires_grad_(False)


def tiny(folder: Path, seed: int = 0) -> Path:
    """Write a FLUX.1 pipeline of random weights, under 1 MB, with mini's tokenizers: for tests of structure, not of pictures."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    if not (mini.FOLDER / "tokenizer").is_dir():
        raise UserError("the mini model's tokenizers are missing from this installation")
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = CLIPTokenizer.from_pretrained(mini.FOLDER / "tokenizer"), T5Tokenizer.from_pretrained(mini.FOLDER / "tokenizer_2")
    width = 16
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 8, 8), layers_per_block=1,
            latent_channels=16, norm_num_groups=2, sample_size=128, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=width,
            pooled_projection_dim=width, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
