"""Captions by a vision-language model: LLaVA and Qwen-VL, through transformers' own classes.

A class is chosen here by the model's type and never by what a repository asks for, so that no code of a repository can run.
The model is given the opening of the caption as the beginning of its answer and goes on with it, so it has nothing to forget.
"""

import gc
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from captioning.cleaning import complete
from captioning.styles import Prompt
from lorabooth import hub
from lorabooth.device import base_dtype, compute_device
from lorabooth.errors import UserError
from lorabooth.machine import memory_bytes

transformers_logging.disable_progress_bar()  # a bar for the tensors of a model would hide ours

FILES = (*hub.ALLOWED, "*.jinja")
"""Weights, configs, tokenizers and chat templates, which are rendered in a sandbox."""
PHOTOS_AT_ONCE = 8
NEW_TOKENS = 128
"""Enough for two or three sentences."""
LONGER_SIDE_PX = 1024
"""A caption needs no more, and models that look at a photo tile by tile take time and memory for each."""
WORKSPACE_BYTES = 2e9
"""What captioning takes beside the weights; where it is not enough, fewer photos are captioned at once."""
NF4_SHARE = 0.35
"""Size of the weights with 4-bit linears, of their size in bf16: vision tower, projector and output layer stay as they are."""
CLIP_MEAN = (122, 116, 104)
"""What LLaVA 1.5 was trained to see beside a photo that is not square."""


@dataclass(frozen=True)
class Family:
    """Classes of a kind of model, and the parts that stay in full precision where the rest has 4 bits."""

    model: str
    processor: str
    kept: tuple[str, ...]
    crops: bool = False
    """Whether its processor would cut a photo to the square in its middle: it is padded to one instead."""


LLAVA_KEPT = (".*vision_tower", ".*multi_modal_projector", "lm_head")
QWEN_KEPT = (".*visual", "lm_head")
FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", "LlavaProcessor", LLAVA_KEPT, crops=True),
    "llava_next": Family("LlavaNextForConditionalGeneration", "LlavaNextProcessor", LLAVA_KEPT),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor", LLAVA_KEPT),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", QWEN_KEPT),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", QWEN_KEPT),
}
"""By the model type in config.json."""


class WithoutVideo:
    """A processor of photos alone: those of video need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that it is made of."""
        return [name for name in super().get_attributes() if name != "video_processor"]  # type: ignore[misc]


@dataclass
class Loaded:
    """A model with its processor, on its device."""

    model: Any
    processor: Any
    family: Family
    dtype: torch.dtype


