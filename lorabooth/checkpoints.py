"""The LoRA inside a run's checkpoint, which numbers its weights, as tensors by the names of a LoRA file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.hub import display_name, public_recipe
from lorabooth.lora import CLIP_MODULE, CLIP_PREFIX, LoraSpec, clip_tensors, save_lora, since, tensors
from lorabooth.runs import RunDir, sha256_file


def verified(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint whose files are what they were when it was written; None of any other."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        whole = "optimizer" in record and all(sha256_file(folder / name) == digest for name, digest in record["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def check_shapes(folder: Path, weights: list[Tensor], parameters: list[Tensor]) -> None:
    """Refuse weights from checkpoints in `folder` that were made with another recipe."""
    if [t.shape for t in weights] != [t.shape for t in parameters]:
        raise UserError(f"{folder} is of a run with another recipe", hint="delete that folder, then run the same command again")


def folders(run: RunDir) -> list[Path]:
    """The folders of a run's checkpoints, damaged ones too, from the first step to the last."""
    return sorted(run.checkpoints.glob("step-*"))


def named(run: RunDir, weights: list[Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint, in the order they were attached in, by their file keys; as a LoRA of the untouched base."""
    config = run.config
    state = _by_key(run, weights)
    return since(start_of(run), state) if config.lora_init == "pissa" else state


def start_of(run: RunDir) -> dict[str, Tensor]:
    """What a LoRA that began with the base's own directions began with. A UserError where that is damaged or gone: after a step no other will do."""
    hint = "start a new run with --out FOLDER" if folders(run) else "delete that file, then run the same command again"
    try:
        return load_file(run.lora_start)
    except SafetensorError:
        raise UserError(f"{run.lora_start} is damaged", hint=hint) from None
    except FileNotFoundError:
        raise UserError(f"{run.lora_start} is gone, with which the LoRA began", hint="start a new run with --out FOLDER") from None


def file_dtype(config: TrainConfig) -> torch.dtype:
    """What the weights of a run's LoRA files are stored in."""
    return torch.float32 if config.model == "mini" else torch.bfloat16


def save_as_lora(run: RunDir, folder: Path, file: Path, raw: bool = False) -> bool:
    """Write a checkpoint's averaged weights (raw: those without averaging) as a LoRA file; False where it is damaged or gone."""
    if verified(folder) is None:
        return False
    try:
        weights = load_file(folder / ("lora.safetensors" if raw else "ema.safetensors"))
    except FileNotFoundError:  # a training that goes on drops its older checkpoints
        return False
    config = run.config
    state = named(run, [weights[str(i)] for i in range(len(weights))])
    base = display_name(config.model)
    metadata = {
        "modelspec.trigger_phrase": config.trigger_word,
        "lorabooth.base": base,
        "lorabooth.recipe": json.dumps(public_recipe(config)),
        "ss_steps": str(int(folder.name.removeprefix("step-"))),
    }
    save_lora(file, state, LoraSpec.of(config), metadata, file_dtype(config))
    return True


def _by_key(run: RunDir, weights: list[Tensor]) -> dict[str, Tensor]:
    config, family = run.config, load_family(run.config.model)
    # Skeletons on the meta device turn numbers into names. They have no weights that a start could be taken from.
    spec, transformer = replace(LoraSpec.of(config), init="default"), family.empty_transformer()
    parameters = spec.attach(transformer, config.seed)
    keys, by_name = list(tensors(transformer)), dict(transformer.named_parameters())
    if config.train_text_encoder:
        text_encoder = family.empty_clip()
        parameters += spec.attach_clip(text_encoder, config.seed)
        keys += clip_tensors(text_encoder)
        by_name |= {CLIP_PREFIX + CLIP_MODULE + name.removeprefix(CLIP_MODULE): p for name, p in text_encoder.named_parameters()}
    check_shapes(run.checkpoints, weights, parameters)
    weight_of = {id(p): w for p, w in zip(parameters, weights, strict=True)}
    return {key: weight_of[id(by_name[_parameter_name(key)])] for key in keys}


def _parameter_name(key: str) -> str:
    """`transformer.a.b.lora_A.weight` -> PEFT's parameter name `a.b.lora_A.default.weight`; so for DoRA's `.lora_magnitude_vector`."""
    return re.sub(r"\.(lora_[AB]|lora_magnitude_vector)(\.weight)?$", r".\1.default.weight", key.removeprefix("transformer."))
