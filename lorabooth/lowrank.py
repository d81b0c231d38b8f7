"""What a LoRA file adds to each linear of a base model, out of every format that trainers of FLUX.1 write.

Formats: diffusers and PEFT (ai-toolkit's too), kohya, BFL and ComfyUI, XLabs; the strength from `.alpha`, from
`lora_adapter_metadata` or from PEFT's adapter_config.json; DoRA's magnitudes (Liu et al. 2024, arXiv 2402.09353).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorabooth import keys
from lorabooth.adapter_config import adapter_config
from lorabooth.entry import printable
from lorabooth.errors import UserError
from lorabooth.layout import ClipLayout, Layout, Rows
from lorabooth.lora_file import LoraFile

MISSING_SHARE = 0.1
"""A file of which more of the layers are missing in the base was made for another model."""
NAMED = 3
"""Layers that a message names; the rest are counted."""


FRACTIONS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
NAME_IN_PATTERN = re.compile(r"\^?(?:\w|\\?\.)+\$?")
"""A module's name as an expression that matches it."""


@dataclass(frozen=True)
class LowRank:
    """W + up down, for a linear W [out, in]: down [rank, in], and up [out, rank] with the strength folded in, both fp32.

    magnitude: [out]; with it each row of the sum is scaled to that length (DoRA).
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Additions:
    """All that a file adds to the transformer and to CLIP, by module, and the names of its tensors that fit nothing in them."""

    transformer: dict[str, LowRank]
    clip: dict[str, LowRank]
    left_out: tuple[str, ...]


def additions(file: LoraFile, layout: Layout, clip: ClipLayout, model: str) -> Additions:
    """Read a file for the base model `model`; a UserError where it is none of a FLUX.1 model or of one with other widths."""
    tensors, left_out = _tensors(file), []
    layers: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if of_layer := keys.split(key):
            if of_layer[1] in layers[of_layer[0]]:
                raise UserError(f"{file.path.name} names a layer twice: {printable(key)} and {printable(layers[of_layer[0]][of_layer[1]][0])}")
            layers[of_layer[0]][of_layer[1]] = key, tensor
        else:
            left_out.append(key)
    found: tuple[dict[str, list[LowRank]], dict[str, list[LowRank]]] = defaultdict(list), defaultdict(list)
    missing = []
    for name, parts in layers.items():
        rows, in_clip = layout.find(name), clip.find(name)
        if not (rows or in_clip) or not {"down", "up"} <= parts.keys():
            left_out += [key for key, _ in parts.values()]
            missing += [name] if {"down", "up"} <= parts.keys() and not keys.of_text(name) else []
            continue
        sizes = (layout if rows else clip).sizes
        for module, low_rank in _split(file, model, name, parts, rows or in_clip, sizes):
            found[0 if rows else 1][module].append(low_rank)
    present = sum(map(len, found))
    beyond = [name for name in missing if layout.is_beyond(name)]
    if not present or beyond or len(missing) > MISSING_SHARE * len(layers):
        raise _of_another_model(file, model, beyond or missing or list(layers) or left_out)
    if not all(_same(one, other) for part in found for one, *others in part.values() for other in others):
        raise UserError(f"{file.path.name} names a layer twice, in two formats that differ; it cannot be told which one is meant")
    transformer, of_clip = ({module: one for module, (one, *_) in part.items()} for part in found)
    return Additions(transformer, of_clip, tuple(sorted(left_out)))


def _tensors(file: LoraFile) -> dict[str, Tensor]:
    try:
        tensors = load_file(file.path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file.path.name} cannot be read: {error}", hint="download it again") from None
    if method := keys.other_method(tensors):
        raise UserError(f"{file.path.name} is a {method[0]}, not a LoRA: {printable(method[1])}", hint="convert it to a LoRA with the program that trained it")
    for key, tensor in tensors.items():
        whole = tensor.dtype in WHOLE and (keys.split(key) or ("", ""))[1] == "alpha"  # sd-scripts' extracted LoRAs have it so
        if tensor.dtype not in FRACTIONS and not whole:
            raise UserError(
                f"{file.path.name} is damaged: {printable(key)} holds no fractions but {str(tensor.dtype).removeprefix('torch.')}", hint="download it again"
            )
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{file.path.name} is damaged: {printable(key)} holds numbers that are not finite", hint="use an earlier checkpoint of that training"
            )
    return tensors


def _split(file: LoraFile, model: str, name: str, parts: dict[str, tuple[str, Tensor]], rows: tuple[Rows, ...], sizes: Any) -> list[tuple[str, LowRank]]:
    """A layer of a file as the layers of diffusers that it stands for."""
    down, up = (parts[side][1].float().flatten(1) if parts[side][1].ndim > 1 else parts[side][1].float() for side in ("down", "up"))
    outputs, inputs = sum(_count(row) for row in rows), sizes[rows[0].module][1]
    made_for = printable(file.metadata.get("lorabooth.base") or "another model")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not len(down):
        raise UserError(f"{file.path.name} is damaged: the two halves of {name} do not fit together ({tuple(down.shape)} and {tuple(up.shape)})")
    if (up.shape[0], down.shape[1]) != (outputs, inputs):
        raise UserError(
            f"{file.path.name} does not fit {model}: {rows[0].module} takes {inputs} numbers and gives {outputs} there, "
            f"{down.shape[1]} and {up.shape[0]} in the LoRA (it is of {made_for})"
        )
    up = up * alpha_of(file, name, parts["alpha"][1] if "alpha" in parts else None, len(down))[1]
    if not torch.isfinite(up).all():
        raise UserError(f"{file.path.name} is damaged: the strength of {name} is not a number that can be used")
    magnitude = parts["magnitude"][1].float() if "magnitude" in parts else None
    if magnitude is not None and (magnitude.numel() != outputs or (magnitude.ndim > 1 and len(magnitude) != outputs)):
        raise UserError(f"{file.path.name} is a DoRA whose scales lie along the inputs of {name}", hint="only DoRA with a scale for each output is read")
    found = []
    for row in rows:
        part = torch.cat([up[where] for where in row.parts])
        used = part.any(0)  # what PEFT's q, k and v were padded with when they were fused
        scale = None if magnitude is None else torch.cat([magnitude.flatten()[where] for where in row.parts])
        found.append((row.module, LowRank(down[used], part[:, used].contiguous(), scale)))
    return found


def _same(one: LowRank, other: LowRank) -> bool:
    """Whether two are the same tensors: some files hold a LoRA in two formats."""
    if (one.magnitude is None) != (other.magnitude is None) or one.down.shape != other.down.shape:
        return False
    same_scale = one.magnitude is None or other.magnitude is None or torch.equal(one.magnitude, other.magnitude)
    return same_scale and torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def _count(rows: Rows) -> int:
    return sum(part.stop - part.start for part in rows.parts)


def alpha_of(file: LoraFile, name: str, stored: Tensor | None, rank: int) -> tuple[float, float]:
    """The alpha of a layer, from its tensor or from a description, and the strength that is made of it: what up down is multiplied with."""
    if stored is not None:
        alpha = float(stored) if stored.numel() == 1 else _damaged_alpha(file, name)
        return alpha, alpha / rank
    config = adapter_config(file, name)
    if "lora_alpha" not in config:
        return float(rank), 1.0
    module = re.sub(r"^(transformer|text_encoder|base_model\.model)\.", "", name)
    # PEFT takes the pattern's keys for regular expressions; trainers write names, and a file's expressions are not run here.
    if unknown := next((key for key in config["alpha_pattern"] if not NAME_IN_PATTERN.fullmatch(key)), None):
        raise UserError(f"{file.path.name} gives an alpha by an expression, which is not read: {printable(unknown)}", hint="convert it with PEFT")
    named = {re.sub(r"[\\$]", "", key): value for key, value in config["alpha_pattern"].items()}
    alpha = next((value for key, value in named.items() if _is_named(module, key)), config["lora_alpha"])
    return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_named(module: str, key: str) -> bool:
    """Whether a key of PEFT's patterns means a module: by the end of its name, or all of it behind ^ (peft/utils/other.py, get_pattern_key)."""
    return module == key[1:] if key.startswith("^") else f".{module}".endswith(f".{key}")


def _damaged_alpha(file: LoraFile, name: str) -> float:
    raise UserError(f"{file.path.name} is damaged: the alpha of {name} is not one number")


def _of_another_model(file: LoraFile, model: str, names: list[str]) -> UserError:
    made_for = printable(file.metadata.get("lorabooth.base") or "another kind of model")
    listed = ", ".join(map(printable, names[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return UserError(
        f"{file.path.name} does not fit {model}, which lacks these layers of it: {listed} (the LoRA is of {made_for})", hint="give a LoRA of a FLUX.1 model"
    )
