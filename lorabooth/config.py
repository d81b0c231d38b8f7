"""`TrainConfig`: the one declaration of a training, for YAML, the command line, HTTP and the run's record.

Names are the hosted trainer's own where it has the input. Knows no torch.
"""

import difflib
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lorabooth.errors import UserError, is_utf8
from lorabooth.reading import read_limited

Target = Literal["attention", "attention+ff", "all-linear"]
Optimizer = Literal["auto", "adamw8bit", "adamw", "adam8bit", "adam", "lion8bit", "lion", "prodigy", "adagrad", "adafactor"]
CaptionPrecision = Literal["auto", "bf16", "nf4"]
LoraInit = Literal["default", "gaussian", "pissa"]
SigmaSampling = Literal["logit-normal", "uniform", "shifted"]
LrScheduler = Literal["constant", "linear", "cosine"]
LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]
Subject = Literal["person", "object", "style"]
Precision = Literal["auto", "bf16", "int8", "fp8", "nf4"]
NOT_RECIPE = ("hf_repo_id", "hf_private", "trackers", "wandb_project", "wandb_run", "wandb_entity")
"""Settings that are no part of the recipe: a run may be pushed elsewhere when it goes on, and its figures go elsewhere."""
TRACKERS = ("tensorboard", "wandb", "trackio")
FLUX_DEV = "black-forest-labs/FLUX.1-dev"
MODELS = ("mini", FLUX_DEV)
HOSTED_NAMES = {"wandb_sample_interval": "preview_every", "wandb_save_interval": "checkpoint_every", "wandb_sample_prompts": "preview_prompts"}
"""Inputs of the hosted trainer that are settings of ours by another name, for they do not need wandb."""


