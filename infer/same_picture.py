"""Whether a LoRA that was written in another format makes the picture that it made before."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer.engine import Engine
from infer.loras import LoraChoice
from infer.request import Request
from lorabooth import hub
from lorabooth.errors import UserError
from lorabooth.lora_file import LoraFile

STEPS = 8
LEVELS = 2.0
"""Of 255, by which the pictures may differ on average. Rounding to bf16 moves one of the mini model by 0.1; without its LoRA it differs by tens."""


def picture_difference(before: Sequence[LoraChoice], after: Path, model: str) -> float | str:
    """The mean difference, in levels of 255, of a picture with the old LoRAs and one with the new file; a sentence where none can be made here.

    It is made where that takes seconds: on the mini model, or on a GPU with the base's files on this machine.
    """
    if model != "mini" and not (torch.cuda.is_available() and hub.is_here(model)):
        return f"no picture was made to compare, for that takes a GPU and the files of {model}"
    try:
        engine = Engine(model)
        trigger = next((choice.file.trigger_word for choice in before if choice.file.trigger_word), None)
        side = engine.family.native_px
        request = Request(f"a portrait of {trigger or 'a person'}", side, side, 42, num_inference_steps=STEPS)
        pictures = [_drawn(engine, request, loras) for loras in (tuple(before), (LoraChoice(LoraFile.read(after), 1.0),))]
    except UserError as error:
        return f"no picture could be made to compare: {error.message}"
    return float(np.abs(pictures[0] - pictures[1]).mean())


def _drawn(engine: Engine, request: Request, loras: tuple[LoraChoice, ...]) -> np.ndarray:
    image: Image.Image = next(iter(engine.generate(request, loras))).image
    return np.asarray(image, dtype=np.int16)
