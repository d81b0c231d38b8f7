"""The frozen base's linears in 8 or 4 bits: stored small, multiplied in the precision of their input.

int8 and fp8 are ours, thirty lines: bitsandbytes' int8 casts to fp16, which FLUX's activations overflow, and libraries' fp8 either keep the
bf16 weights or have no backward. nf4 is bitsandbytes' own (Dettmers et al. 2023, arXiv 2305.14314), with double quantisation.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabooth.errors import UserError
from lorabooth.sizes import linears, spread

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number that the format holds; e4m3's for fp8."""


def quantized(linear: nn.Linear, precision: str, device: torch.device) -> nn.Linear:
    """A frozen linear of the same function, nearly, on `device`: one of `QuantizedLinear` or bitsandbytes' `Linear4bit`."""
    linear = linear.to(device)
    if precision != "nf4":
        return QuantizedLinear(linear, precision)
    try:
        from lorabooth.four_bits import four_bit_linear
    except ImportError:
        raise UserError("precision nf4 needs bitsandbytes, which is not installed", hint="pip install bitsandbytes, or choose --precision int8") from None
    return four_bit_linear(linear, device)


def put_blocks(blocks: list[nn.Module], precision: str, swapped: int, device: torch.device) -> None:
    """Move a transformer's blocks from host memory to a device one by one, their linears stored in a precision; `swapped` of them go back to the host."""
    away = spread(blocks, swapped)
    for block in blocks:
        if precision not in ("bf16", "fp32"):
            for name, linear in linears(block):
                block.set_submodule(name, quantized(linear, precision, device))
        block.to("cpu" if block in away else device)


def put_rest(transformer: nn.Module, device: torch.device) -> None:
    """Move all but the blocks to a device."""
    for name, part in transformer.named_children():
        if name not in ("transformer_blocks", "single_transformer_blocks"):
            part.to(device)


class QuantizedLinear(nn.Linear):
    """A linear whose weight is stored as int8 or fp8 (e4m3) with a scale for each row; y = x (scale * q)^T + b.

    weight: [out, in], one byte a value (fp8 as its bits); scale: [out, 1], fp32.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, precision: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.precision = precision
        stored, scale = small(linear.weight.detach(), precision)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Take another weight [out, in], in the memory that the old one has."""
        stored, scale = small(weight, self.precision)
        self.weight.copy_(stored)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's precision."""
        product = _Fp8Product if self.weight.dtype == torch.uint8 and multiplies_fp8(x.device) else _Product
        result: Tensor = product.apply(x, self.weight, self.scale, self.bias)
        return result


def small(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as bytes (fp8 as its bits), and the scale [out, 1] of its rows."""
    rows = weight.float()
    if precision == "fp8":
        scale = fp8_scale(rows)
        return (rows / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[precision]
    return (rows / scale).round().to(torch.int8), scale


def fp8_scale(rows: Tensor) -> Tensor:
    """The scale [N, 1], fp32, with which each row of [N, K] fits into fp8: a power of two, so that multiplying and dividing by it is exact in any precision,
    and fp8 loses nothing, for what it holds is a floating point number as well."""
    least = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / LARGEST["fp8"]  # gradients are small, many under 1e-10
    exponent = torch.bitwise_and(least.view(torch.int32), 0x7F800000)  # of a float's bits: the power of two at or below it
    return 2 * exponent.view(torch.float32)


class _Product(torch.autograd.Function):
    """Keeps the small weight for the backward pass, not the wide copy that each pass makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, wide(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradients[0] @ wide(weight, scale, gradients[0].dtype), None, None, None


class _Fp8Product(torch.autograd.Function):
    """Both products in fp8, where the GPU has them at twice the rate of bf16: inputs and gradients are rounded too, with a scale for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        y = fp8_product(x, weight.view(torch.float8_e4m3fn).t(), fast=True) * scale.t().to(x.dtype)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        # The rows' scales lie along the sum here, so they go to the gradient. The kernel wants the second matrix by columns: a copy, a byte a weight.
        columns = weight.t().contiguous().t().view(torch.float8_e4m3fn)
        return fp8_product(gradients[0] * scale.t().to(gradients[0].dtype), columns), None, None, None


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device multiplies fp8 in hardware: NVIDIA's since Ada (8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_product(x: Tensor, columns: Tensor, fast: bool = False) -> Tensor:
    """x [..., K] @ columns [K, M] in fp8, stored by columns; in x's precision. fast: sums are kept in some 22 bits, as the tensor cores have them.

    Rows are scaled before and after, not by the kernel: with a scale for each row torch takes one of CUTLASS, which is slow with exact sums
    (pytorch/ao#1325) and missing on some GPUs (pytorch#192707); without, cuBLAS has one for all.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale, one = fp8_scale(rows).to(x.dtype), torch.ones((), device=x.device)
    y = torch._scaled_mm((rows / scale).to(torch.float8_e4m3fn), columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return (y.to(x.dtype) * scale).view(*x.shape[:-1], columns.shape[1])


def wide(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that the small one stands for."""
    if weight.dtype == torch.int8:
        return weight * scale.to(dtype)  # one kernel, which reads a byte; torch has none for fp8
    return weight.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)
