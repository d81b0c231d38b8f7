"""`Engine`: a loaded base model that makes pictures, with LoRAs applied per request. Knows no HTTP and no files but models.

A picture depends on its request and its seed alone: not on what was made before, nor on what is made beside it. On the CPU
in fp32 that holds to the bit where pictures are made one at a time, as they are unless a batch is asked for; batches of
other sizes are rounded differently, on a CPU by a level of 255, on a GPU by at most a few.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from infer.adapters import Adapters
from infer.base import Base
from infer.live import Weighted
from infer.loras import LoraChoice
from infer.plan import STACK_PLACES, STEPS, Needs, ServingPlan, choose, estimate
from infer.progress import Progress
from infer.request import Request, Source
from infer.settings import DEFAULT, Settings
from lorabooth import sampling
from lorabooth.adapter_config import identity
from lorabooth.device import base_dtype, check_device, check_gpu, compute_device, forget_pinned, free_gpu_bytes
from lorabooth.errors import UserError, unless_out_of_memory
from lorabooth.families import load_family
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX, VAE_SCALE, Conditioning, Flux1
from lorabooth.machine import pinnable_bytes
from lorabooth.notes import note
from lorabooth.quantized import multiplies_fp8
from lorabooth.sizes import BaseSizes, Estimate
from lorabooth.speed import Speed, speed_of

CPU_SPEED = Speed(0.1, 10, 10, "the CPU")

Watch = Callable[[Tensor], None]
"""Called after each step with the latents [B, 16, h, w] of the pictures that are expected so far."""


@dataclass(frozen=True)
class Piece:
    """One picture to make: a request, which of its seeds, and its LoRAs."""

    request: Request
    seed: int
    loras: tuple[LoraChoice, ...] = ()


@dataclass(frozen=True)
class Output:
    """A picture and the seed that makes it again."""

    image: Image.Image
    seed: int
    computed: dict[str, Any] = field(default_factory=dict)
    """How, as `Engine.record` tells it: a lighter plan may have been taken on the way."""


class Engine:
    """One base model that makes pictures, one batch at a time; for one thread."""

    def __init__(self, model: str | Flux1, settings: Settings = DEFAULT, plan: ServingPlan | None = None):
        self.family, self.settings = load_family(model) if isinstance(model, str) else model, settings
        check_gpu(self.family.native_px, self.family.model)
        self.device = compute_device()
        check_device(self.device, self.family.native_px, self.family.model)
        self.dtype = base_dtype(self.device)
        first, *self._lighter = [plan] if plan else [one.plan for one in plans(self.family, settings, self.device)]
        self.base = self._base(first)
        self.adapters = Adapters(self.family, self.device, self.dtype, first.ready_bytes)

    def generate(self, request: Request, loras: tuple[LoraChoice, ...] = (), progress: Progress | None = None, watch: Watch | None = None) -> Iterator[Output]:
        """The pictures of a request, as they are made; output i has seed + i."""
        pieces = [Piece(request, (request.seed + i) % 2**32, loras) for i in range(request.num_outputs)]
        self._additions(pieces)  # what is wrong with them is said before the work begins
        done, total = 0, sum(steps_of(piece.request) for piece in pieces)
        for start in range(0, len(pieces), self.settings.batch):
            batch = pieces[start : start + self.settings.batch]
            yield from self.make(batch, _reporter(progress, watch, len(batch), done, total))
            done += sum(steps_of(piece.request) for piece in batch)

    def together(self, pieces: list[Piece], progress: Progress | None = None) -> list[Output]:
        """Pictures of different requests, in their order; those that can be are made in one batch."""
        self._additions(pieces)
        groups: dict[object, list[int]] = {}
        for i, piece in enumerate(pieces):
            groups.setdefault(self._kind(piece), []).append(i)
        made: dict[int, Output] = {}
        done, total = 0, sum(steps_of(piece.request) for piece in pieces)
        for group in groups.values():
            for part in self._batches(pieces, group):
                batch = [pieces[i] for i in part]
                made |= zip(part, self.make(batch, _reporter(progress, None, len(batch), done, total)), strict=True)
                done += sum(steps_of(piece.request) for piece in batch)
        return [made[i] for i in range(len(pieces))]

    def record(self) -> dict[str, Any]:
        """How the engine computes, as far as pictures depend on it: plain JSON for their making."""
        found: dict[str, Any] = {"precision": self.base.plan.precision}
        found |= {"cache": self.settings.cache} if self.settings.cache != "off" else {}
        found |= {"fast": True} if self.settings.fast else {}
        return found

    def read(self, requests: Sequence[Request], loras: tuple[LoraChoice, ...] = ()) -> None:
        """Encode the prompts of requests that come, all at once: where the text encoders do not stay, they are loaded once for all."""
        while True:
            with unless_out_of_memory():
                return self._read(requests, loras)
            self._lighten()

    def _read(self, requests: Sequence[Request], loras: tuple[LoraChoice, ...]) -> None:
        _, clip = self.adapters.weighted(loras)
        for request in requests:
            for prompt in (request.prompt, request.negative_prompt)[: 1 + (request.true_cfg_scale > 1)]:
                self.base.prompts.encode(prompt, clip)
        self.base.prompts.release()

    def make(self, pieces: list[Piece], progress: sampling.Progress | None = None) -> list[Output]:
        """One batch of pictures of one size, of as many steps, and with as much of a picture to start from.

        Where the GPU's memory runs out, the base is loaded anew by the next lighter plan; a UserError where there is none.
        """
        while True:
            with unless_out_of_memory():
                return self._make(pieces, progress)
            self._lighten()  # not where the exception still holds the frames, and these the old base

    def _base(self, plan: ServingPlan) -> Base:
        return Base(self.family, plan, self.device, self.dtype, self.settings.fast, self.settings.cache)

    def _lighten(self) -> None:
        """Take the next plan; called when the exception's frames, and what they held of the GPU, are gone."""
        failed = self.base.plan
        if not self._lighter:
            raise UserError(
                f"the GPU's memory ran out, and no plan is lighter than: {failed}",
                hint="make smaller pictures (--megapixels 0.25, --batch 1), or stop other programs on this GPU",
            )
        plan = self._lighter.pop(0)
        note(f"the GPU's memory ran out with: {failed}; going on with: {plan}")
        del self.base, self.adapters
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            forget_pinned()
        self.base = self._base(plan)
        self.adapters = Adapters(self.family, self.device, self.dtype, plan.ready_bytes)

    def _make(self, pieces: list[Piece], progress: sampling.Progress | None) -> list[Output]:
        first = pieces[0].request
        weighted = self._additions(pieces)
        conditioning = _batch([self.base.prompts.encode(piece.request.prompt, clip) for piece, (_, clip) in zip(pieces, weighted, strict=True)])
        negative = None
        if first.true_cfg_scale > 1:
            unwanted = [self.base.prompts.encode(piece.request.negative_prompt, clip) for piece, (_, clip) in zip(pieces, weighted, strict=True)]
            negative = sampling.Negative(_batch(unwanted), first.true_cfg_scale)
        self.base.prompts.release()
        transformer = self.base.transformer([loras for loras, _ in weighted], (first.width_px, first.height_px))
        start = torch.cat([sampling.noise(piece.seed, first.width_px, first.height_px) for piece in pieces])
        guidance = torch.tensor([piece.request.guidance_scale for piece in pieces])
        sources = [fitted(piece.request.source, piece.request) if piece.request.source else None for piece in pieces]
        known = self._known([source for source in sources if source])
        latents = sampling.denoise(self.family, transformer, conditioning, start, first.num_inference_steps, guidance, progress, negative, known)
        if not torch.isfinite(latents).all():
            raise UserError(
                "the numbers ran over while the picture was made", hint="a LoRA's weight is too high, or a LoRA is damaged: try without, and with lower weights"
            )
        images = [sampling.decode(self.family, self.base.vae(), row[None])[0] for row in latents]
        return [Output(_pasted(image, source), piece.seed, self.record()) for image, source, piece in zip(images, sources, pieces, strict=True)]

    def _additions(self, pieces: list[Piece]) -> list[tuple[tuple[Weighted, ...], tuple[Weighted, ...]]]:
        """What the pieces' LoRAs add to the transformer and to CLIP."""
        return [self.adapters.weighted(piece.loras) for piece in pieces]

    def _kind(self, piece: Piece) -> object:
        """What pictures of one batch have in common."""
        request, source = piece.request, piece.request.source
        loras = () if self.base.mixes else _set_of(piece)
        strength = source and (source.prompt_strength, source.mask is None)
        return request.width_px, request.height_px, request.num_inference_steps, request.true_cfg_scale, strength, loras

    def _batches(self, pieces: list[Piece], group: list[int]) -> Iterator[list[int]]:
        """The pieces of a group in batches, which have room for so many pictures, and for so many different sets of LoRAs."""
        part: list[int] = []
        for i in group:
            sets = {_set_of(pieces[j]) for j in (*part, i)} - {()}
            if len(part) == self.settings.batch or len(sets) >= STACK_PLACES:
                yield part
                part = []
            part.append(i)
        yield part

    def _known(self, sources: list[Source]) -> sampling.Known | None:
        """The pictures to start from, of the size of what is made, as latents."""
        if not sources:
            return None
        latents = torch.cat([self.family.encode_pictures(self.base.vae(), _pixels(source.image)) for source in sources])
        masks = [_latent_mask(source.mask) for source in sources if source.mask is not None]
        return sampling.Known(latents, sources[0].prompt_strength, torch.cat(masks) if masks else None)