class VisionCaptioner:
    """Writes captions with the model of a hub repository or local folder, loaded when the first photo comes. Greedy: the same photos, the same words."""

    def __init__(self, model: str, prompt: Prompt, precision: str = "auto"):
        self.name = hub.display_name(model)
        self.opening = prompt.opening
        self._model, self._prompt, self._precision = model, prompt, precision
        self._at_once = PHOTOS_AT_ONCE

    @cached_property
    def folder(self) -> Path:
        """Where its files are; downloaded once if need be. Raises UserError."""
        local = Path(self._model).expanduser()
        return local if local.is_dir() else hub.download(self._model, FILES)

    @cached_property
    def key(self) -> str:
        """What its words depend on beside the photo: weights, prompt and this module's own settings."""
        files = [(f.name, f.resolve().name, f.stat().st_size) for f in sorted(self.folder.glob("*.*")) if f.is_file()]  # the hub cache names a file by its hash
        local = [f.stat().st_mtime_ns for f in sorted(self.folder.glob("*.safetensors")) if not f.is_symlink()]
        told = [self._prompt.instruction, self._prompt.seen, NEW_TOKENS, LONGER_SIDE_PX, self._precision]
        return hashlib.sha256(json.dumps([files, local, told]).encode()).hexdigest()

    def caption(self, images: list[Path]) -> list[str]:
        """How each opening goes on, in the order of the image files. Raises UserError where the model cannot do it."""
        texts: list[str] = []
        while len(texts) < len(images):
            part = self._answers([_opened(image) for image in images[len(texts) : len(texts) + self._at_once]])
            if part is None:
                self._release(keep_model=self._at_once > 1)
                if self._at_once == 1:
                    raise UserError("the GPU's memory is used up by a single photo")
                self._at_once //= 2
                continue
            texts += part
        return texts

    @cached_property
    def loaded(self) -> Loaded:
        """The model in memory. Raises UserError."""
        config = self._config()
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            raise UserError(f"it is of the type {config.get('model_type')!r}; known are {', '.join(FAMILIES)}")
        device = compute_device()
        dtype = base_dtype(device)
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "output_loading_info": True}
        if self._chosen_precision(device) == "nf4":
            options["quantization_config"] = quantization(family, dtype)
        try:
            processor = photo_processor(family).from_pretrained(self.folder, trust_remote_code=False)
            model, info = getattr(transformers, family.model).from_pretrained(self.folder, **options)
        except torch.OutOfMemoryError:
            raise UserError("the GPU's memory is used up") from None
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            ImportError,
            SafetensorError,
        ) as error:  # what it raises on broken files
            raise UserError(f"it cannot be loaded: {_first_line(error)}") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise UserError(f"its files lack {len(info['missing_keys']) + len(info['mismatched_keys'])} of the model's weights")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # what is generated must follow the prompt directly
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        _complete_processor(processor, model.config)
        ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
        model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        return Loaded(model.eval(), processor, family, dtype)

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict):
            raise UserError("it has no config.json that can be read")
        return config

    def _chosen_precision(self, device: torch.device) -> str:
        """bf16 (fp32 on the CPU) where it fits, else nf4; a UserError where neither does."""
        stored = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes()[1]
        full = stored * (1 if device.type == "cuda" else 2)
        needs = {"bf16": full + WORKSPACE_BYTES, "nf4": stored * NF4_SHARE + WORKSPACE_BYTES}
        wanted = list(needs) if self._precision == "auto" and device.type == "cuda" else ["bf16" if self._precision == "auto" else self._precision]
        for precision in wanted:
            if needs[precision] < free:
                return precision
        raise UserError(f"it needs {needs[wanted[-1]] / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free")

    def _answers(self, images: list[Image.Image]) -> list[str] | None:
        """How the model goes on, for each picture; None where memory is used up."""
        loaded = self.loaded
        pictures = [_squared(image) for image in images] if loaded.family.crops else images
        try:
            inputs = self._inputs(pictures)
            with torch.inference_mode():
                said = loaded.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        except torch.OutOfMemoryError:
            return None
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            RuntimeError,
            TemplateError,
        ) as error:  # of a processor that does not go with its model
            raise UserError(f"it fails: {_first_line(error)}") from error
        return [self._answer(tokens) for tokens in said]

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        """Prompts [B, L], padded at the left, and what the model sees of the pictures."""
        loaded, tokenizer = self.loaded, self.loaded.processor.tokenizer
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._prompt.instruction}]}]
        asked = str(loaded.processor.apply_chat_template(question, add_generation_prompt=True))
        text = asked + ("" if asked[-1:].isspace() else " ") + self._prompt.seen
        starts = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        inputs = loaded.processor(images=pictures, text=[text] * len(pictures), padding=True, add_special_tokens=not starts, return_tensors="pt")
        return inputs.to(loaded.model.device, loaded.dtype)

    def _answer(self, tokens: torch.Tensor) -> str:
        """The text of generated tokens [T]: without the opening, should it have been said again, and up to a whole sentence where the limit cut it off."""
        text = str(self.loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        text = re.sub(rf"\s*{re.escape(self._prompt.seen)}\b", "", text, count=1, flags=re.IGNORECASE) if _begins(text, self._prompt.seen) else text
        ends = self.loaded.model.generation_config.eos_token_id
        finished = bool(torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).any())
        return text if finished else complete(text)

    def _release(self, keep_model: bool) -> None:
        if not keep_model:
            self.__dict__.pop("loaded", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def photo_processor(family: Family) -> Any:
    """The processor's class, without its part for video."""
    return type(family.processor, (WithoutVideo, getattr(transformers, family.processor)), {})


def quantization(family: Family, dtype: torch.dtype) -> Any:
    """4 bits for the linears of the language model (nf4 with double quantisation, Dettmers et al. 2023, arXiv 2305.14314), computed in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(family.kept),
    )


def _complete_processor(processor: Any, config: Any) -> None:
    """Repositories of LLaVA from before these settings were the processor's have them in the model's config only."""
    if hasattr(processor, "patch_size") and processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        picture = image.convert("RGB")
    picture.thumbnail((LONGER_SIDE_PX, LONGER_SIDE_PX))
    return picture


def _squared(image: Image.Image) -> Image.Image:
    side = max(image.size)
    return ImageOps.pad(image, (side, side), color=CLIP_MEAN)


def _begins(text: str, opening: str) -> bool:
    return text.strip().casefold().startswith(opening.casefold())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
