"""A frozen linear in four bits: bitsandbytes' NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

BLOCK = 64
"""Values that share a scale."""


class LinearOnCpu(Linear4bit):
    """For CPUs, where bitsandbytes 0.50 (backends/cpu, nn/modules.py) reads rows that are no multiple of 64 values wrongly, as the mini model's are, and
    outside of training packs weights anew, which ends in an error for such rows. So the weight is stored in rows of 64, and multiplied by torch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's precision."""
        weight = dequantize_4bit(self.weight.data, cast(Any, self.weight).quant_state).view(self.out_features, self.in_features)
        return F.linear(x, weight.to(x.dtype), self.bias)


def four_bit_linear(linear: nn.Linear, device: torch.device) -> nn.Linear:
    """A linear of the same function, nearly, on `device`, where the linear is already."""
    on_cpu, stored = device.type == "cpu", linear.weight.data
    kind = LinearOnCpu if on_cpu else Linear4bit
    four_bits: nn.Linear = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=stored.dtype, device="meta")
    if on_cpu and stored.numel() % BLOCK == 0:
        stored = stored.reshape(-1, BLOCK)
    weight: Any = Params4bit(stored, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    four_bits.weight = weight.to(device)
    four_bits.bias = linear.bias
    return four_bits