class TrainConfig(BaseModel):
    """What to train and how. Unknown keys are errors; the values never change after the start."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trigger_word: str = Field(
        min_length=1, max_length=100, description="Word that stands for the person in captions and prompts; rare and pronounceable, such as TOK."
    )
    model: str = Field(FLUX_DEV, description="Base model: a hub repository, a local diffusers folder, or 'mini' (shipped; runs on a CPU).")
    subject: Subject = Field(
        "person",
        description="What the photos show: person, object or style. Generated captions leave it out, and photos of a person need that person's consent.",
    )
    steps: int = Field(1000, ge=1, le=100_000, description="Optimiser steps.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate; prodigy takes it as a factor of its own.")
    optimizer: Optimizer = Field("auto", description=f"Optimiser: {', '.join(get_args(Optimizer))}. auto is adamw8bit on CUDA, adamw elsewhere.")
    warmup_steps: int = Field(20, ge=0, description="Steps over which the learning rate rises from zero.")
    lr_scheduler: LrScheduler = Field("constant", description="After the warm-up the learning rate stays, or falls to zero, linear or cosine, to the end.")
    batch_size: int = Field(1, ge=1, le=64, description="Photos a step, on each GPU.")
    gradient_accumulation: int = Field(1, ge=1, le=1000, description="Batches a step: their gradients are averaged before the optimiser moves.")
    resolution: str = Field("512,768,1024", description="Side lengths in px whose square is the area to train at; several by commas.")
    lora_rank: int = Field(16, ge=1, le=256, description="Rank of the LoRA.")
    lora_alpha: int | None = Field(None, ge=1, le=65_536, description="Strength of the LoRA is alpha / rank; default: the rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Share of a LoRA's inputs that a training step leaves out.")
    use_rslora: bool = Field(False, description="Strength alpha / sqrt(rank) instead of alpha / rank, which keeps high ranks from fading.")
    use_dora: bool = Field(False, description="Learn the length of each weight row apart from its direction (DoRA): slower, and not every program reads it.")
    lora_init: LoraInit = Field("default", description="Start of the LoRA: default, gaussian, or pissa (the base's own largest directions).")
    targets: Target | str = Field(
        "attention+ff", description="Layers that get a LoRA: attention, attention+ff, all-linear, or a regular expression over module names."
    )
    layers_to_optimize_regex: str = Field(
        "", description="Layers that get a LoRA, as the hosted trainer takes them: every linear in whose name this is found. Wins over targets."
    )
    train_text_encoder: bool = Field(False, description="Put a LoRA on the CLIP text encoder's attention too, as diffusers' option of this name does.")
    text_encoder_lr_ratio: float = Field(0.1, gt=0, le=1, description="The learning rate of CLIP's LoRA, as a share of the transformer's.")
    sigma_sampling: SigmaSampling = Field(
        "logit-normal", description="Noise levels of a step: logit-normal, uniform, or shifted (logit-normal, moved to more noise for larger pictures)."
    )
    loss_weighting: LossWeighting = Field("none", description="Weight of a noise level in the loss: none, sigma_sqrt or cosmap, as in diffusers.")
    caption_dropout_rate: float = Field(0.05, ge=0, le=1, description="Share of steps that train on the bare trigger instead of the caption.")
    autocaption: bool = Field(True, description="Write captions for the photos that have none; otherwise those train on the trigger word alone.")
    autocaption_prefix: str = Field("", description="Text put before every generated caption, in place of 'a photo of TOK' if it has the trigger word.")
    autocaption_suffix: str = Field("", description="Text put after every generated caption.")
    caption_model: str = Field(
        "auto",
        description="What writes captions: auto, template (one sentence for all photos), or a LLaVA or Qwen-VL (hub repository or local folder). "
        "auto is LLaVA 1.5 on a GPU, template elsewhere and for mini.",
    )
    caption_precision: CaptionPrecision = Field(
        "auto", description="Precision of the model that writes captions: auto, bf16 or nf4 (4 bits). auto is bf16 where it fits."
    )
    preservation_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each batch that keeps the base as it is where the trigger is not said, so that the LoRA does not show in everyone.",
    )
    class_phrase: str = Field(
        "a person", min_length=1, max_length=100, description="What stands for the trigger there: a person, a man, a dog. Of subject object: an object."
    )
    prior_rate: float = Field(0.0, ge=0, lt=1, description="Share of batches that train on photos of others, which --class-photos gives; with those 0.2.")
    horizontal_flip: bool = Field(False, description="Train on mirrored photos too. Off: faces are not symmetric, and writing turns round.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="Decay of the averaged weights that are exported; 0 exports the raw weights.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    weight_decay: float = Field(1e-4, ge=0, le=10, description="Weight decay of the optimiser.")
    loraplus_lr_ratio: float = Field(1.0, ge=1, le=64, description="How many times faster the LoRA's second matrices (B) learn than the first (LoRA+).")
    precision: Precision = Field("auto", description="Precision of the frozen base: auto, bf16, int8, fp8 or nf4. auto is the fastest that fits.")
    gradient_checkpointing: str = Field(
        "auto", description="Blocks whose activations are computed again in the backward pass: auto, none (or false), all (or true), or how many of them."
    )
    blocks_to_swap: int | None = Field(None, ge=0, description="Blocks that live in host memory and come to the GPU when it is their turn; default: as needed.")
    precompute_modulation: bool | None = Field(
        None, description="Compute the modulation ahead, so that its linears, 27 % of FLUX.1-dev, need not be on the GPU; default: as needed."
    )
    compile_blocks: bool | None = Field(None, description="Compile the transformer's blocks, a minute or two at the start; default: on a GPU, where it pays.")
    auto_retry: bool = Field(True, description="Where the GPU's memory runs out, go on from the last step with the next cheaper plan.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the noise, the order of photos and the LoRA's start.")
    checkpoint_every: int = Field(250, ge=1, description="Steps between checkpoints.")
    preview_every: int = Field(250, ge=0, description="Steps between preview pictures; 0 makes none.")
    validation_photos: int = Field(0, ge=0, description="Photos kept out of training, whose loss at fixed noise levels tells when to stop.")
    validation_every: int = Field(50, ge=1, description="Steps between two measurements of that loss.")
    preview_prompts: tuple[str, ...] = Field(("a portrait of [trigger]",), description="Prompts of the previews; [trigger] stands for the trigger word.")
    preview_seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the previews.")
    trackers: str = Field("tensorboard", description="Where the figures go besides metrics.jsonl: none, or tensorboard, wandb, trackio by commas.")
    wandb_project: str = Field("lorabooth", min_length=1, description="Project in wandb and trackio.")
    wandb_run: str = Field("", description="Name of the run there; default: the run's folder.")
    wandb_entity: str = Field("", description="User or team in wandb; default: your own.")
    hf_repo_id: str = Field("", description="Repository of the Hugging Face hub that the LoRA is pushed to when it is trained, owner/name; default: none.")
    hf_private: bool = Field(False, description="Make that repository private, where it is new.")

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, field: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(field.field_name)].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):  # YAML's yes, on and true
            raise ValueError("must be a number")
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and not is_utf8(text):
                raise ValueError("must be text in UTF-8")
        return value

    @field_validator("trigger_word", "class_phrase")
    @classmethod
    def _one_line(cls, value: str, field: ValidationInfo) -> str:
        example = "TOK" if field.field_name == "trigger_word" else "a person"
        if not value.strip() or not value.isprintable():
            raise ValueError(f"must be visible text on one line, such as {example}")
        if "[trigger]" in value:
            raise ValueError(f"must be a word of your own, such as {example}: [trigger] is what stands for the trigger word in prompts and captions")
        return " ".join(value.split())

    @model_validator(mode="before")
    @classmethod
    def _class_of_subject(cls, values: Any) -> Any:
        return {"class_phrase": "an object"} | values if isinstance(values, dict) and values.get("subject") == "object" else values

    @model_validator(mode="before")
    @classmethod
    def _hosted_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        renamed: dict[Any, Any] = {}
        for name, value in values.items():
            known = HOSTED_NAMES.get(name, name)
            if known in renamed:
                raise ValueError(f"{name} is another name of {known}; give one of them")
            renamed[known] = [line for line in value.splitlines() if line.strip()] if name == "wandb_sample_prompts" and isinstance(value, str) else value
        return renamed

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: str) -> str:
        names = [name.strip() for name in value.lower().split(",")]
        if names != ["none"] and not set(names) <= set(TRACKERS):
            raise ValueError(f"must be none, or some of {', '.join(TRACKERS)} by commas")
        return ",".join(dict.fromkeys(names))

    @field_validator("resolution", mode="before")
    @classmethod
    def _resolutions(cls, value: Any) -> str:
        parts = [part.strip() for part in str(value).split(",")]  # YAML reads a single one as a number
        if not all(part.isdecimal() and len(part) <= 4 and 64 <= int(part) <= 2048 for part in parts):
            raise ValueError("must be side lengths in px from 64 to 2048, such as 512,768,1024")
        return ",".join(parts)

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _recompute(cls, value: Any) -> str:
        words = {"true": "all", "yes": "all", "false": "none", "no": "none"}
        text = words.get(str(value).strip().lower(), str(value).strip().lower())
        if text not in ("auto", "none", "all") and not (text.isdecimal() and len(text) <= 4):
            raise ValueError("must be auto, none, all or a number of blocks")
        return text

    @model_validator(mode="after")
    def _together(self) -> "TrainConfig":
        if self.use_dora and self.lora_init == "pissa":
            raise ValueError("use_dora and lora_init pissa both rewrite what a LoRA starts from; choose one of them")
        if self.blocks_to_swap and self.gradient_checkpointing not in ("auto", "all"):
            raise ValueError("blocks_to_swap needs gradient_checkpointing auto or all: a swapped block's weights are gone when its backward pass wants them")
        if self.train_text_encoder and self.precompute_modulation:
            raise ValueError("precompute_modulation needs the pooled prompts ahead, and train_text_encoder changes them at each step; set one of them to false")
        if self.loraplus_lr_ratio > 1 and self.optimizer == "prodigy":
            raise ValueError("loraplus_lr_ratio wants two learning rates, and prodigy finds one for all; set it to 1 (as the default is, but for mini)")
        return self

    @property
    def resolutions_px(self) -> tuple[int, ...]:
        """The resolutions as numbers."""
        return tuple(int(part) for part in self.resolution.split(","))

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The trackers by accelerate's names."""
        return () if self.trackers == "none" else tuple(self.trackers.split(","))

    @property
    def alpha(self) -> int:
        """LoRA alpha; the rank unless set."""
        return self.lora_alpha or self.lora_rank

    def recipe(self) -> dict[str, Any]:
        """What is trained and how, as plain JSON types."""
        return self.model_dump(mode="json", exclude=set(NOT_RECIPE))


