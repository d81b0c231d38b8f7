"""Blocks that live in host memory: each comes to the GPU when it is its turn, while the one before it is at work.

A swapped block is recomputed in the backward pass (train/placement.py), so what its backward needs is there again.
Text encoders that do not fit run the same way: exactly, and at the speed of the bus.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabooth.pinned import ALIGNED


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its block's bytes."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The parameter's values in a copy of the block's bytes [n], uint8."""
        return memory[self.start : self.start + self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)


class BlockSwap:
    """Keeps the frozen matrices of some blocks in (pinned) host memory; two places on the device hold the one at work and the next."""

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        self.device, self.at = device, -1
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.places, self.host = [], []
        for block in blocks:
            places, memory = self._packed(block)
            self.places.append(places)
            self.host.append(memory)
        most = max(len(memory) for memory in self.host)
        self.slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        self.held: list[int | None] = [None, None]
        self.arrived: list[torch.cuda.Event | None] = [None, None]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self.bring(i))

    def _packed(self, block: nn.Module) -> tuple[list[Place], Tensor]:
        matrices = [p for p in block.parameters() if p.ndim == 2 and not p.requires_grad]
        for small in (*block.buffers(), *(p for p in block.parameters() if p.ndim != 2 or p.requires_grad)):
            small.data = small.data.to(self.device)
        places, end = [], 0
        for p in matrices:
            places.append(Place(p, end, p.shape, p.dtype))
            end += -(-p.numel() * p.element_size() // ALIGNED) * ALIGNED
        memory = torch.empty(end, dtype=torch.uint8, pin_memory=self.stream is not None)
        for place in places:
            place.view(memory).copy_(place.parameter.data)
            place.parameter.data = place.view(memory)
        return places, memory

    def bring(self, i: int) -> None:
        """Make block i ready to run, and start to fetch the one that comes after it in this direction."""
        self._fetch(i)
        event = self.arrived[i % 2]
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)
        for place in self.places[i]:
            place.parameter.data = place.view(self.slots[i % 2])
        upward = i == 0 or i > self.at
        self.at = i
        following = i + 1 if upward else i - 1
        if 0 <= following < len(self.places):
            self._fetch(following)

    def settle(self) -> None:
        """Let the blocks' parameters be those in host memory, for somebody who reads them between two passes: the places hold two blocks only."""
        for places, memory in zip(self.places, self.host, strict=True):
            for place in places:
                place.parameter.data = place.view(memory)

    def _fetch(self, i: int) -> None:
        """Copy block i to its place, behind the work that was given to the device so far: the block that had the place may still be in use."""
        slot, memory = i % 2, self.host[i]
        if self.held[slot] == i:
            return
        self.held[slot] = i
        if self.stream is None:
            self.slots[slot][: len(memory)].copy_(memory)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.slots[slot][: len(memory)].copy_(memory, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
