"""The base model that a file names: a LoRA or a picture may come from anybody, and so may what it wants to have loaded."""

import re
from collections.abc import Sequence
from textwrap import shorten

from infer.loras import LoraChoice
from lorabooth.config import FLUX_DEV
from lorabooth.errors import UserError

KNOWN = re.compile(r"mini|black-forest-labs/[\w.-]{1,96}")
"""What is loaded because a file says so. Anything else has to be confirmed."""
SHOWN = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def confirmed(name: str, said_by: str) -> str:
    """The base model `name`; a UserError that asks for --model where it is none that everybody knows. said_by: "the LoRA x was trained"."""
    if KNOWN.fullmatch(name):
        return name
    if name.isprintable() and len(name) <= 96 and "/" not in name:
        raise UserError(f"{said_by} on a local folder named {name!r}", hint="say where it is with --model FOLDER")
    if not SHOWN.fullmatch(name):
        raise UserError(f"{said_by} on a base model whose name cannot be used", hint="name the right one with --model NAME or --model FOLDER")
    raise UserError(f"{said_by} on the base model {name}", hint=f"files may name anything; if you want that one loaded, say so: --model {name}")


def base_of(choices: Sequence[LoraChoice]) -> str:
    """The base model that LoRAs name; FLUX.1-dev where they name none."""
    named = {choice.file.metadata["lorabooth.base"]: choice.file.name for choice in choices if choice.file.metadata.get("lorabooth.base")}
    if len(named) > 1:
        shown = ", ".join(f"{lora} of {shorten(base, 60)}" for base, lora in sorted(named.items()))
        raise UserError(f"these LoRAs are of different base models: {shown}", hint="use LoRAs of one base model, or name it with --model")
    return next((confirmed(base, f"the LoRA {lora} was trained") for base, lora in named.items()), FLUX_DEV)
