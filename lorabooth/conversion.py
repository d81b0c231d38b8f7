"""A LoRA from one trainer's format into another's, exactly; several made one; of a lower rank, with the error that costs.

Exact, since what other programs fuse into one linear is a block-diagonal matrix of ours: rank 3 r for query, key and value, 4 r for
the single blocks' first linear. Strength is folded in, and alpha is the rank wherever a format has one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorabooth import keys
from lorabooth.errors import UserError
from lorabooth.layout import Layout, Rows
from lorabooth.lora import CLIP_MODULE, CLIP_PREFIX, PREFIX
from lorabooth.lowrank import Additions, LowRank

FORMATS = keys.WRITTEN
DTYPES = dict(zip(keys.PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a layer's change, relative: the rounding of both matrices."""


def written(found: Additions, layout: Layout, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file in a format. Raises UserError where it cannot hold them."""
    named: dict[str, LowRank] = {}
    if form == "diffusers":
        named = {PREFIX + module: one for module, one in found.transformer.items()}
        clip = {CLIP_PREFIX + CLIP_MODULE + re.sub(r"^text_model\.", "", module): one for module, one in found.clip.items()}
        return _tensors(_of_one_rank(named) | _of_one_rank(clip), ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), dtype)
    for name, rows in layout.bfl().items():
        if any(row.module in found.transformer for row in rows):
            key = f"diffusion_model.{name}" if form == "comfyui" else "lora_unet_" + name.replace(".", "_")
            named[key] = _fused(name, rows, found.transformer)
    lost = found.transformer.keys() - {row.module for rows in layout.bfl().values() for row in rows}
    if lost:
        raise UserError(f"the format {form} has no name for: {', '.join(sorted(lost)[:3])}", hint="use --format diffusers")
    ends = ("lora_A.weight", "lora_B.weight", "dora_scale") if form == "comfyui" else ("lora_down.weight", "lora_up.weight", "dora_scale")
    result = _tensors(named, ends, dtype)
    # ComfyUI knows CLIP by kohya's names.
    clip = {"lora_te1_text_model_" + re.sub(r"^text_model\.", "", module).replace(".", "_"): one for module, one in found.clip.items()}
    result |= _tensors(clip, ("lora_down.weight", "lora_up.weight", "dora_scale"), dtype)
    with_alpha = clip | (named if form == "kohya" else {})
    return result | {f"{name}.alpha": torch.tensor(float(max(1, len(one.down)))) for name, one in with_alpha.items()}  # in bf16 257 would be 256


def _of_one_rank(named: dict[str, LowRank]) -> dict[str, LowRank]:
    """The same with zeros up to the highest rank.

    The format has no alpha, and diffusers before huggingface/diffusers#14409 takes that of most layers for all.
    """
    rank = max((len(one.down) for one in named.values()), default=0)

    def padded(one: LowRank) -> LowRank:
        more = rank - len(one.down)
        return replace(one, down=F.pad(one.down, (0, 0, 0, more)), up=F.pad(one.up, (0, more)))

    return {name: padded(one) for name, one in named.items()}


def _tensors(named: Mapping[str, LowRank], ends: tuple[str, str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, one in named.items():
        down, up = one.down, one.up
        if not len(down):  # a layer that changes nothing: programs want a rank of one at least
            down, up = torch.zeros(1, down.shape[1]), torch.zeros(len(up), 1)
        found[f"{name}.{ends[0]}"], found[f"{name}.{ends[1]}"] = down.to(dtype).contiguous(), up.to(dtype).contiguous()
        if one.magnitude is not None:
            scale = one.magnitude[:, None] if ends[2] == "dora_scale" else one.magnitude
            found[f"{name}.{ends[2]}"] = scale.to(dtype).contiguous()
    return found


def _fused(name: str, rows: Sequence[Rows], layers: Mapping[str, LowRank]) -> LowRank:
    """Several linears as the one that others have; what has no LoRA gets zeros."""
    present = [layers.get(row.module) for row in rows]
    there = [one for one in present if one is not None]
    height = max(part.stop for row in rows for part in row.parts)
    shared = len(there) == len(rows) and all(torch.equal(one.down, there[0].down) for one in there)
    down = there[0].down if shared else torch.cat([one.down for one in there])
    up, start = torch.zeros(height, len(down)), 0
    for row, one in zip(rows, present, strict=True):
        if one is None:
            continue
        columns = slice(0, len(down)) if shared else slice(start, start + len(one.down))
        _put(up[:, columns], row, one.up)
        start += len(one.down)
    if all(one.magnitude is None for one in there):
        return LowRank(down, up)
    if len(there) < len(rows) or any(one.magnitude is None for one in there):
        raise UserError(f"this DoRA has scales for a part of {name} only, which this format has no place for", hint="use --format diffusers")
    magnitude = torch.zeros(height)
    for row, one in zip(rows, there, strict=True):
        _put(magnitude, row, one.magnitude)  # type: ignore[arg-type]
    return LowRank(down, up, magnitude)


def _put(whole: Tensor, row: Rows, ours: Tensor) -> None:
    start = 0
    for part in row.parts:
        count = part.stop - part.start
        whole[part] = ours[start : start + count]
        start += count


def merged(several: Sequence[tuple[Additions, float]]) -> Additions:
    """One LoRA that does what several do together, each by its weight; of the sum of their ranks."""
    if len(several) == 1 and several[0][1] == 1:
        return several[0][0]
    parts: tuple[dict[str, list[tuple[LowRank, float]]], dict[str, list[tuple[LowRank, float]]]] = {}, {}
    for found, weight in several:
        for whole, part in zip(parts, (found.transformer, found.clip), strict=True):
            for module, one in part.items():
                if one.magnitude is not None:
                    raise UserError(
                        "a DoRA cannot be merged with others, or by a weight: its scales depend on the base", hint="apply it beside them when generating"
                    )
                whole.setdefault(module, []).append((one, weight))

    def joined(ones: list[tuple[LowRank, float]]) -> LowRank:
        return LowRank(torch.cat([one.down for one, _ in ones]), torch.cat([weight * one.up for one, weight in ones], 1))

    transformer, clip = ({module: joined(ones) for module, ones in part.items()} for part in parts)
    return Additions(transformer, clip, ())


def reduced(found: Additions, rank: int) -> tuple[Additions, float]:
    """The nearest LoRA of at most that rank, and the share of the change that is lost: the norm of the difference over that of the whole.

    By the singular values of up down (Eckart and Young 1936), found from the two thin factors.
    """
    lost = whole = 0.0

    def nearest(one: LowRank) -> LowRank:
        """One layer, at most of that rank; what is lost is counted."""
        nonlocal lost, whole
        if one.magnitude is not None:
            raise UserError("the rank of a DoRA cannot be reduced: its scales depend on the whole change", hint="leave out --rank")
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(one.up), torch.linalg.qr(one.down.T)
        core = r_up @ r_down.T
        if not torch.isfinite(core).all():
            raise UserError("the rank of this LoRA cannot be reduced: its numbers are too large", hint="leave out --rank")
        left, values, right = torch.linalg.svd(core)
        whole += float(values.square().sum())
        lost += float(values[rank:].square().sum())
        root = values[:rank].sqrt()
        return replace(one, up=q_up @ left[:, :rank] * root, down=(right[:rank] * root[:, None]) @ q_down.T)

    transformer, clip = ({module: nearest(one) for module, one in part.items()} for part in (found.transformer, found.clip))
    return Additions(transformer, clip, found.left_out), (lost / whole) ** 0.5 if whole else 0.0
