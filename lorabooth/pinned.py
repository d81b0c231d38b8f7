"""Host memory that a GPU reads at full speed, without what torch's allocator would add to it.

torch rounds each pinned allocation up to a power of two (ATen/core/CachingHostAllocator.h): a FLUX linear of 75 MB takes 134.
"""

import torch
from torch import Tensor

from lorabooth.notes import note

CHUNK_BYTES = 2**30
ALIGNED = 256
"""Bytes at whose multiples tensors begin, as CUDA's allocator has them."""
WASTE = 1.1
"""What full chunks hold over what is in them, at most, with FLUX's matrices of up to 113 MB: each ends where none of the next ones would have fitted."""


def pinned_bytes(size: float) -> float:
    """What so many bytes of FLUX's matrices take in `PinnedMemory`: the last chunk is as large as the others."""
    return WASTE * size + CHUNK_BYTES if size else 0.0


class PinnedMemory:
    """Chunks of pinned memory that tensors are put into, each into the first that has room for it; they are freed together. pin: not without a GPU.

    Where the system pins no more, the rest is ordinary memory: WSL 2 pins half of the machine's at most, and containers may have a limit.
    """

    def __init__(self, pin: bool, chunk_bytes: int = CHUNK_BYTES):
        self.pin, self.chunk_bytes = pin, chunk_bytes
        self.chunks: list[Tensor] = []
        self._used: list[int] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in this memory."""
        return self.reserve(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def reserve(self, size: int) -> Tensor:
        """Room for so many bytes, uint8 [size]."""
        chosen = next((i for i, chunk in enumerate(self.chunks) if self._used[i] + size <= len(chunk)), len(self.chunks))
        if chosen == len(self.chunks):
            self.chunks.append(self._chunk(max(size, self.chunk_bytes)))
            self._used.append(0)
        start = self._used[chosen]
        self._used[chosen] += -(-size // ALIGNED) * ALIGNED
        return self.chunks[chosen][start : start + size]

    def _chunk(self, size: int) -> Tensor:
        if self.pin:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # CUDA's "out of memory", which is the host's here and no OutOfMemoryError
                self.pin = False
                pinned = sum(map(len, self.chunks)) / 1e9
                note(f"the system pins no more than {pinned:.1f} GB of memory for the GPU; the rest comes from ordinary memory, which takes longer")
        return torch.empty(size, dtype=torch.uint8)
