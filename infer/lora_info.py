"""Everything that one LoRA file tells: of its header, of its tensors, and of how they fit the base."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from safetensors import safe_open

from infer import lora_facts
from infer.convert import layouts
from lorabooth import keys
from lorabooth.comparison import norm
from lorabooth.errors import UserError
from lorabooth.families.flux1 import ATTENTION, BLOCK, FEED_FORWARD, NORMS
from lorabooth.layout import ClipLayout, Layout
from lorabooth.lora import CLIP_PREFIX, PREFIX
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, additions, alpha_of

KINDS = {"attention": rf"{BLOCK}({ATTENTION})", "feed-forward": rf"{BLOCK}({FEED_FORWARD})", "norms": rf"{BLOCK}({NORMS})"}
"""Kinds of the transformer's layers; the rest are outside its blocks."""
OUTSIDE, CLIP, T5 = "outside the blocks", "CLIP", "T5"


@dataclass(frozen=True)
class Layer:
    """A layer of the base that a file changes: by how much (Frobenius norm), and whether with DoRA's scales."""

    name: str
    kind: str
    rank: int
    norm: float
    dora: bool


@dataclass(frozen=True)
class Kind:
    """The layers of one kind: those that a file changes, those that the base has, and the norm of all changes together."""

    changed: int
    of: int
    norm: float


def info(file: LoraFile) -> dict[str, Any]:
    """All of it, fit for JSON; where the tensors cannot be used, `problem` says why, and what needs them is missing."""
    told: dict[str, Any] = {
        "name": file.name,
        "path": str(file.path),
        "bytes": file.path.stat().st_size,
        "format": keys.format_of(file.shapes),
        "base": lora_facts.base(file),
        "trigger_word": file.trigger_word,
        "words_in_captions": lora_facts.words(file),
        "dtypes": lora_facts.counted(file.dtypes.values()),
        "dora": any("magnitude" in parts for parts in keys.layers(file.shapes).values()),
        "ranks": lora_facts.counted(lora_facts.ranks(file).values()),
        "training": lora_facts.training(file),
        "sha256": file.sha256,
        "tensors_sha256": file.tensors_sha256,
        "metadata": file.metadata,
        "problem": "",
    }
    try:
        return told | _of_tensors(file)
    except UserError as error:
        return told | {"problem": error.message}


def _of_tensors(file: LoraFile) -> dict[str, Any]:
    layout, clip, model = layouts(file)
    found = additions(file, layout, clip, model)
    changed = _layers(found)
    return {
        "fits": model,
        "layers_by_kind": {name: asdict(kind) for name, kind in _kinds(file, changed, layout, clip).items()},
        "norm": math.hypot(*(layer.norm for layer in changed)),
        "layers": [asdict(layer) for layer in changed],
        "left_out": list(found.left_out),
        **_strengths(file, set(found.left_out)),
    }


def _layers(found: Additions) -> list[Layer]:
    parts = [(PREFIX, module, kind_of(module), one) for module, one in found.transformer.items()]
    parts += [(CLIP_PREFIX, module, CLIP, one) for module, one in found.clip.items()]
    return [Layer(prefix + module, kind, len(one.down), norm(one), one.magnitude is not None) for prefix, module, kind, one in parts]


def kind_of(module: str) -> str:
    """The kind of one of the transformer's layers."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, module)), OUTSIDE)


def _kinds(file: LoraFile, changed: list[Layer], layout: Layout, clip: ClipLayout) -> dict[str, Kind]:
    there = Counter(map(kind_of, layout.sizes)) | Counter({CLIP: len(clip.sizes)})
    kinds = {}
    for kind in (*KINDS, OUTSIDE, CLIP):
        norms = [layer.norm for layer in changed if layer.kind == kind]
        kinds[kind] = Kind(len(norms), there[kind], math.hypot(*norms))
    of_t5 = sum(map(keys.of_t5, keys.layers(file.shapes)))
    return kinds | ({T5: Kind(of_t5, 0, 0.0)} if of_t5 else {})


def _strengths(file: LoraFile, left_out: set[str]) -> dict[str, Any]:
    alphas, strengths = [], []
    with safe_open(file.path, "pt") as opened:
        for name, parts in keys.layers(file.shapes).items():
            if "down" in parts and parts["down"] not in left_out:
                stored = opened.get_tensor(parts["alpha"]) if "alpha" in parts else None
                alpha, strength = alpha_of(file, name, stored, file.shapes[parts["down"]][0])
                alphas.append(f"{alpha:g}")
                strengths.append(f"{strength:g}")
    return {"alphas": lora_facts.counted(alphas), "strengths": lora_facts.counted(strengths)}