def plans(family: Flux1, settings: Settings, device: torch.device, gpu_bytes: float | None = None, steps: int = STEPS) -> list[Estimate[ServingPlan]]:
    """The plan for this machine, or for a GPU with so much free, and lighter ones after it. On a CPU there is nothing to fit: what is asked for, in fp32."""
    on_gpu = device.type == "cuda" or gpu_bytes is not None
    needs = needs_of(family, settings, 2 if on_gpu else 4, steps)
    if on_gpu:
        speed = speed_of(gpu_bytes)
        if gpu_bytes is None:
            gpu_bytes = free_gpu_bytes(device)
        room = gpu_bytes, pinnable_bytes()
        precision = "fp8" if settings.fast and settings.precision == "auto" and multiplies_fp8(device) else settings.precision
        return choose(needs, speed, *room, precision, settings.swapped)
    precision = "fp32" if settings.precision in ("auto", "bf16") else settings.precision
    swapped = min(settings.swapped or 0, len(needs.sizes.blocks))
    merged = precision == "fp32" and not swapped and not settings.mixed
    if precision == "nf4" and swapped:
        raise UserError("blocks stored as nf4 stay on the GPU", hint="choose --precision int8, or no --blocks-to-swap")
    return [estimate(ServingPlan(precision, swapped, "merged" if merged else "stacked"), needs, CPU_SPEED)]


