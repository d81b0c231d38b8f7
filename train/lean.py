"""FLUX's layers in training: the same functions as diffusers' and PEFT's, in fewer operators, keeping about two thirds for the backward pass.

The base is frozen, so a linear's input is needed for its LoRA only. What is an activation of something that is kept anyway (GELU's result, attention's and
the feed-forward's side by side) is made again in the backward pass. Query and key are kept once, not at each step of their normalisation and rotation.
Where blocks are compiled, the compiler fuses better what it sees as single operators: then they are the libraries' own, and keep more (train/plan.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxSingleTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabooth.lora import ADAPTER

Remake = Callable[..., tuple[Tensor, ...]]
"""What was kept of a linear's input -> the input [..., in], in parts that lie side by side."""


def lean(model: nn.Module) -> None:
    """Give a model with a plain LoRA (no dropout, no DoRA) these layers, in place. The LoRA cannot be switched off or merged any more: for training."""
    for module in list(model.modules()):
        # Classes, not functions for each layer: torch.compile takes layers of one class for the same code.
        if ADAPTER in getattr(module, "lora_A", {}):
            cast(Any, module).__class__ = _lora_class(cast(Any, type(module)))
    for module in model.modules():
        if type(module) is FeedForward and isinstance(cast(Any, module.net)[-1], LeanLora):
            module.__class__ = LeanFeedForward
        elif type(module) is FluxSingleTransformerBlock and isinstance(module.proj_out, LeanLora):
            module.__class__ = LeanSingleBlock
        elif type(module) is FluxAttention:
            cast(Any, module).set_processor(LeanAttention())
            for norm in module.children():
                if isinstance(norm, nn.RMSNorm):
                    norm.register_buffer("neighbours", _neighbours(norm.weight), persistent=False)


@cache
def _lora_class(kind: type) -> type:
    return type(f"Lean{kind.__name__}", (LeanLora, kind), {})


class LeanLora:
    """Put before one of PEFT's LoRA layers: y = W x + scale * B (A x) as one node of the graph, but for what a quantized base does itself."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
            return cast(Tensor, self.base_layer(x) + F.linear(F.linear(x, a), b) * self.scaling[ADAPTER])
        return cast(Tensor, self.product(x, _itself, x))

    def product(self: Any, x: Tensor, remake: Remake, *kept: Tensor) -> Tensor:
        """The same, keeping other tensors than x for the backward pass, of which `remake` makes x again."""
        base = self.base_layer
        weights = (None, base.weight, base.bias) if type(base) is nn.Linear else (base(x), None, None)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return cast(Tensor, _Product.apply(x, *weights, a, b, self.scaling[ADAPTER], remake, *(t.detach() for t in kept)))


class _Product(torch.autograd.Function):
    """x [..., in] times a frozen weight [out, in] (or `y`, where a quantized base made the product) and a LoRA: a [rank, in], b [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, remake: Remake, *kept: Tensor
    ) -> Tensor:
        narrow = _rows(x) @ a.t()
        if y is None:
            assert weight is not None
            y = F.linear(x, weight, bias)
            y.view(-1, y.shape[-1]).addmm_(narrow, b.t(), alpha=scale)  # a view, never a copy that would be lost
        else:
            y = torch.addmm(_rows(y), narrow, b.t(), alpha=scale).view(y.shape)
        ctx.save_for_backward(narrow, weight, a, b, *kept)
        ctx.scale, ctx.remake = scale, remake
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        narrow, weight, a, b, *kept = ctx.saved_tensors
        wanted = _rows(gradients[0])
        inner = wanted @ b if ctx.scale == 1 else (wanted @ b) * ctx.scale
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (inner @ a if weight is None else (wanted @ weight).addmm_(inner, a)).view(*gradients[0].shape[:-1], -1)
        parts = [inner.t() @ _rows(part) for part in ctx.remake(*kept)]
        to_a = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        to_b = wanted.t() @ (narrow if ctx.scale == 1 else narrow * ctx.scale)
        return to_x, gradients[0] if ctx.needs_input_grad[1] else None, None, None, to_a, to_b, None, None, *(None for _ in kept)


