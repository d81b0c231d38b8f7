"""LoRAs beside the weights, several people's in one batch: each picture of a batch has its own.

Each linear has places for a few sets of LoRAs, all padded to one rank (Chen et al. 2023, Punica, arXiv 2310.18547, without
its kernel): two batched products that take the place of each picture by index. The weights stay as they are, so a base
stored in 8 or 4 bits can have LoRAs too. It costs a share of every step, where merged weights cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from infer.live import Weighted, gain_of
from infer.plan import STACK_PLACES
from lorabooth.errors import UserError
from lorabooth.quantized import QuantizedLinear, wide

RANK_STEP = 16
"""Ranks are padded to a multiple of it, so that few shapes are seen."""


@dataclass
class Choice:
    """Which place each picture of the batch takes: [B], shared by all linears."""

    places: Tensor


class StackedLinear(nn.Module):
    """y = W x + up[p] (down[p] x), with p the place of the picture. down: [places, rank, in], up: [places, out, rank], gain: [places, out]."""

    def __init__(self, base: nn.Linear, choice: Choice):
        super().__init__()
        self.base, self.choice = base, choice
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down: Tensor
        self.up: Tensor
        self.gain: Tensor | None
        self.register_buffer("down", None, persistent=False)
        self.register_buffer("up", None, persistent=False)
        self.register_buffer("gain", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's, for those who ask a linear for its precision."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]."""
        y: Tensor = self.base(x)
        if self.down is None:
            return y
        places = self.choice.places
        if self.gain is not None:
            shift = 0 if self.base.bias is None else self.base.bias
            gain = self.gain.index_select(0, places).to(y.dtype).view(len(places), *[1] * (y.ndim - 2), -1)
            y = torch.where(gain == 1, y, (y - shift) * gain + shift)  # that of pictures without a DoRA to the bit
        tokens, result = (x[:, None], y[:, None]) if x.ndim == 2 else (x, y)
        narrow = torch.bmm(tokens, self.down.index_select(0, places).transpose(1, 2))
        return torch.baddbmm(result, narrow, self.up.index_select(0, places).transpose(1, 2)).view(y.shape)


class StackedLoras:
    """Every linear of a transformer wrapped, with `places` sets of LoRAs at once; place 0 has none.

    rank: the rank all are padded to at first; a set of a higher one raises it for all. static: every linear has its places from the start, not
    when the first LoRA touches it. Either would make a compiled transformer compile again.
    """

    def __init__(
        self, transformer: nn.Module, device: torch.device, dtype: torch.dtype, places: int = STACK_PLACES, rank: int = RANK_STEP, static: bool = False
    ):
        self.device, self.dtype, self.places, self.rank = device, dtype, places, rank
        self.choice = Choice(torch.zeros(1, dtype=torch.long, device=device))
        self.layers: dict[str, StackedLinear] = {}
        self._held: list[tuple[Weighted, ...]] = [()] * places
        self.before_reading: Callable[[], None] = lambda: None
        """Called before weights are read, where they are not always in their places."""
        for name, module in list(transformer.named_modules()):
            if isinstance(module, nn.Linear):
                self.layers[name] = StackedLinear(module, self.choice)
                transformer.set_submodule(name, self.layers[name])
                if static:
                    self._make_places(self.layers[name])

    @torch.no_grad()
    def choose(self, sets: list[tuple[Weighted, ...]]) -> None:
        """Give each picture of the next batch its LoRAs: one set for each."""
        different = [one for i, one in enumerate(sets) if one and one not in sets[:i]]
        if len(different) >= self.places:
            raise UserError(f"{len(different)} different sets of LoRAs in one batch; the limit is {self.places - 1}")
        free = [i for i in range(1, self.places) if self._held[i] not in different]
        for one in different:
            if one not in self._held:
                self._put(free.pop(0), one)
        self.choice.places = torch.tensor([self._held.index(one) if one else 0 for one in sets], device=self.device)

    def _put(self, place: int, loras: tuple[Weighted, ...]) -> None:
        """Write a set into a place; the place's old one is gone."""
        self._held[place] = ()
        self.before_reading()
        needed = max((sum(len(lora.layers[name].down) for lora in loras if name in lora.layers) for name in self.layers), default=0)
        self._grow(max(self.rank, -(-needed // RANK_STEP) * RANK_STEP))
        for name, layer in self.layers.items():
            ours = [(lora.layers[name], lora.weight) for lora in loras if name in lora.layers]
            if ours and layer.down is None:
                self._make_places(layer)
            if layer.down is None:
                continue
            layer.down[place].zero_()
            layer.up[place].zero_()
            if layer.gain is not None:
                layer.gain[place].fill_(1)
            start = 0
            for low_rank, weight in ours:
                down, up = low_rank.down.to(self.device, torch.float32), low_rank.up.to(self.device, torch.float32)
                if low_rank.magnitude is not None:
                    gain = gain_of(whole_weight(layer.base, self.device), low_rank, up @ down)
                    up = gain[:, None] * up
                    if layer.gain is None:
                        layer.gain = torch.ones(self.places, layer.out_features, device=self.device)
                    layer.gain[place] += weight * (gain - 1)
                layer.down[place, start : start + len(down)] = down.to(self.dtype)
                layer.up[place, :, start : start + len(down)] = (weight * up).to(self.dtype)
                start += len(down)
        self._held[place] = loras

    def _make_places(self, layer: StackedLinear) -> None:
        layer.down = torch.zeros(self.places, self.rank, layer.in_features, device=self.device, dtype=self.dtype)
        layer.up = torch.zeros(self.places, layer.out_features, self.rank, device=self.device, dtype=self.dtype)

    def _grow(self, rank: int) -> None:
        added = rank - self.rank
        if not added:
            return
        self.rank = rank
        for layer in self.layers.values():
            if layer.down is not None:
                layer.down = torch.cat([layer.down, layer.down.new_zeros(self.places, added, layer.in_features)], 1)
                layer.up = torch.cat([layer.up, layer.up.new_zeros(self.places, layer.out_features, added)], 2)


@torch.no_grad()
def whole_weight(linear: nn.Linear, device: torch.device) -> Tensor:
    """A linear's weight [out, in] in fp32 on a device, however it is stored."""
    weight = linear.weight.to(device)
    if isinstance(linear, QuantizedLinear):
        return wide(weight, linear.scale.to(device), torch.float32)
    if weight.is_floating_point():
        return weight.float()
    # bitsandbytes' packed bits: what it gives for the unit vectors, without its bias.
    given = cast(Tensor, linear(torch.eye(linear.in_features, device=device, dtype=torch.bfloat16 if weight.is_cuda else torch.float32))).float()
    return (given if linear.bias is None else given - linear.bias.float()).T
