"""The base model as a plan wants it: the transformer with its LoRAs, the VAE, the text encoders; each loaded when it is first needed."""

import torch
from diffusers import AutoencoderKL, FirstBlockCacheConfig, FluxTransformer2DModel
from tqdm import tqdm

from infer.encoding import PromptEncoder
from infer.live import LiveWeights, Weighted
from infer.plan import FAST_RANK, TILE_PX, ServingPlan
from infer.stacked import RANK_STEP, StackedLoras
from lorabooth import sampling
from lorabooth.attention import choose_kernel
from lorabooth.compiled import try_compiled
from lorabooth.families.flux1 import VAE_SCALE, Conditioning, Flux1
from lorabooth.notes import note
from lorabooth.quantized import put_blocks, put_rest
from lorabooth.sizes import blocks_of, linears, spread
from lorabooth.swap import BlockSwap

CPU = torch.device("cpu")
THRESHOLDS = {"balanced": 0.08, "max": 0.15}
"""How much the first block's output may change between two steps, relative to its size, for the rest of the second to be left out (diffusers'
first-block cache, after ParaAttention, whose page calls 0.12 the limit for FLUX.1-dev of 28 steps)."""


class Base:
    """One base model, part by part."""

    def __init__(self, family: Flux1, plan: ServingPlan, device: torch.device, dtype: torch.dtype, fast: bool = False, cache: str = "off"):
        self.family, self.plan, self.device, self.dtype, self.fast, self.cache = family, plan, device, dtype, fast, cache
        self.prompts = PromptEncoder(family, device, dtype, plan.encoders)
        self._transformer: FluxTransformer2DModel | None = None
        self._merged: LiveWeights | None = None
        self._stacked: StackedLoras | None = None
        self._vae: AutoencoderKL | None = None

    @property
    def mixes(self) -> bool:
        """Whether the pictures of one batch may have different LoRAs."""
        return self.plan.loras == "stacked"

    def transformer(self, loras: list[tuple[Weighted, ...]], size_px: tuple[int, int] | None = None) -> FluxTransformer2DModel:
        """The transformer for a batch: LoRAs for each of its pictures; all the same where this base does not mix them.

        size_px: width and height of the pictures, which the first batch is compiled for.
        """
        first = self._transformer is None
        transformer = self._transformer = self._transformer or self._placed()
        if self._stacked:
            self._stacked.choose(loras)
        elif self._merged:
            assert all(one == loras[0] for one in loras), "merged LoRAs are the same for a whole batch"
            self._merged.apply(loras[0])
        if first:
            self._make_fast(transformer, len(loras), size_px or (self.family.native_px, self.family.native_px))
        return transformer

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
        untouched = {}
        if not whole:
            blocks = blocks_of(transformer)
            if not self.mixes:
                inside = {id(linear) for block in blocks for _, linear in linears(block)}
                untouched = {name: module.weight.detach() for name, module in transformer.named_modules() if id(module) in inside}
            put_blocks(blocks, plan.precision, plan.swapped, self.device)
            put_rest(transformer, self.device)
        if self.mixes:
            self._stacked = StackedLoras(transformer, self.device, self.dtype, rank=FAST_RANK if self.fast else RANK_STEP, static=self.fast)
        else:
            self._merged = LiveWeights(transformer, self.device if plan.untouched_on == "gpu" else CPU, untouched)
        if plan.swapped:
            swap = BlockSwap(spread(blocks_of(transformer), plan.swapped), self.device)
            assert self._stacked, "blocks that come and go cannot have LoRAs merged into them"
            self._stacked.before_reading = swap.settle
        return transformer

    def _make_fast(self, transformer: FluxTransformer2DModel, batch: int, size_px: tuple[int, int]) -> None:
        """The attention kernel that is fastest here, compiled blocks, a cache of steps."""
        if self.device.type == "cuda":
            choose_kernel(self.family.native_px, self.family, self.device, gradients=False)
        if self.fast:
            self._compile(transformer, batch, size_px)
        if self.cache != "off":  # its hooks run around what is compiled
            transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLDS[self.cache]))

    def _compile(self, transformer: FluxTransformer2DModel, batch: int, size_px: tuple[int, int]) -> None:
        if self.plan.swapped or self.plan.precision == "nf4":
            note(f"not compiled, for that does not go together with: {self.plan}")
            return

        def warm_up() -> None:
            for _ in tqdm(range(1), desc="compile (once, a minute or two)", unit="shape"):
                config = transformer.config
                tokens = torch.zeros(batch, self.family.text_tokens, config.joint_attention_dim)
                conditioning = Conditioning(tokens, torch.zeros(batch, config.pooled_projection_dim))
                sampling.denoise(self.family, transformer, conditioning, sampling.noise(0, *size_px).expand(batch, -1, -1, -1), 1, 3.5)

        try_compiled(blocks_of(transformer), None, warm_up, "generating")