def _rows(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width]."""
    return x.reshape(-1, x.shape[-1])


def _itself(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _activated(hidden: Tensor) -> tuple[Tensor]:
    return (F.gelu(hidden, approximate="tanh"),)


def _beside_activated(attended: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return attended, F.gelu(hidden, approximate="tanh")


class LeanFeedForward(FeedForward):
    """Keeps what goes into GELU, not what comes out."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, N, width] -> the same."""
        if torch.compiler.is_compiling():
            return cast(Tensor, super().forward(hidden_states))
        hidden = cast(Any, self.net[0]).proj(hidden_states)
        return cast(Tensor, cast(Any, self.net[-1]).product(*_activated(hidden), _activated, hidden))


class LeanSingleBlock(FluxSingleTransformerBlock):
    """Keeps what goes into GELU, and attention's result once, not both side by side."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and text tokens [B, M, width] -> text and image tokens."""
        if torch.compiler.is_compiling():
            return cast(tuple[Tensor, Tensor], super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs))
        count = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(tokens, emb=temb)
        hidden, attended = self.proj_mlp(normed), self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        both = torch.cat(_beside_activated(attended, hidden), dim=2)
        tokens = torch.addcmul(tokens, gate[:, None], cast(Any, self.proj_out).product(both, _beside_activated, attended, hidden))
        return tokens[:, :count], tokens[:, count:]


class LeanAttention(FluxAttnProcessor):
    """FLUX's attention with `_NormRope` for query and key."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, image_rotary_emb: Any = None
    ) -> Any:
        """Image tokens [B, N, width], and text tokens [B, M, width] where they still have weights of their own -> the same."""
        if torch.compiler.is_compiling():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = image_rotary_emb
        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            streams.insert(0, (encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k))
        parts, start = [], 0
        for x, to_q, to_k, to_v, norm_q, norm_k in streams:
            here, start = slice(start, start + x.shape[1]), start + x.shape[1]
            query, key, value = (to(x).unflatten(-1, (-1, attn.head_dim)) for to in (to_q, to_k, to_v))
            parts.append((norm_rope(query, norm_q, cos[here], sin[here]), norm_rope(key, norm_k, cos[here], sin[here]), value))
        query, key, value = parts[0] if len(parts) == 1 else (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config)
        out = out.flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


def norm_rope(x: Tensor, norm: nn.RMSNorm, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm over each head (Zhang and Sennrich 2019, arXiv 1910.07467), then the rotation of pairs by position (Su et al. 2021, arXiv 2104.09864).

    x [B, N, heads, width]; cos and sin [N, width], each angle twice. The norm is one that `lean` has seen.
    """
    return cast(Tensor, _NormRope.apply(x, norm.weight, norm.neighbours, cos, sin, norm.eps))


class _NormRope(torch.autograd.Function):
    """out = (direct * x + crossed * swapped(x)) / rms(x): the norm's weight is in the tables, so nothing but x and its rms is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, neighbours: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        direct, crossed = _tables(weight, neighbours, cos, sin)
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight, neighbours, cos, sin)
        return torch.addcmul(wide * direct, _swapped(wide), crossed).mul_(inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, inverse, *tables = ctx.saved_tensors
        direct, crossed = _tables(*tables)
        wide, wanted = x.float(), gradients[0].float() * inverse
        to_x = _swapped(wanted * crossed).addcmul_(wanted, direct)
        along = (wide * to_x).mean(-1, keepdim=True) * inverse.square()
        return to_x.addcmul_(wide, along, value=-1).to(x.dtype), None, None, None, None, None


def _tables(weight: Tensor, neighbours: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a value and the other of its pair are multiplied with [N, 1, width]: (x_0, x_1) -> (cos x_0 - sin x_1, cos x_1 + sin x_0)."""
    return (cos * weight)[:, None], (sin * neighbours)[:, None]


def _neighbours(weight: Tensor) -> Tensor:
    """The weight [width] of the other value of each pair, with its sign in the rotation."""
    return _swapped(weight.detach()) * torch.tensor([-1.0, 1.0], device=weight.device, dtype=weight.dtype).repeat(len(weight) // 2)


def _swapped(x: Tensor) -> Tensor:
    """The two of each pair exchanged."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([second, first], -1).flatten(-2)
