"""FLUX's blocks in training, around the linears of train/lean.py: fewer operators, and less kept for the backward pass.

Query and key are kept once, not at each step of their normalisation and rotation, which they go through together. Text tokens of which nothing is read any
more, those of the last block, are not computed. Where blocks are compiled, the compiler fuses better what it sees as single operators: then they are the
libraries' own, and keep more (train/plan.py).
"""

from functools import lru_cache
from math import sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.lean import LeanLora, Product, lean_layers

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the positions [N, width of a head], each angle twice."""


def lean(model: nn.Module) -> None:
    """Give a model with a plain LoRA (no dropout, no DoRA) these layers, in place. The LoRA cannot be switched off or merged any more: for training."""
    lean_layers(model)
    for module in model.modules():
        for kind in (LeanFeedForward, LeanDoubleBlock, LeanSingleBlock):
            if type(module) is kind.__base__:
                module.__class__ = kind
                cast(Any, module).prepare()
    if singles := getattr(model, "single_transformer_blocks", None):
        cast(Any, singles)[-1].prepare_last()


class LeanFeedForward(FeedForward):
    """Keeps what goes into GELU, not what comes out."""

    def prepare(self) -> None:
        """Look at what has a LoRA."""
        last = cast(Any, self.net)[-1]
        self.shrink = Product([(last,)], activated) if isinstance(last, LeanLora) else last

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, N, width] -> the same."""
        if torch.compiler.is_compiling():
            return cast(Tensor, super().forward(hidden_states))
        hidden = cast(Any, self.net[0]).proj(hidden_states)
        return self.shrink(*activated(hidden), hidden)[0] if isinstance(self.shrink, Product) else self.shrink(*activated(hidden))


def activated(hidden: Tensor) -> tuple[Tensor]:
    """GELU, as what a linear takes."""
    return (F.gelu(hidden, approximate="tanh"),)


