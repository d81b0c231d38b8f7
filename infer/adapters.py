"""What the LoRA files of late requests add to the base, read once and kept ready on the device."""

from collections import OrderedDict

import torch

from infer.live import Weighted
from infer.loras import LoraChoice
from lorabooth.adapter_config import identity
from lorabooth.entry import printable
from lorabooth.families.flux1 import Flux1
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lowrank import Additions, LowRank, additions
from lorabooth.notes import note

NAMED = 5


class Adapters:
    """LoRA files as additions to one base model. limit_bytes: of those that are kept; the ones used least lately leave first."""

    def __init__(self, family: Flux1, device: torch.device, dtype: torch.dtype, limit_bytes: float):
        self.family, self.device, self.dtype, self.limit_bytes = family, device, dtype, limit_bytes
        self.layout, self.clip = Layout(sizes_of(family.empty_transformer())), ClipLayout(sizes_of(family.empty_clip()))
        self._read: OrderedDict[str, Additions] = OrderedDict()

    def weighted(self, loras: tuple[LoraChoice, ...]) -> tuple[tuple[Weighted, ...], tuple[Weighted, ...]]:
        """What LoRAs add to the transformer, and to CLIP; of weight 0 nothing. A UserError where one does not fit the base."""
        wanted = [choice for choice in loras if choice.weight]
        read = [self._additions(choice) for choice in wanted]
        pairs = list(zip(wanted, read, strict=True))
        transformer = tuple(Weighted(identity(choice.file), choice.weight, found.transformer) for choice, found in pairs)
        return transformer, tuple(Weighted(identity(choice.file), choice.weight, found.clip) for choice, found in pairs if found.clip)

    def _additions(self, choice: LoraChoice) -> Additions:
        key = identity(choice.file)
        if key not in self._read:
            found = additions(choice.file, self.layout, self.clip, self.family.model)
            if found.left_out:
                names = ", ".join(map(printable, found.left_out[:NAMED])) + f" and {len(found.left_out) - NAMED} more" * (len(found.left_out) > NAMED)
                note(f"{choice.file.path.name}: left out, for {self.family.model} has no place for them: {names}")
            self._read[key] = Additions(self._ready(found.transformer), self._ready(found.clip), found.left_out)
        self._read.move_to_end(key)
        while len(self._read) > 1 and sum(map(_bytes, self._read.values())) > self.limit_bytes:
            self._read.popitem(last=False)
        return self._read[key]

    def _ready(self, part: dict[str, LowRank]) -> dict[str, LowRank]:
        return {name: LowRank(one.down.to(self.device, self.dtype), one.up.to(self.device, self.dtype), one.magnitude) for name, one in part.items()}


def _bytes(found: Additions) -> int:
    return sum(t.numel() * t.element_size() for part in (found.transformer, found.clip) for one in part.values() for t in (one.down, one.up))