def needs_of(family: Flux1, settings: Settings, wide: int, steps: int = STEPS) -> Needs:
    """What pictures ask of a plan, from the model's configs alone. wide: bytes of a weight that is not stored smaller."""
    sizes = BaseSizes.count(family.empty_transformer(), family.text_tokens)
    tokens = (settings.pixels or family.native_px**2) // BUCKET_MULTIPLE_PX**2
    weights = {component: family.count_weights(component) for component in ("text_encoder", "text_encoder_2", "vae")}
    encoders = weights["text_encoder"] + weights["text_encoder_2"]
    return Needs(sizes, tokens, encoders * wide, weights["vae"] * wide, settings.batch, settings.mixed, settings.fast, steps)


def fitted(source: Source, request: Request) -> Source:
    """A picture to start from at the request's size, cut to its shape."""
    size = request.width_px, request.height_px
    image = ImageOps.fit(source.image.convert("RGB"), size, Image.Resampling.LANCZOS)
    mask = ImageOps.fit(source.mask.convert("L"), size, Image.Resampling.BILINEAR) if source.mask is not None else None
    return Source(image, mask, source.prompt_strength)


def _pasted(image: Image.Image, source: Source | None) -> Image.Image:
    """What a mask keeps is the picture's own, not what the VAE made of it."""
    return Image.composite(image, source.image, source.mask) if source and source.mask else image


def _pixels(image: Image.Image) -> Tensor:
    """A picture [1, 3, H, W] in -1..1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return values.permute(2, 0, 1)[None].float() / 127.5 - 1


def _latent_mask(mask: Image.Image) -> Tensor:
    """A mask [1, 1, H/8, W/8] in 0..1: a cell changes as much as the pixel in it that changes most, for the picture is put together pixel by pixel after it."""
    values = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, 1, mask.height, mask.width).float() / 255
    return torch.nn.functional.max_pool2d(values, VAE_SCALE)


def _set_of(piece: Piece) -> tuple[tuple[str, float], ...]:
    """What tells the LoRAs of pictures apart."""
    return tuple((identity(choice.file), choice.weight) for choice in piece.loras if choice.weight)


def _batch(several: list[Conditioning]) -> Conditioning:
    return Conditioning(torch.cat([one.embeds for one in several]), torch.cat([one.pooled for one in several]))


def steps_of(request: Request) -> int:
    """The steps that each picture of a request takes."""
    return sampling.steps_done(request.num_inference_steps, request.source.prompt_strength) if request.source else request.num_inference_steps


def _reporter(progress: Progress | None, watch: Watch | None, pictures: int, done: int, total: int) -> sampling.Progress:
    """Reports the steps of one batch as a part of all."""

    def report(step: int, expected: Callable[[], Tensor]) -> None:
        if progress:
            progress(done + step * pictures, total)
        if watch:
            watch(expected())

    return report