class LeanDoubleBlock(FluxTransformerBlock):
    """A block in which image and text have weights of their own and attend to each other."""

    def prepare(self) -> None:
        """Look at what has a LoRA."""
        attn = cast(Any, self.attn)
        self.project_text = Projections((attn.add_q_proj, attn.add_k_proj), (attn.add_v_proj,))
        self.project_image = Projections((attn.to_q, attn.to_k), (attn.to_v,))
        self.register_buffer("text_norms", norms(attn.norm_added_q, attn.norm_added_k), persistent=False)
        self.register_buffer("image_norms", norms(attn.norm_q, attn.norm_k), persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and text tokens [B, M, width] -> text and image tokens."""
        if torch.compiler.is_compiling():
            return cast(tuple[Tensor, Tensor], super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs))
        attn, lengths = cast(Any, self.attn), (encoder_hidden_states.shape[1], hidden_states.shape[1])
        text, image = Modulation(self.norm1_context, temb, 6), Modulation(self.norm1, temb, 6)
        text_pairs, text_values = self.project_text(text.normed(encoder_hidden_states))
        image_pairs, image_values = self.project_image(image.normed(hidden_states))
        weights = torch.cat([cast(Tensor, w).expand(n, -1, -1, -1) for w, n in zip((self.text_norms, self.image_norms), lengths, strict=True)])
        query, key = norm_rope(heads_of(attn, torch.cat([text_pairs, image_pairs], 1), 2), weights, image_rotary_emb, attn.norm_q.eps)
        attended = attend(attn, query, key, torch.cat([text_values, image_values], 1)).split(lengths, 1)
        encoder_hidden_states = text.gated(encoder_hidden_states, attn.to_add_out(attended[0].contiguous()))
        hidden_states = image.gated(hidden_states, attn.to_out[0](attended[1].contiguous()))
        return text.fed_forward(encoder_hidden_states, self.norm2_context, self.ff_context), image.fed_forward(hidden_states, self.norm2, self.ff)


class LeanSingleBlock(FluxSingleTransformerBlock):
    """A block in which text and image are one row of tokens. Keeps what goes into GELU, and attention's result once, not both side by side."""

    last = False
    """Whether nobody reads the text tokens that come out."""

    def prepare(self) -> None:
        """Look at what has a LoRA."""
        attn = cast(Any, self.attn)
        self.project = Projections((attn.to_q, attn.to_k), (attn.to_v,), (self.proj_mlp,))
        self.shrink = Product([(self.proj_out,)], beside_activated) if isinstance(self.proj_out, LeanLora) else self.proj_out
        self.register_buffer("pair_norms", norms(attn.norm_q, attn.norm_k), persistent=False)

    def prepare_last(self) -> None:
        """Be the last block."""
        attn = cast(Any, self.attn)
        self.last = True
        self.project_all, self.project_image = Projections((attn.to_k,), (attn.to_v,)), Projections((attn.to_q,), (self.proj_mlp,))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and text tokens [B, M, width] -> text and image tokens."""
        if torch.compiler.is_compiling():
            return cast(tuple[Tensor, Tensor], super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs))
        attn, count, weights = cast(Any, self.attn), encoder_hidden_states.shape[1], cast(Tensor, self.pair_norms)
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        modulation = Modulation(self.norm, temb, 3)
        normed = modulation.normed(tokens)
        if self.last:
            tokens, image_rotary = hidden_states, (image_rotary_emb[0][count:], image_rotary_emb[1][count:])
            keys, values = self.project_all(normed)
            queries, hidden = self.project_image(normed[:, count:])
            (key,) = norm_rope(heads_of(attn, keys, 1), weights[:, 1:], image_rotary_emb, attn.norm_k.eps)
            (query,) = norm_rope(heads_of(attn, queries, 1), weights[:, :1], image_rotary, attn.norm_q.eps)
        else:
            pairs, values, hidden = self.project(normed)
            query, key = norm_rope(heads_of(attn, pairs, 2), weights, image_rotary_emb, attn.norm_q.eps)
        attended = attend(attn, query, key, values)
        both = torch.cat(beside_activated(attended, hidden), dim=2)
        tokens = modulation.gated(tokens, self.shrink(both, attended, hidden)[0] if isinstance(self.shrink, Product) else self.shrink(both))
        return (encoder_hidden_states, tokens) if self.last else cast(tuple[Tensor, Tensor], tokens.split([count, hidden_states.shape[1]], 1))


def beside_activated(attended: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the last linear of a single block takes."""
    return attended, F.gelu(hidden, approximate="tanh")


class Projections:
    """Linears of one input: for each group their results side by side. Those with a LoRA are one node."""

    def __init__(self, *groups: tuple[nn.Module, ...]):
        self.others = [None if all(isinstance(layer, LeanLora) for layer in group) else group for group in groups]
        adapted = [group for group, other in zip(groups, self.others, strict=True) if other is None]
        self.adapted = Product(adapted) if adapted else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, width] -> [B, N, out] for each group."""
        made = iter(self.adapted(x) if self.adapted else ())
        return tuple(next(made) if group is None else torch.cat([layer(x) for layer in group], -1) for group in self.others)


class Modulation:
    """Shift, scale and gate [B, 1, width] that a block's norm makes of the moment's embedding [B, width]; twice where it has a feed-forward of its own."""

    def __init__(self, norm: Any, embedding: Tensor, count: int):
        self.norm = norm.norm
        self.shift, self.scale, self.gate, *self.further = norm.linear(norm.silu(embedding))[:, None].chunk(count, -1)

    def normed(self, x: Tensor) -> Tensor:
        """The layer norm of x [B, N, width], scaled and shifted."""
        return torch.addcmul(self.shift, self.norm(x), 1 + self.scale)

    def gated(self, x: Tensor, change: Tensor) -> Tensor:
        """x with what attention made of it."""
        return torch.addcmul(x, self.gate, change)

    def fed_forward(self, x: Tensor, norm: nn.Module, feed_forward: nn.Module) -> Tensor:
        """x with what the feed-forward made of it."""
        shift, scale, gate = self.further
        return torch.addcmul(x, gate, feed_forward(torch.addcmul(shift, norm(x), 1 + scale)))


def heads_of(attn: FluxAttention, x: Tensor, count: int) -> Tensor:
    """[B, N, count * width] -> [B, N, count, heads, width of a head]."""
    return x.unflatten(-1, (count, -1, attn.head_dim))


def attend(attn: FluxAttention, query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """Query and key [B, N, heads, width of a head], values [B, N, width] -> [B, N, width], by the kernel that diffusers was told to take."""
    processor, value = cast(Any, attn.processor), values.unflatten(-1, (-1, attn.head_dim))
    return dispatch_attention_fn(query, key, value, backend=processor._attention_backend, parallel_config=processor._parallel_config).flatten(2, 3)


def norms(*modules: nn.RMSNorm) -> Tensor:
    """The weights of RMS norms of a width as [1, count, 1, width], fp32, times the root of the width."""
    return torch.stack([module.weight.detach().float() * sqrt(len(module.weight)) for module in modules])[None, :, None]


def norm_rope(x: Tensor, weights: Tensor, rotary: Rotary, eps: float) -> tuple[Tensor, ...]:
    """RMS norm over each head (Zhang and Sennrich 2019, arXiv 1910.07467), then the rotation of pairs by position (Su et al. 2021, arXiv 2104.09864).

    x [B, N, count, heads, width] (query and key, say), weights [N or 1, count, 1, width] as from `norms`; `count` tensors [B, N, heads, width] come back.
    """
    return cast(tuple[Tensor, ...], _NormRope.apply(x, weights, *_rotation(*rotary), eps * x.shape[-1]))


@lru_cache(maxsize=2)
def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The positions' rotation and its inverse, complex [N, 1, 1, width / 2]; the same for all blocks of a pass."""
    rotation = torch.complex(cos[:, ::2], sin[:, ::2])[:, None, None]
    return rotation, rotation.conj().resolve_conj()


class _NormRope(torch.autograd.Function):
    """out = rotation * (weights * x) / |x|, pairs taken for complex numbers; nothing but x and its norm is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, rotation: Tensor, back: Tensor, eps: float) -> tuple[Tensor, ...]:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().add_(eps).rsqrt_()
        out = x * weights
        _pairs(out).mul_(rotation)
        out = out.mul_(inverse).to(x.dtype)
        ctx.save_for_backward(x, inverse, weights, back)
        return out.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, inverse, weights, back = ctx.saved_tensors
        to_x = torch.empty_like(x, dtype=torch.float32)
        for gradient, scale, place in zip(gradients, inverse.unbind(2), to_x.unbind(2), strict=True):
            torch.mul(gradient, scale, out=place)
        _pairs(to_x).mul_(back)
        to_x.mul_(weights)
        wide = x.float()
        along = (wide * to_x).sum(-1, keepdim=True).mul_(inverse.square())
        return to_x.addcmul_(wide, along, value=-1).to(x.dtype), None, None, None, None


def _pairs(x: Tensor) -> Tensor:
    """[..., width], contiguous -> the same memory as complex numbers [..., width / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
