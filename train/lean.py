"""FLUX's layers in training: the same functions as diffusers' and PEFT's, in fewer operators, keeping about two thirds for the backward pass.

Here: a linear with its LoRA, and several of one input, as one node of the graph. train/lean_blocks.py has what stands around them.

The base is frozen, so a linear's input is needed for its LoRA only. What is an activation of something that is kept anyway (GELU's result, attention's and
the feed-forward's side by side) is made again in the backward pass.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabooth.lora import ADAPTER
from train.joined import Joined, scaled, worth_it

Remake = Callable[..., tuple[Tensor, ...]]
"""What was kept of a linear's input -> the input [..., in], in parts that lie side by side."""


def lean_layers(model: nn.Module) -> None:
    """Make each of PEFT's LoRA layers in a model a `LeanLora`, in place."""
    for module in list(model.modules()):
        if ADAPTER in getattr(module, "lora_A", {}):
            cast(Any, module).__class__ = _lora_class(cast(Any, type(module)))
            cast(Any, module).alone = Product(((module,),))


@cache
def _lora_class(kind: type) -> type:
    """A class, not a function for each layer: torch.compile takes layers of one class for the same code."""
    return type(f"Lean{kind.__name__}", (LeanLora, kind), {})


class LeanLora:
    """Put before one of PEFT's LoRA layers: y = W x + scale * B (A x) as one node of the graph, but for what a quantized base does itself."""

    alone: "Product"

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.alone(x)[0]


class Product:
    """What some lean LoRA layers make of one input: for each group of layers their results, side by side."""

    def __init__(self, groups: Sequence[Sequence[Any]], remake: Remake | None = None):
        """remake: makes the input of what else is kept of it for the backward pass."""
        layers = [layer for group in groups for layer in group]
        self.remake, self.sizes, self.scale = remake, [len(group) for group in groups], layers[0].scaling[ADAPTER]
        self.bases = [layer.base_layer for layer in layers]
        self.lora = [layer.lora_A[ADAPTER].weight for layer in layers] + [layer.lora_B[ADAPTER].weight for layer in layers]
        self.rank, self.count = layers[0].lora_A[ADAPTER].out_features, len(layers)
        self.widths = [[layer.lora_B[ADAPTER].out_features for layer in group] for group in groups]
        self.outs = [sum(widths) for widths in self.widths]
        self.joined: Joined | None = None

    def __call__(self, x: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """x [..., in] -> [..., out] for each group. kept: what `remake` takes, where there is one."""
        if torch.compiler.is_compiling():
            return self.in_single_operators(x)
        made, weights, biases = [], [], []
        for base in self.bases:
            plain = type(base) is nn.Linear
            made.append(None if plain else base(x))
            weights.append(base.weight if plain else None)
            biases.append(base.bias if plain else None)
        return cast(tuple[Tensor, ...], _Node.apply(self, x, *made, *weights, *biases, *self.lora, *(t.detach() for t in kept)))

    def in_single_operators(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same for a compiler, which fuses single operators with what stands around them."""
        a, b = self.lora[: self.count], self.lora[self.count :]
        if self.joined:
            return cast(tuple[Tensor, ...], self.joined(x, a, b).split(self.outs, -1))
        narrow = scaled(F.linear(x, _joined(a)), self.scale)
        layers = iter(zip(self.bases, b, narrow.split(self.rank, -1), strict=True))
        made = [[base(x) + F.linear(part, up) for _, (base, up, part) in zip(widths, layers, strict=False)] for widths in self.widths]
        return tuple(_joined(parts, -1) for parts in made)

    def join(self) -> None:
        """Let the weights, frozen ones and those of the LoRA, be parts of one matrix, where that is worth it; for a compiler."""
        if all(type(base) is nn.Linear and base.bias is not None for base in self.bases) and worth_it(self.bases, self.rank):
            self.joined = Joined(self.bases, self.lora[: self.count], self.lora[self.count :], self.scale)


class _Node(torch.autograd.Function):
    """x [..., in] times frozen weights [out, in] (or `made`, where a quantized base did that) and their LoRAs: a [rank, in], b [out, rank].

    One product has all the a in it, and nobody adds up the gradients that come to x from each layer.
    """

    @staticmethod
    def forward(ctx: Any, form: Product, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: made, weights, biases, a and b of all layers, in this order, then what is kept in place of x -> [..., out] for each group."""
        n = form.count
        made, weights, biases, a, b = (tensors[i * n : (i + 1) * n] for i in range(5))
        rows, kept = _rows(x), tensors[5 * n :] if form.remake else (x,)
        narrow = F.linear(rows, _joined(a))
        layers, outs = iter(zip(made, weights, biases, b, _split(narrow, form.rank), strict=True)), []
        for widths in form.widths:
            out = None if len(widths) == 1 else rows.new_empty(len(rows), sum(widths))
            for place in (None,) if out is None else out.split(widths, 1):
                y, weight, bias, up, part = next(layers)
                if y is not None:
                    result = torch.addmm(_rows(y), part, up.t(), alpha=form.scale, out=place)
                else:
                    result = F.linear(rows, weight, bias) if place is None else torch.addmm(bias, rows, weight.t(), out=place)
                    result.addmm_(part, up.t(), alpha=form.scale)
            outs.append((result if out is None else out).view(*x.shape[:-1], -1))
        ctx.save_for_backward(narrow, *weights, *a, *b, *kept)
        ctx.form = form
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients [..., out] of each group -> those of x, of what was made, and of a and b; the base is frozen."""
        form, n = ctx.form, ctx.form.count
        narrow, *tensors = ctx.saved_tensors
        weights, a, b, kept = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n :]
        wanted: list[Tensor] = []
        for widths, gradient in zip(form.widths, gradients, strict=True):
            wanted += _rows(gradient).split(widths, 1) if len(widths) > 1 else (_rows(gradient),)
        inner = torch.empty_like(narrow)
        for one, up, place in zip(wanted, b, _split(inner, form.rank), strict=True):
            torch.mm(one, up, out=place)
        to_b = [one.t() @ part for one, part in zip(wanted, _split(narrow, form.rank), strict=True)]
        if form.scale != 1:
            inner.mul_(form.scale)
            torch._foreach_mul_(to_b, form.scale)
        to_x = None
        if ctx.needs_input_grad[1]:
            for one, weight in zip(wanted, weights, strict=True):
                if weight is not None:
                    to_x = one @ weight if to_x is None else to_x.addmm_(one, weight)
            to_x = inner @ _joined(a) if to_x is None else to_x.addmm_(inner, _joined(a))
            to_x = to_x.view(*gradients[0].shape[:-1], -1)
        to_a = [inner.t() @ _rows(part) for part in (form.remake(*kept) if form.remake else kept)]
        to_made = [None if weight is not None else one.view(*gradients[0].shape[:-1], -1) for one, weight in zip(wanted, weights, strict=True)]
        return None, to_x, *to_made, *repeat(None, 2 * n), *_joined(to_a, 1).split(form.rank), *to_b, *repeat(None, len(kept) if form.remake else 0)


def _rows(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width]."""
    return x.reshape(-1, x.shape[-1])


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _split(x: Tensor, width: int) -> Sequence[Tensor]:
    return (x,) if x.shape[1] == width else x.split(width, 1)
