"""Blocks that live in host memory: each comes to the GPU when it is its turn, while the one before it is at work.

A swapped block is recomputed in the backward pass (train/placement.py), so what its backward needs is there again.
Text encoders that do not fit run the same way: exactly, and at the speed of the bus.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabooth.pinned import ALIGNED, PinnedMemory


@dataclass(frozen=True)
class Place:
    """A parameter, its values in host memory, and where they lie among its block's bytes on the device."""

    parameter: nn.Parameter
    host: Tensor
    start: int

    def view(self, memory: Tensor) -> Tensor:
        """The parameter's values among the block's bytes [n], uint8."""
        return memory[self.start : self.start + self.host.numel() * self.host.element_size()].view(self.host.dtype).view(self.host.shape)


class BlockSwap:
    """Keeps the frozen matrices of some blocks in host memory; two places on the device hold the one at work and the next.

    pin: a copy in memory that the GPU reads at full speed, beside what it does; without it the matrices stay where they are, and a copy waits.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device, pin: bool = True):
        self.device, self.at = device, -1
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        host, most = PinnedMemory(pin=True) if pin and self.stream is not None else None, 0
        self.places: list[list[Place]] = []
        for block in blocks:
            places, size = self._packed(block, host)
            self.places.append(places)
            most = max(most, size)
        self.slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        if self.stream is not None:
            for slot in self.slots:
                slot.record_stream(self.stream)  # freed while a block is on its way, they wait for it
        self.held: list[int | None] = [None, None]
        self.arrived: list[torch.cuda.Event | None] = [None, None]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self.bring(i))

    def _packed(self, block: nn.Module, host: PinnedMemory | None) -> tuple[list[Place], int]:
        """The block's frozen matrices in host memory, and the bytes that they take on the device; the rest of it goes to the device for good."""
        matrices = [p for p in block.parameters() if p.ndim == 2 and not p.requires_grad]
        for small in (*block.buffers(), *(p for p in block.parameters() if p.ndim != 2 or p.requires_grad)):
            small.data = small.data.to(self.device)
        places, end = [], 0
        for p in matrices:
            places.append(Place(p, host.keep(p.data) if host else p.data, end))
            p.data = places[-1].host
            end += -(-p.numel() * p.element_size() // ALIGNED) * ALIGNED
        return places, end

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
        for place in (place for places in self.places for place in places):
            place.parameter.data = place.host

    def _fetch(self, i: int) -> None:
        """Copy block i to its place, behind the work that was given to the device so far: the block that had the place may still be in use."""
        slot = i % 2
        if self.held[slot] == i:
            return
        self.held[slot] = i
        if self.stream is None:
            self._copy(i)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._copy(i)
            self.arrived[slot] = self.stream.record_event()

    def _copy(self, i: int) -> None:
        for place in self.places[i]:
            place.view(self.slots[i % 2]).copy_(place.host, non_blocking=True)
