"""Vision-language models through transformers' own classes: LLaVA 1.5, NeXT and OneVision, Qwen2-VL and Qwen2.5-VL, whole or in 4 bits.

A class is chosen here by the model's type and never by what a repository asks for, so that no code of a repository can run.
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from lorabooth.device import base_dtype, compute_device, free_gpu_bytes
from lorabooth.errors import UserError, out_of_memory
from lorabooth.machine import memory_bytes

transformers_logging.disable_progress_bar()  # a bar for the tensors of a model would hide ours

WORKSPACE_BYTES = 2e9
"""What captioning takes beside the weights; where it is not enough, fewer photos are captioned at once."""
NF4_SHARE = 0.35
"""Size of the weights with 4-bit linears, of their size in bf16: vision tower, projector and output layer stay as they are."""

BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises on files that are missing, damaged or of another model."""


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

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer


def load(folder: Path, precision: str) -> Loaded:
    """The model of a folder on this machine's device. precision: auto, bf16 or nf4. Raises UserError where it does not fit or is not whole."""
    config = _config(folder)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise UserError(f"it is of the type {config.get('model_type')!r}; known are {', '.join(FAMILIES)}")
    device = compute_device()
    dtype = base_dtype(device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "output_loading_info": True}
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    gc.collect()  # of a captioner that failed while it was loaded: transformers takes the room of all weights first
    free = free_gpu_bytes(device) if device.type == "cuda" else memory_bytes()[1]
    if fitting_precision(precision, stored, free, device.type == "cuda") == "nf4":
        options["quantization_config"] = quantization(family, dtype)
    try:
        processor = photo_processor(family).from_pretrained(folder, trust_remote_code=False)
        model, info = getattr(transformers, family.model).from_pretrained(folder, **options)
    except BROKEN as error:
        if out_of_memory(error):
            raise UserError("the GPU's memory is used up") from None
        raise UserError(f"it cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise UserError(f"its files lack {len(info['missing_keys']) + len(info['mismatched_keys'])} of the model's weights")
    processor.tokenizer.padding_side = "left"  # what is generated must follow the prompt directly
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    _complete_processor(processor, model.config)
    return Loaded(model.eval(), processor, family, dtype)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError("it has no config.json that can be read")
    return config


def fitting_precision(wanted: str, stored_bytes: float, free_bytes: float, gpu: bool) -> str:
    """bf16 where the weights fit (the CPU computes in fp32, twice as large), else nf4; a UserError where neither does. wanted: auto, or one of the two."""
    needs = {"bf16": stored_bytes * (1 if gpu else 2) + WORKSPACE_BYTES, "nf4": stored_bytes * NF4_SHARE + WORKSPACE_BYTES}
    choices = list(needs) if wanted == "auto" else [wanted]
    for precision in choices:
        if needs[precision] < free_bytes:
            return precision
    raise UserError(f"it needs {needs[choices[-1]] / 1e9:.1f} GB of memory and {free_bytes / 1e9:.1f} GB are free")


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


def first_line(error: Exception) -> str:
    """What a library says of a failure, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
