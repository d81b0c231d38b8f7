"""Captions by a vision-language model, LLaVA or Qwen-VL.

The model is given the opening of the caption as the beginning of its answer and goes on with it, so it has nothing to forget.
"""

import gc
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import GenerationConfig

from captioning.cleaning import complete
from captioning.models import Loaded, first_line, load
from captioning.styles import Prompt
from lorabooth import hub
from lorabooth.errors import UserError, out_of_memory
from lorabooth.home import expanded

FILES = (*hub.ALLOWED, "*.jinja")
"""Weights, configs, tokenizers and chat templates, which are rendered in a sandbox."""
PHOTOS_AT_ONCE = 8
NEW_TOKENS = 128
"""Enough for two or three sentences."""
LONGER_SIDE_PX = 1024
"""A caption needs no more, and models that look at a photo tile by tile take time and memory for each."""
CLIP_MEAN = (122, 116, 104)
"""What LLaVA 1.5 was trained to see beside a photo that is not square."""
BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, TemplateError)
"""What comes of a processor that does not go with its model."""


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
        local = expanded(self._model)
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
        loaded = load(self.folder, self._precision)
        ends = loaded.model.generation_config.eos_token_id or loaded.tokenizer.eos_token_id
        pad = loaded.tokenizer.pad_token_id
        loaded.model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=pad)
        return loaded

    def _answers(self, images: list[Image.Image]) -> list[str] | None:
        """How the model goes on, for each picture; None where memory is used up."""
        loaded = self.loaded
        pictures = [_squared(image) for image in images] if loaded.family.crops else images
        try:
            inputs = self._inputs(pictures)
            with torch.inference_mode():
                said = loaded.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        except BROKEN as error:
            if out_of_memory(error):
                return None
            why = first_line(error)
        else:
            return [self._answer(tokens) for tokens in said]
        del loaded
        self._release(keep_model=False)  # the next captioner needs its place
        raise UserError(f"it fails: {why}")

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        """Prompts [B, L], padded at the left, and what the model sees of the pictures."""
        loaded, tokenizer = self.loaded, self.loaded.tokenizer
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._prompt.instruction}]}]
        asked = str(loaded.processor.apply_chat_template(question, add_generation_prompt=True))
        text = asked + ("" if asked[-1:].isspace() else " ") + self._prompt.seen
        starts = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        inputs = loaded.processor(images=pictures, text=[text] * len(pictures), padding=True, add_special_tokens=not starts, return_tensors="pt")
        return inputs.to(loaded.model.device, loaded.dtype)

    def _answer(self, tokens: torch.Tensor) -> str:
        """The text of generated tokens [T]: without the opening, should it have been said again, and up to a whole sentence where the limit cut it off."""
        text = str(self.loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
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
