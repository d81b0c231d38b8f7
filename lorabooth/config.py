"""`TrainConfig`: the one declaration of a training, for YAML, the command line, HTTP and the run's record.

Names are the hosted trainer's own where it has the input. Knows no torch.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorabooth.errors import UserError

Target = Literal["attention", "attention+ff", "all-linear"]


class TrainConfig(BaseModel):
    """What to train and how. Unknown keys are errors; the values never change after the start."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trigger_word: str = Field(
        min_length=1, max_length=100, description="Word that stands for the person in captions and prompts; rare and pronounceable, such as TOK."
    )
    model: str = Field(
        "black-forest-labs/FLUX.1-dev", description="Base model: a hub repository, a local diffusers folder, or 'mini' (shipped; runs on a CPU)."
    )
    steps: int = Field(1000, ge=1, le=100_000, description="Optimiser steps.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW; linear warm-up, then constant.")
    warmup_steps: int = Field(20, ge=0, description="Steps over which the learning rate rises from zero.")
    batch_size: int = Field(1, ge=1, le=64, description="Photos a step, on each GPU.")
    resolution: str = Field("512,768,1024", description="Side lengths in px whose square is the area to train at; several by commas.")
    lora_rank: int = Field(16, ge=1, le=256, description="Rank of the LoRA.")
    lora_alpha: int | None = Field(None, ge=1, description="Strength of the LoRA is alpha / rank; default: the rank.")
    targets: Target | str = Field(
        "attention+ff", description="Layers that get a LoRA: attention, attention+ff, all-linear, or a regular expression over module names."
    )
    caption_dropout_rate: float = Field(0.05, ge=0, le=1, description="Share of steps that train on the bare trigger instead of the caption.")
    caption_prefix: str = Field("", description="Text put before every generated caption.")
    caption_suffix: str = Field("", description="Text put after every generated caption.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="Decay of the averaged weights that are exported; 0 exports the raw weights.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of AdamW.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass: a third slower, but tens of GB lighter at 1024 px.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the noise, the order of photos and the LoRA's start.")
    checkpoint_every: int = Field(250, ge=1, description="Steps between checkpoints.")
    preview_every: int = Field(250, ge=0, description="Steps between preview pictures; 0 makes none.")
    preview_prompts: tuple[str, ...] = Field(("a portrait of [trigger]",), description="Prompts of the previews; [trigger] stands for the trigger word.")
    preview_seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the previews.")

    @field_validator("trigger_word")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError("must be visible text on one line, such as TOK")
        return value.strip()

    @field_validator("resolution", mode="before")
    @classmethod
    def _resolutions(cls, value: Any) -> str:
        parts = [part.strip() for part in str(value).split(",")]  # YAML reads a single one as a number
        if not all(part.isdecimal() and len(part) <= 4 and 64 <= int(part) <= 2048 for part in parts):
            raise ValueError("must be side lengths in px from 64 to 2048, such as 512,768,1024")
        return ",".join(parts)

    @property
    def resolutions_px(self) -> tuple[int, ...]:
        """The resolutions as numbers."""
        return tuple(int(part) for part in self.resolution.split(","))

    @property
    def alpha(self) -> int:
        """LoRA alpha; the rank unless set."""
        return self.lora_alpha or self.lora_rank

    def recipe(self) -> dict[str, Any]:
        """All values as plain JSON types."""
        return self.model_dump(mode="json")


def load_config(recipe: Path | None, values: dict[str, Any]) -> TrainConfig:
    """The recipe file (YAML) with `values` over it; values of None are left to the recipe or the default.

    Raises UserError for an unknown key (with the nearest known one) and for a value out of range, in one sentence.
    """
    merged = (_read_yaml(recipe) if recipe else {}) | {k: v for k, v in values.items() if v is not None}
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """The first problem of a validation error in one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
        return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(TrainConfig.model_fields)}")
    if first["type"] == "missing" and name == "trigger_word":
        return "a trigger word is missing; give one with --trigger-word TOK"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {reason[0].lower()}{reason[1:]} (got {first['input']!r})"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}", hint="shipped recipes are in configs/, such as configs/person.yaml") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a recipe", hint="shipped recipes are in configs/, such as configs/person.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold settings as 'name: value' lines")
    return content
