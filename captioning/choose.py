"""Which captioners a run has, in the order of preference. The last one is the template, which needs no model: there is always a way on."""

import re
from pathlib import Path
from typing import Protocol

from captioning.styles import prompt_of
from captioning.template import TemplateCaptioner
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.home import expanded
from lorabooth.imports import heavy_imports

LLAVA = "llava-hf/llava-1.5-7b-hf"
QWEN = "Qwen/Qwen2-VL-2B-Instruct"
"""Of another family, and small: where LLaVA cannot be had or does not fit."""


class Captioner(Protocol):
    """What writes captions; `[trigger]` in them stands for the trigger word."""

    @property
    def name(self) -> str:
        """What notes call it."""
        ...

    @property
    def opening(self) -> str:
        """What each caption begins with, before what `caption` returns."""
        ...

    @property
    def key(self) -> str:
        """What its captions depend on beside the photo; empty where they need not be remembered. Raises UserError."""
        ...

    def caption(self, images: list[Path]) -> list[str]:
        """One caption for each image file, in their order. Raises UserError where it cannot; the next captioner goes on then."""
        ...


def captioners(config: TrainConfig) -> list[Captioner]:
    """The captioners of a run; none has been loaded or downloaded yet. Raises UserError where `caption_model` is no name of a model."""
    prompt = prompt_of(config)
    template = TemplateCaptioner(prompt.template)
    wanted = config.caption_model
    if wanted == "template" or (wanted == "auto" and (config.model == "mini" or not _has_gpu())):
        return [template]
    local = wanted and expanded(wanted).is_dir()
    if wanted != "auto" and not local and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", wanted):
        raise UserError(f"unknown caption_model {wanted!r}", hint=f"give auto, template, a hub repository such as {LLAVA}, or a local folder")
    with heavy_imports():
        from captioning.vision import VisionCaptioner

    others = (LLAVA, QWEN) if _has_gpu() else ()
    models = dict.fromkeys(others if wanted == "auto" else (wanted, *others))
    return [*(VisionCaptioner(model, prompt, config.caption_precision) for model in models), template]


def _has_gpu() -> bool:
    with heavy_imports():
        from lorabooth.device import compute_device

    return compute_device().type == "cuda"
