"""How far two LoRAs are from each other, layer by layer: norms of up down, found from the thin factors without making the matrices.

Both changes are written in one orthonormal basis of what their ups reach and one of what their downs read (QR, fp64). The basis
keeps norms and angles, so that the small matrices are as far from each other as the whole ones: no squares of large norms are
subtracted, which would leave nothing of a small difference.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabooth.lora import CLIP_PREFIX, PREFIX
from lorabooth.lowrank import Additions, LowRank


@dataclass(frozen=True)
class LayerDifference:
    """One layer in two LoRAs: Frobenius norms of both changes and of their difference, and their inner product.

    magnitude: how far the scales of a DoRA are from each other, of the larger; 1 where only one has any, 0 where none has.
    """

    name: str
    first: float
    second: float
    distance: float
    inner: float
    magnitude: float = 0.0
    in_first: bool = True
    in_second: bool = True

    @property
    def relative(self) -> float:
        """The difference, of the larger change: 0 the same, 1 where only one has the layer, 2 opposite."""
        larger = max(self.first, self.second)
        return self.distance / larger if larger else 0.0

    @property
    def worst(self) -> float:
        """The larger of the differences of the change and of the scales."""
        return max(self.relative, self.magnitude)


def compared(a: Additions, b: Additions) -> list[LayerDifference]:
    """All layers of either, by the names that diffusers has for them, in the order of the first. A layer that changes nothing is none."""
    found = []
    for prefix, ours, theirs in ((PREFIX, a.transformer, b.transformer), (CLIP_PREFIX, a.clip, b.clip)):
        for module in ours | theirs:
            layer = compare(prefix + module, ours.get(module), theirs.get(module))
            if layer.in_first or layer.in_second:
                found.append(layer)
    return found


def compare(name: str, one: LowRank | None, other: LowRank | None) -> LayerDifference:
    """One layer; None is a LoRA without it."""
    alike = _same_change(one, other)
    first, second = _in_one_basis([part for part in (one, None if alike else other) if part is not None], one is None)
    second = first if alike else second
    norms = float(first.norm()), float(second.norm())
    return LayerDifference(
        name, *norms, float((first - second).norm()), float((first * second).sum()), _magnitudes(one, other), _acts(one, norms[0]), _acts(other, norms[1])
    )


def cosine(layers: Iterable[LayerDifference]) -> float:
    """How alike the directions of two LoRAs are, all layers together: 1 the same but for the strength, 0 nothing in common. NaN where one changes nothing."""
    layers = list(layers)
    lengths = math.hypot(*(layer.first for layer in layers)) * math.hypot(*(layer.second for layer in layers))
    return max(-1.0, min(1.0, math.fsum(layer.inner for layer in layers) / lengths)) if lengths else math.nan


def overall(layers: Iterable[LayerDifference]) -> float:
    """The difference of all layers together, of the larger change."""
    layers = list(layers)
    larger = max(math.hypot(*(layer.first for layer in layers)), math.hypot(*(layer.second for layer in layers)))
    return math.hypot(*(layer.distance for layer in layers)) / larger if larger else 0.0


def difference(a: Additions, b: Additions) -> float:
    """The largest relative difference of any layer, in its change or its scales; 1 where one of them has a layer that the other lacks."""
    pairs = ((ours.get(m), theirs.get(m)) for ours, theirs in ((a.transformer, b.transformer), (a.clip, b.clip)) for m in ours | theirs)
    # What is the same to the bit is not measured: a conversion mostly is.
    return max((_magnitudes(one, other) if _same_change(one, other) else compare("", one, other).worst for one, other in pairs), default=0.0)


def norm(one: LowRank) -> float:
    """How large the change of a layer is (Frobenius)."""
    return compare("", one, None).first


def _same_change(one: LowRank | None, other: LowRank | None) -> bool:
    """Whether two are the same numbers, which is quickly seen and often so."""
    return one is not None and other is not None and torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def _in_one_basis(parts: list[LowRank], only_second: bool) -> tuple[Tensor, Tensor]:
    """up down of one or two layers as small matrices in one basis; zeros for the one that is not there."""
    ups = torch.linalg.qr(torch.cat([part.up.double() for part in parts], 1)).R
    downs = torch.linalg.qr(torch.cat([part.down.double() for part in parts]).T).R
    small, start = [], 0
    for part in parts:
        columns = slice(start, start + len(part.down))
        small.append(ups[:, columns] @ downs[:, columns].T)
        start += len(part.down)
    if len(small) == 1:
        small.insert(0 if only_second else 1, torch.zeros_like(small[0]))
    return small[0], small[1]


def _magnitudes(one: LowRank | None, other: LowRank | None) -> float:
    found = [part.magnitude.double() for part in (one, other) if part is not None and part.magnitude is not None]
    if len(found) < 2:
        return float(len(found))
    larger = max(float(found[0].norm()), float(found[1].norm()))
    return float((found[0] - found[1]).norm()) / larger if larger else 0.0


def _acts(part: LowRank | None, size: float) -> bool:
    return part is not None and (size > 0 or part.magnitude is not None)
