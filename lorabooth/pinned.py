"""Host memory that a GPU reads at full speed, without what torch's allocator would add to it.

torch rounds each pinned allocation up to a power of two (ATen/core/CachingHostAllocator.h): a FLUX linear of 75 MB takes 134.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 2**29
ALIGNED = 256
"""Bytes at whose multiples tensors begin, as CUDA's allocator has them."""
WASTE = 1.1
"""What the chunks hold over what is in them, at most, with FLUX's matrices of up to 94 MB: each ends where the next one would not have fitted."""


class PinnedMemory:
    """Chunks of pinned memory that tensors are put into one behind the other; they are freed together. pin: not without a GPU."""

    def __init__(self, pin: bool, chunk_bytes: int = CHUNK_BYTES):
        self.pin, self.chunk_bytes = pin, chunk_bytes
        self.chunks: list[Tensor] = []
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in this memory."""
        size = tensor.numel() * tensor.element_size()
        if not self.chunks or self._used + size > len(self.chunks[-1]):
            self.chunks.append(torch.empty(max(size, self.chunk_bytes), dtype=torch.uint8, pin_memory=self.pin))
            self._used = 0
        place = self.chunks[-1][self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // ALIGNED) * ALIGNED
        return place.copy_(tensor)
