"""The base model as a plan wants it: the transformer with its LoRAs, the VAE, the text encoders; each loaded when it is first needed."""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from infer.encoding import PromptEncoder
from infer.live import LiveWeights, Weighted
from infer.plan import TILE_PX, ServingPlan
from infer.stacked import StackedLoras
from lorabooth.families.flux1 import VAE_SCALE, Flux1
from lorabooth.quantized import put_blocks, put_rest
from lorabooth.sizes import blocks_of
from lorabooth.swap import BlockSwap

CPU = torch.device("cpu")


class Base:
    """One base model, part by part."""

    def __init__(self, family: Flux1, plan: ServingPlan, device: torch.device, dtype: torch.dtype):
        self.family, self.plan, self.device, self.dtype = family, plan, device, dtype
        self.prompts = PromptEncoder(family, device, dtype, plan.encoders)
        self._transformer: FluxTransformer2DModel | None = None
        self._merged: LiveWeights | None = None
        self._stacked: StackedLoras | None = None
        self._vae: AutoencoderKL | None = None

    @property
    def mixes(self) -> bool:
        """Whether the pictures of one batch may have different LoRAs."""
        return self.plan.loras == "stacked"

    def transformer(self, loras: list[tuple[Weighted, ...]]) -> FluxTransformer2DModel:
        """The transformer for a batch: LoRAs for each of its pictures; all the same where this base does not mix them."""
        if self._transformer is None:
            self._transformer = self._placed()
        if self._stacked:
            self._stacked.choose(loras)
        elif self._merged:
            assert all(one == loras[0] for one in loras), "merged LoRAs are the same for a whole batch"
            self._merged.apply(loras[0])
        return self._transformer

    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        if self._vae is None:
            self._vae = self.family.vae(self.device, self.dtype)
            if self.plan.tiled:
                self._vae.enable_tiling()
                self._vae.tile_sample_min_size, self._vae.tile_latent_min_size = TILE_PX, TILE_PX // VAE_SCALE
        return self._vae

    def _placed(self) -> FluxTransformer2DModel:
        plan = self.plan
        whole = plan.precision in ("bf16", "fp32") and not plan.swapped
        transformer = self.family.transformer(self.device if whole else CPU, self.dtype)
        if not whole:
            blocks = blocks_of(transformer)
            put_blocks(blocks, plan.precision, plan.swapped, self.device)
            put_rest(transformer, self.device)
        if self.mixes:
            self._stacked = StackedLoras(transformer, self.device, self.dtype)
        else:
            self._merged = LiveWeights(transformer, self.device if plan.untouched_on == "gpu" else CPU)
        if plan.swapped:
            BlockSwap(blocks_of(transformer)[-plan.swapped :], self.device)
        return transformer
