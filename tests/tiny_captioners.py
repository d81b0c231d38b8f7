"""Captioners of each family, of random weights and a few kilobytes, written as the hub's repositories have them: real classes, real processors."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SiglipVisionConfig,
)

from captioning.models import FAMILIES, photo_processor
from scripts.random_llava import CHAT, TINY, tokenizer, write_llava

WORDS = tokenizer()
IDS = {f"{name}_token_id": WORDS.convert_tokens_to_ids(token) for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"), ("image", "<image>"))}
TILES = [[28, 28], [28, 56], [56, 28], [56, 56]]
SPREAD = 0.3
"""Standard deviation of the weights: wide enough that the likeliest token is far ahead of the next, whatever else is in a batch."""
TEXT: dict[str, Any] = {**TINY.text, "initializer_range": SPREAD, **{name: IDS[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}}
QWEN_CHAT = CHAT.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def write(kind: str, folder: Path) -> Path:
    """A tiny model of the type `kind` in `folder`."""
    return write_llava(folder, TINY, torch.device("cpu"), torch.float32, SPREAD) if kind == "llava" else WRITERS[kind](folder)


def _llava_next(folder: Path) -> Path:
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TINY.vision, projection_dim=64),
        image_token_id=IDS["image_token_id"],
        image_grid_pinpoints=TILES,
    )
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=TILES)
    processor = LlavaNextProcessor(pictures, WORDS, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT)
    return _save(LlavaNextForConditionalGeneration, config, processor, folder)


def _llava_onevision(folder: Path) -> Path:
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**TINY.vision, vision_use_head=False),
        image_token_id=IDS["image_token_id"],
        image_grid_pinpoints=TILES,
    )
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=TILES)
    kind = photo_processor(FAMILIES["llava_onevision"])
    processor = kind(pictures, WORDS, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=CHAT)
    return _save(LlavaOnevisionForConditionalGeneration, config, processor, folder)


def _qwen(kind: str, folder: Path) -> Path:
    tokens = {
        name: WORDS.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    options = {"text_config": TEXT | {"rope_parameters": rope}, **{f"{name}_token_id": token for name, token in tokens.items()}}
    pictures = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84})
    processor = photo_processor(FAMILIES[kind])(pictures, WORDS, chat_template=QWEN_CHAT)
    if kind == "qwen2_vl":
        config = Qwen2VLConfig(vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "patch_size": 14}, **options)
        return _save(Qwen2VLForConditionalGeneration, config, processor, folder)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 28,
        "fullatt_block_indexes": [1],
    }
    return _save(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(vision_config=vision, **options), processor, folder)


def _save(kind: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    model.generation_config.eos_token_id = IDS["eos_token_id"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


WRITERS = {
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda folder: _qwen("qwen2_vl", folder),
    "qwen2_5_vl": lambda folder: _qwen("qwen2_5_vl", folder),
}