_KNOWN = {
    "model": MODELS,
    "caption_model": ("auto", "template"),
    "gradient_checkpointing": ("auto", "none", "all"),
    "trackers": ("none", *TRACKERS),
}


def known_values(name: str) -> tuple[str, ...]:
    """Values of a setting that have names, for a shell to complete: all that there are, or those beside numbers, folders and the like."""
    annotation = TrainConfig.model_fields[name].annotation
    return _KNOWN.get(name) or tuple(value for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal for value in get_args(part))


MAX_RECIPE_BYTES = 1 << 16
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def load_config(recipe: Path | None, values: dict[str, Any]) -> TrainConfig:
    """The recipe file (YAML) with `values` over it; values of None are left to the recipe or the default.

    Raises UserError for an unknown key (with the nearest known one) and for a value out of range, in one sentence.
    """
    merged = (read_recipe(recipe) if recipe else {}) | {k: v for k, v in values.items() if v is not None}
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
    if not name:  # of several settings together
        return reason
    return f"{name}: {reason[0].lower()}{reason[1:]} (got {_SHORT.repr(first['input'])})"


class _Recipe(yaml.SafeLoader):
    """YAML as people mean it: numbers and dates are text until a setting takes them (YAML 1.1 reads 1:30 as 90 and 0512 as 330), no name stands twice,
    and there are no aliases, which could stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"a recipe has no aliases (*{self.peek_event().anchor})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for name, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise yaml.YAMLError(f"{name} stands in it twice")
        return super().construct_mapping(node, deep)


_Recipe.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, as they stand there; a UserError where it is none."""
    try:
        content = yaml.load(read_limited(path, MAX_RECIPE_BYTES).decode(), _Recipe)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold settings as 'name: value' lines")
    return content
