"""LoRAs merged into the transformer's weights, and out again to the bit.

The weights as they were loaded are kept; each change of LoRAs computes the live ones from them anew, so nothing drifts,
a step costs what it costs without a LoRA, and a compiled transformer stays compiled: only values change.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorabooth.lowrank import LowRank


@dataclass(frozen=True)
class Weighted:
    """What one LoRA adds to each module of the transformer, and how much of it is wanted."""

    layers: dict[str, LowRank]
    weight: float


class LiveWeights:
    """The linears of a transformer whose weights follow the LoRAs. keep_on: where the untouched weights are kept, a device or the host."""

    def __init__(self, transformer: nn.Module, keep_on: torch.device):
        self.transformer, self.keep_on = transformer, keep_on
        self._untouched: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    @torch.no_grad()
    def apply(self, loras: tuple[Weighted, ...]) -> None:
        """Make the weights those of the base with exactly these LoRAs."""
        wanted: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
        for lora in loras:
            for module, low_rank in lora.layers.items():
                wanted[module].append((low_rank, lora.weight))
        stale, self._changed = self._changed | wanted.keys(), self._changed | wanted.keys()
        for module in stale:
            live = cast(nn.Linear, self.transformer.get_submodule(module)).weight
            if module not in self._untouched:
                kept = live.detach().to(self.keep_on, copy=True)
                self._untouched[module] = kept.pin_memory() if live.is_cuda and not kept.is_cuda else kept
            base = self._untouched[module].to(live.device, non_blocking=True)
            merge(base, wanted.get(module, []), live.data)
        self._changed = set(wanted)


@torch.no_grad()
def merge(base: Tensor, loras: list[tuple[LowRank, float]], out: Tensor) -> None:
    """out = base [out, in] with LoRAs, each by its weight; one product for all of them together, rounded once.

    A DoRA counts by its weight, too: at 0.5 the result is half-way between the base and what the DoRA makes of it.
    """
    if not loras:
        out.copy_(base)
        return
    start = base
    ups, downs = [], []
    for low_rank, weight in loras:
        down, up = low_rank.down.to(base.device, torch.float32), low_rank.up.to(base.device, torch.float32)
        if low_rank.magnitude is not None:
            gain = low_rank.magnitude.to(base.device) / (base.float() + up @ down).norm(dim=1)
            up = gain[:, None] * up
            start = start + (weight * (gain - 1)[:, None] * base).to(base.dtype)
        ups.append(weight * up)
        downs.append(down)
    torch.addmm(start, torch.cat(ups, 1).to(base.dtype), torch.cat(downs).to(base.dtype), out=out)
