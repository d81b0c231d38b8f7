"""The modulation computed ahead: 27 % of FLUX.1-dev's weights see one token a picture, and what they make of it is known from the seed.

Each block's modulation is a linear of the embedding of (noise level, guidance, pooled prompt). Nothing in it is trained unless a LoRA
sits on it, so for the batches of the next steps it is computed in one pass, with the linears coming from host memory one by
one, and they need no place on the GPU.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabooth.families.flux1 import NORMS
from lorabooth.pinned import PinnedMemory
from lorabooth.sizes import blocks_of, linears

Key = tuple[float, float, bytes]


class Given(nn.Module):
    """Stands in a linear's place and gives what was computed for the batch at work: [B, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        """The rows that `Modulation.show` put here."""
        assert self.rows is not None, "no modulation was shown for this pass"
        return self.rows


class Modulation:
    """The modulation linears of a transformer, in host memory, and what they gave for the moments that were asked for.

    A moment is a noise level, a guidance scale and a pooled prompt.
    """

    def __init__(self, transformer: nn.Module, device: torch.device):
        self.transformer, self.device = transformer, device
        self.dtype = next(transformer.parameters()).dtype
        self.linears: list[nn.Linear] = []
        self.given: list[Given] = []
        host = PinnedMemory(pin=True) if device.type == "cuda" else None
        for block in blocks_of(transformer):
            for name, linear in [(n, m) for n, m in linears(block) if re.fullmatch(NORMS, n)]:
                given = Given()
                block.set_submodule(name, given)
                self.given.append(given)
                for p in linear.parameters():
                    p.data = host.keep(p.data) if host else p.data
                self.linears.append(linear)
        self.rows: list[Tensor] = []
        self.known: dict[Key, int] = {}
        self.window = -1
        """Which window of batches the known moments are, for the training loop; -1 for others."""

    @torch.no_grad()
    def expect(self, sigma: Tensor, guidance: float, pooled: Tensor) -> None:
        """Compute the moments sigma [M], pooled [M, P] and forget all others."""
        sigma, self.window = sigma.to(self.dtype), -1
        self.known = {}
        for i, key in enumerate(self._keys(sigma, guidance, pooled)):
            self.known.setdefault(key, i)  # the first, beside those of its own batch
        # As FluxTransformer2DModel.forward has it.
        time, scale = sigma.to(self.device) * 1000, torch.full((len(sigma),), guidance, device=self.device).to(self.dtype) * 1000
        embed, prompts = self.transformer.get_submodule("time_text_embed"), pooled.to(self.device, self.dtype)
        moments = F.silu(embed(time, scale, prompts) if hasattr(embed, "guidance_embedder") else embed(time, prompts))
        self.rows = []
        for linear in self.linears:
            weight, bias = (None if t is None else t.to(self.device, non_blocking=True) for t in (linear.weight, linear.bias))
            self.rows.append(F.linear(moments, weight, bias))

    def show(self, sigma: Tensor, guidance: float, pooled: Tensor) -> None:
        """Put the moments of a batch, sigma [B] and pooled [B, P], in the linears' places; those nobody expected are computed now."""
        keys = self._keys(sigma.to(self.dtype), guidance, pooled)
        if not all(key in self.known for key in keys):
            self.expect(sigma, guidance, pooled)
        places = [self.known[key] for key in keys]
        # Batches are expected whole, so their rows stand together: views, where picking would start a kernel for each of 114 linears.
        together = places == list(range(places[0], places[0] + len(places)))
        picked = slice(places[0], places[0] + len(places)) if together else torch.tensor(places, device=self.device)
        for given, rows in zip(self.given, self.rows, strict=True):
            given.rows = rows[picked].data  # no view for autograd: the compiler would make the window's length a part of the code

    @contextmanager
    def sampling(self, sigmas: Tensor, guidance: float, pooled: Tensor) -> Iterator[None]:
        """For one picture of a pooled prompt [1, P]: the transformer is called once for each of sigmas [steps], in order."""
        self.expect(sigmas, guidance, pooled.expand(len(sigmas), -1))
        moments = iter(sigmas)
        handle = self.transformer.register_forward_pre_hook(lambda *_: self.show(next(moments).view(1), guidance, pooled))
        try:
            yield
        finally:
            handle.remove()

    def _keys(self, sigma: Tensor, guidance: float, pooled: Tensor) -> list[Key]:
        return [(s, guidance, p.contiguous().view(torch.uint8).numpy().tobytes()) for s, p in zip(sigma.tolist(), pooled, strict=True)]
