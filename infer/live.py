"""LoRAs merged into the transformer's weights, and out again to the bit.

The weights as they were loaded are kept; each change of LoRAs computes the live ones from them anew, so nothing drifts,
a step costs what it costs without a LoRA, and a compiled transformer stays compiled: only values change.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorabooth.lowrank import LowRank
from lorabooth.pinned import PinnedMemory
from lorabooth.quantized import QuantizedLinear


@dataclass(frozen=True)
class Weighted:
    """What one LoRA adds to each module of a model, and how much of it is wanted. Two are equal by what tells their files apart and their weight."""

    identity: str
    weight: float
    layers: dict[str, LowRank] = field(compare=False, repr=False)


class LiveWeights:
    """The linears of a model whose weights follow the LoRAs. keep_on: where the untouched weights are kept, a device or the host.

    untouched: the weights of those linears that are stored in 8 bits, as they were before, taken out of the mapping; others are
    copied when they are first changed.
    """

    def __init__(self, model: nn.Module, keep_on: torch.device, untouched: dict[str, Tensor] | None = None):
        self.keep_on = keep_on
        self.applied: tuple[Weighted, ...] = ()
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._host = PinnedMemory(pin=torch.cuda.is_available())
        self._untouched: dict[str, Tensor] = {}
        while untouched:  # taken out one by one: two copies of a base would fill the host's memory
            name, weight = untouched.popitem()
            self._untouched[name] = self._kept(weight)
        self._changed: set[str] = set()

    @torch.no_grad()
    def apply(self, loras: tuple[Weighted, ...]) -> None:
        """Make the weights those of the base with exactly these LoRAs."""
        if loras == self.applied:
            return
        wanted: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
        for lora in loras:
            for module, low_rank in lora.layers.items():
                wanted[module].append((low_rank, lora.weight))
        stale = self._changed | wanted.keys()
        self._changed = stale  # should this break off, the next one mends all that it may have touched
        self.applied = (Weighted("broken off", 0, {}),)
        for module in sorted(stale):
            linear = self._linears[module]
            live = linear.weight
            if module not in self._untouched:
                self._untouched[module] = self._kept(live.detach())
            base = self._untouched[module].to(live.device, non_blocking=True)
            if isinstance(linear, QuantizedLinear):
                whole = torch.empty_like(base)
                merge(base, wanted.get(module, []), whole)
                linear.store(whole)
            else:
                merge(base, wanted.get(module, []), live.data)
        self._changed, self.applied = set(wanted), loras

    def _kept(self, weight: Tensor) -> Tensor:
        return self._host.keep(weight) if self.keep_on.type == "cpu" else weight.to(self.keep_on, copy=True)


@torch.no_grad()
def merge(base: Tensor, loras: list[tuple[LowRank, float]], out: Tensor) -> None:
    """out = base [out, in] with LoRAs, each by its weight; one product for all of them together, rounded once.

    A DoRA counts by its weight, too: at 0.5 the result is half-way between the base and what the DoRA makes of it.
    """
    if not loras:
        out.copy_(base)
        return
    if len(loras) == 1 and loras[0][0].magnitude is None:
        one, weight = loras[0]
        torch.addmm(base, one.up.to(base.device, base.dtype), one.down.to(base.device, base.dtype), alpha=weight, out=out)
        return
    start, ups, downs = base, [], []
    for low_rank, weight in loras:
        down, up = low_rank.down.to(base.device, torch.float32), low_rank.up.to(base.device, torch.float32)
        if low_rank.magnitude is not None:
            gain = gain_of(base.float(), low_rank, up @ down)
            up = gain[:, None] * up
            start = start + (weight * (gain - 1)[:, None] * base).to(base.dtype)
        ups.append(weight * up)
        downs.append(down)
    torch.addmm(start, torch.cat(ups, 1).to(base.dtype), torch.cat(downs).to(base.dtype), out=out)


def gain_of(base: Tensor, low_rank: LowRank, change: Tensor) -> Tensor:
    """By how much DoRA lengthens each row of base + change (both [out, in], fp32): [out] (Liu et al. 2024, arXiv 2402.09353, eq. 5)."""
    return cast(Tensor, low_rank.magnitude).to(base.device, torch.float32) / (base + change).norm(dim=1)
