"""A frozen linear and its LoRA in one matrix, so that in compiled blocks the LoRA costs next to no pass over the activations.

y = W x + B A x, with W [out, in], A [rank, in] and B [out, rank]: few operations, but each product of the LoRA's own reads or writes all of x or y, and on a
GPU that is what takes time. Where layers make more than they take, B stands beside W: y = [W B] [x; A x]. Where they do not, A stands below W: [W; A] x is
W x and A x at once, and in the backward pass [W; A] takes both their gradients.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 8
"""Rows or columns that the LoRA's part is a multiple of: a GPU is slow with matrices whose rows are no multiple of 16 bytes, eight values in bf16."""
WORTH = 1 / 16
"""The largest share of a matrix that is the LoRA's part: of several layers it is mostly zeros, and they are multiplied, too."""


class Joined:
    """Linears of one input, and their LoRAs; several only if they make more than they take. Their weights become parts of the matrix: who writes to a weight
    writes into it."""

    def __init__(self, linears: Sequence[nn.Linear], a: Sequence[Tensor], b: Sequence[Tensor], scale: float):
        """a, b: the weights of the LoRAs, [rank, in] and [out, rank] each."""
        self.scale, self.rank, self.widths, self.wide = scale, len(a[0]), [len(up) for up in b], linears[0].in_features
        out, part, new = sum(self.widths), lora_part(linears, self.rank), linears[0].weight.new_zeros
        self.beside = out > self.wide
        assert self.beside or len(linears) == 1
        # Parameters, for the compiler takes their sizes as given where those of pictures vary.
        self.matrix = frozen(new((out, self.wide + part) if self.beside else (out + part, self.wide)))
        self.bias, self.nothing = frozen(new(len(self.matrix))), frozen(new(part - len(linears) * self.rank, self.wide))
        for i, (linear, up, rows, bias) in enumerate(zip(linears, b, self.matrix[:out].split(self.widths), self.bias[:out].split(self.widths), strict=True)):
            linear.weight.data, linear.bias.data = rows[:, : self.wide].copy_(linear.weight.data), bias.copy_(linear.bias.data)
            if self.beside:
                up.data = rows[:, self.wide + i * self.rank :][:, : self.rank].copy_(up.data)
        if not self.beside:
            a[0].data = self.matrix[out:][: self.rank].copy_(a[0].data)

    def __call__(self, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """x [..., in] -> [..., out of all]. a, b: the weights of the LoRAs, as they were given."""
        rows = x.flatten(0, -2)  # of what has more dimensions the compiler does not write the copies below where it makes it
        if self.beside:
            narrow = scaled(F.linear(rows, torch.cat([*a, self.nothing])), self.scale)
            made = _Beside.apply(rows, narrow, self.matrix, self.bias, *b)
        else:
            made, narrow, _ = _Below.apply(rows, self.widths[0], self.matrix, self.bias, a[0]).split([*self.widths, self.rank, len(self.nothing)], 1)
            # It is kept for the backward pass, and as a part it would keep the whole.
            made = made + F.linear(scaled(narrow.clone(), self.scale), b[0])
        return cast(Tensor, made.view(*x.shape[:-1], -1))


def scaled(narrow: Tensor, scale: float) -> Tensor:
    """narrow times scale, without a kernel for a factor of one."""
    return narrow if scale == 1 else narrow * scale


def frozen(values: Tensor) -> nn.Parameter:
    """A parameter that nobody trains."""
    return nn.Parameter(values, requires_grad=False)


def lora_part(linears: Sequence[nn.Linear], rank: int) -> int:
    """Rows or columns of a matrix that the LoRAs take."""
    return -(-len(linears) * rank // ALIGNED) * ALIGNED


def worth_it(linears: Sequence[nn.Linear], rank: int) -> bool:
    """Whether the LoRAs' part of a matrix would be small."""
    return lora_part(linears, rank) <= WORTH * min(linears[0].in_features, sum(linear.out_features for linear in linears))


class _Beside(torch.autograd.Function):
    """x [rows, in] and A x [rows, part] by [W B]. Each b is a part of the matrix, and an argument for its gradient's sake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor, matrix: Tensor, bias: Tensor, *b: Tensor) -> Tensor:
        ctx.save_for_backward(narrow, matrix)
        ctx.widths, ctx.rank = [len(up) for up in b], b[0].shape[1]
        return F.linear(torch.cat([x, narrow], 1), matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        narrow, matrix = ctx.saved_tensors
        parts = zip(gradients[0].split(ctx.widths, 1), narrow[:, : len(ctx.widths) * ctx.rank].split(ctx.rank, 1), strict=True)
        both = (gradients[0] @ matrix).split([matrix.shape[1] - narrow.shape[1], narrow.shape[1]], 1)
        return *both, None, None, *(one.t() @ part for one, part in parts)


class _Below(torch.autograd.Function):
    """x [rows, in] by [W; A]. a is a part of the matrix, and an argument for its gradient's sake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: int, matrix: Tensor, bias: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.out, ctx.rank = out, len(a)
        return F.linear(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, matrix = ctx.saved_tensors
        to_narrow = gradients[0][:, ctx.out :][:, : ctx.rank]
        return gradients[0] @ matrix, None, None, None, to_narrow.t() @ x
