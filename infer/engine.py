"""`Engine`: a loaded base model that makes pictures, with LoRAs applied per request. Knows no HTTP and no files but models.

The text encoders are loaded for a prompt that is not in the cache of encoded prompts and leave before the transformer
works, unless the model is small; so a bf16 FLUX.1-dev needs the memory of its transformer, not of the whole pipeline.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_base import set_adapters_for_text_encoder
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel

from infer.loras import LoraChoice
from infer.request import Request
from lorabooth import sampling
from lorabooth.device import base_dtype, check_gpu, check_memory, compute_device
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning

Progress = Callable[[int, int], None]
"""Called after each denoising step: steps done, steps in all (over all outputs)."""


@dataclass(frozen=True)
class Output:
    """A picture and the seed that makes it again."""

    image: Image.Image
    seed: int


class Engine:
    """One base model, loaded part by part as it is needed."""

    def __init__(self, model: str):
        self.family = load_family(model)
        check_gpu(self.family.native_px, model)
        self.device = compute_device()
        self.dtype = base_dtype(self.device)
        self._transformer: FluxTransformer2DModel | None = None
        self._vae: AutoencoderKL | None = None
        self._prompts: dict[tuple[str, tuple[tuple[str, float], ...]], Conditioning] = {}
        self._applied: tuple[LoraChoice, ...] = ()

    def generate(self, request: Request, loras: tuple[LoraChoice, ...] = (), progress: Progress | None = None) -> Iterator[Output]:
        """The pictures of a request, one at a time; a picture depends on the request and its seed, not on what ran before."""
        conditioning = self._encode(request.prompt, loras)
        self._with_loras(loras)  # what is wrong with them is said before the work begins
        total = request.num_outputs * request.num_inference_steps
        for i in range(request.num_outputs):
            seed = (request.seed + i) % 2**32
            start = sampling.noise(seed, request.width_px, request.height_px)
            done = i * request.num_inference_steps
            report = (lambda step, done=done: progress(done + step, total)) if progress else None
            transformer = self._with_loras(loras)  # again: between two outputs another request may have changed them
            latents = sampling.denoise(self.family, transformer, conditioning, start, request.num_inference_steps, request.guidance_scale, report)
            yield Output(sampling.decode(self.family, self._loaded_vae(), latents)[0], seed)

    @property
    def _small(self) -> bool:
        return self.family.native_px < 512

    def _encode(self, prompt: str, loras: tuple[LoraChoice, ...]) -> Conditioning:
        """The prompt as the text encoders read it with these LoRAs, of which few have a part for CLIP."""
        clip_loras = tuple(choice for choice in loras if choice.file.has_clip_part)
        key = prompt, tuple((choice.file.sha256, choice.weight) for choice in clip_loras)
        if key not in self._prompts:
            encoders = self.family.text_encoders(self.device, self.dtype)
            for i, choice in enumerate(clip_loras):
                self._attach_clip(encoders.text_encoder, choice, f"lora{i}")
            if clip_loras:
                set_adapters_for_text_encoder([f"lora{i}" for i in range(len(clip_loras))], encoders.text_encoder, [choice.weight for choice in clip_loras])
            self._prompts[key] = self.family.encode_prompts(encoders, [prompt])
            del encoders
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return self._prompts[key]

    def _loaded_vae(self) -> AutoencoderKL:
        if self._vae is None:
            self._vae = self.family.vae(self.device, self.dtype)
        return self._vae

    def _with_loras(self, loras: tuple[LoraChoice, ...]) -> FluxTransformer2DModel:
        """The transformer with exactly these LoRAs on it."""
        if self._transformer is None:
            if not self._small:
                check_memory(24_000_000_000, f"the transformer of {self.family.model} in bf16", "use a GPU with at least 32 GB, or --model mini")
            self._transformer = self.family.transformer(self.device, self.dtype)
        if loras == self._applied:
            return self._transformer
        for choice in loras:
            choice.file.check_fits(self._transformer, self.family.model)
        self._detach()
        try:
            for i, choice in enumerate(loras):
                self._attach(choice, f"lora{i}")
            if loras:
                self._transformer.set_adapters([f"lora{i}" for i in range(len(loras))], [choice.weight for choice in loras])
        except BaseException:  # one that loaded before the one that did not must not stay in the pictures
            self._detach()
            raise
        self._applied = loras
        return self._transformer

    def _detach(self) -> None:
        """Take off every LoRA that is on the transformer, whatever state a failure left it in."""
        assert self._transformer is not None
        names = list(getattr(self._transformer, "peft_config", {}))
        if names:
            self._transformer.delete_adapters(names)
        self._applied = ()

    def _attach(self, choice: LoraChoice, name: str) -> None:
        """Load one file through diffusers' own reader, which knows the formats of other trainers too."""
        assert self._transformer is not None
        state, alphas, metadata = self._read(choice)
        state = {key: value for key, value in state.items() if key.startswith("transformer.")}
        if not state:
            raise UserError(f"{choice.file.path.name} holds no layer that a FLUX transformer has")
        try:
            self._transformer.load_lora_adapter(state, network_alphas=alphas, adapter_name=name, metadata=metadata)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:  # what diffusers and PEFT raise on shapes that do not fit together
            raise _unreadable(choice, self.family.model) from error
        self._transformer.requires_grad_(False)

    def _attach_clip(self, text_encoder: CLIPTextModel, choice: LoraChoice, name: str) -> None:
        """Put a file's part for CLIP on it."""
        state, alphas, metadata = self._read(choice)
        try:
            FluxPipeline.load_lora_into_text_encoder(state, alphas, text_encoder, prefix="text_encoder", adapter_name=name, metadata=metadata)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise _unreadable(choice, self.family.model) from error

    def _read(self, choice: LoraChoice) -> tuple[dict[str, Tensor], Any, Any]:
        """A file's tensors in diffusers' keys, its alphas and its metadata."""
        try:
            found: tuple[dict[str, Tensor], Any, Any] = FluxPipeline.lora_state_dict(str(choice.file.path), return_alphas=True, return_lora_metadata=True)
            return found
        except (ValueError, KeyError, IndexError, RuntimeError, OSError, SafetensorError) as error:  # what diffusers' converters raise on keys of other models
            raise _unreadable(choice, self.family.model) from error


def _unreadable(choice: LoraChoice, model: str) -> UserError:
    return UserError(f"{choice.file.path.name} is damaged or a LoRA of another kind of model than {model}", hint="give a LoRA of a FLUX.1 model")
