"""FLUX's blocks in training, around the linears of train/lean.py: fewer operators, and less kept for the backward pass.

Query and key are kept once, not at each step of their normalisation and rotation, which they go through together. The text tokens that the last block would
make are read by nobody and are not made. Where blocks are compiled, nodes are single operators, which the compiler fuses, and keep more (train/plan.py).
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

from lorabooth.sizes import blocks_of
from train.lean import LeanLora, Product, lean_layers

WORTH = 0.02
"""Where blocks are compiled, the last one is code of its own only if that spares such a share of all tokens in all blocks: it takes a while to compile."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the positions [N, width of a head], each angle twice."""


def lean(model: nn.Module, remake: bool) -> None:
    """Give a model with a plain LoRA (no dropout, no DoRA) these layers, in place. The LoRA cannot be switched off or merged any more: for training.

    remake: what GELU makes is made again in the backward pass and not kept. On a GPU memory is what lacks, and this is little beside the products; on a CPU
    it is 3 to 6 % of a step (docs/LOG.md, 2026-11-28).
    """
    lean_layers(model)
    for module in model.modules():
        for kind in (LeanFeedForward, LeanDoubleBlock, LeanSingleBlock):
            if type(module) is kind.__base__:
                module.__class__ = kind
                cast(Any, module).prepare(remake)
    if singles := getattr(model, "single_transformer_blocks", None):
        cast(Any, singles)[-1].prepare_last(len(blocks_of(model)))


def join(model: nn.Module) -> None:
    """Let frozen weights and the LoRA's be parts of common matrices (train/joined.py), in place. For a lean model that will be compiled, whose weights stay
    where they are, and a LoRA that is a copy of what is trained: its weights are no dense tensors any more."""
    for module in model.modules():
        if isinstance(module, LeanFeedForward | LeanDoubleBlock | LeanSingleBlock):
            for product in module.products():
                if product:
                    product.join()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the places of the single weights are too small for what comes next


def alone(linear: nn.Module) -> Product | None:
    """What a linear makes, if it has a LoRA."""
    return linear.alone if isinstance(linear, LeanLora) else None


class Activated:
    """A linear of GELU's result, which may stand beside something else. What it takes is kept in its parts, or made again of what goes into GELU."""

    def __init__(self, linear: nn.Module, remake: bool):
        self.linear, self.remake = linear, remake
        self.product = Product([(linear,)], self.parts if remake else lambda *parts: parts) if isinstance(linear, LeanLora) else None

    @staticmethod
    def parts(hidden: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """What the linear takes."""
        return *beside, F.gelu(hidden, approximate="tanh")

    def __call__(self, hidden: Tensor, *beside: Tensor) -> Tensor:
        """hidden [B, N, in], beside [B, N, some] -> [B, N, out]."""
        parts = self.parts(hidden, *beside)
        x = torch.cat(parts, 2) if beside else parts[0]
        if self.product is None:
            return cast(Tensor, self.linear(x))
        return self.product(x, *((hidden, *beside) if self.remake else parts))[0]


class LeanFeedForward(FeedForward):
    """Keeps what goes into GELU, not what comes out."""

    def prepare(self, remake: bool) -> None:
        """Look at what has a LoRA."""
        self.shrink = Activated(cast(Any, self.net)[-1], remake)

    def products(self) -> list[Product | None]:
        """What has a LoRA."""
        return [alone(cast(Any, self.net[0]).proj), self.shrink.product]

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, N, width] -> the same."""
        return self.shrink(cast(Any, self.net[0]).proj(hidden_states))


class LeanDoubleBlock(FluxTransformerBlock):
    """A block in which image and text have weights of their own and attend to each other."""

    def prepare(self, _: bool) -> None:
        """Look at what has a LoRA."""
        attn = cast(Any, self.attn)
        self.project_text = Projections((attn.add_q_proj, attn.add_k_proj), (attn.add_v_proj,))
        self.project_image = Projections((attn.to_q, attn.to_k), (attn.to_v,))
        self.register_buffer("text_norms", norms(attn.norm_added_q, attn.norm_added_k), persistent=False)
        self.register_buffer("image_norms", norms(attn.norm_q, attn.norm_k), persistent=False)

    def products(self) -> list[Product | None]:
        """What has a LoRA; the feed-forwards have their own."""
        attn = cast(Any, self.attn)
        return [self.project_text.adapted, self.project_image.adapted, alone(attn.to_add_out), alone(attn.to_out[0])]

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and text tokens [B, M, width] -> text and image tokens."""
        attn, lengths = cast(Any, self.attn), (encoder_hidden_states.shape[1], hidden_states.shape[1])
        text, image = AdaLN(self.norm1_context, temb, 6), AdaLN(self.norm1, temb, 6)
        text_pairs, text_values = self.project_text(text.normed(encoder_hidden_states))
        image_pairs, image_values = self.project_image(image.normed(hidden_states))
        pairs, weights = (heads_of(attn, text_pairs, 2), heads_of(attn, image_pairs, 2)), (cast(Tensor, self.text_norms), cast(Tensor, self.image_norms))
        query, key = norm_rope(pairs, weights, image_rotary_emb, attn.norm_q.eps)
        attended = attend(attn, query, key, torch.cat([text_values, image_values], 1)).split(lengths, 1)
        encoder_hidden_states = text.gated(encoder_hidden_states, attn.to_add_out(attended[0].contiguous()))
        hidden_states = image.gated(hidden_states, attn.to_out[0](attended[1].contiguous()))
        return text.fed_forward(encoder_hidden_states, self.norm2_context, self.ff_context), image.fed_forward(hidden_states, self.norm2, self.ff)


class LeanSingleBlock(FluxSingleTransformerBlock):
    """A block in which text and image are one row of tokens. Keeps what goes into GELU, and attention's result once, not both side by side."""

    last = False
    """Whether nobody reads the text tokens that come out."""

    def prepare(self, remake: bool) -> None:
        """Look at what has a LoRA."""
        attn = cast(Any, self.attn)
        self.project = Projections((self.proj_mlp,), (attn.to_q, attn.to_k), (attn.to_v,))
        self.shrink = Activated(self.proj_out, remake)
        self.register_buffer("pair_norms", norms(attn.norm_q, attn.norm_k), persistent=False)

    def products(self) -> list[Product | None]:
        """What has a LoRA."""
        return [self.project.adapted, self.shrink.product]

    def prepare_last(self, blocks: int) -> None:
        """Be the last of so many blocks."""
        attn = cast(Any, self.attn)
        self.last, self.blocks = True, blocks
        self.project_image, self.project_all = Projections((self.proj_mlp,), (attn.to_q,)), Projections((attn.to_k,), (attn.to_v,))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, width] and text tokens [B, M, width] -> text and image tokens."""
        attn, count, weights = cast(Any, self.attn), encoder_hidden_states.shape[1], cast(Tensor, self.pair_norms)
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        modulation = AdaLN(self.norm, temb, 3)
        normed = modulation.normed(tokens)
        trimmed = self.last and (not torch.compiler.is_compiling() or count > WORTH * self.blocks * tokens.shape[1])
        if trimmed:
            tokens, image_rotary = hidden_states, (image_rotary_emb[0][count:], image_rotary_emb[1][count:])
            keys, values = self.project_all(normed)
            hidden, queries = self.project_image(normed[:, count:])
            (key,) = norm_rope((heads_of(attn, keys, 1),), (weights[1:],), image_rotary_emb, attn.norm_k.eps)
            (query,) = norm_rope((heads_of(attn, queries, 1),), (weights[:1],), image_rotary, attn.norm_q.eps)
        else:
            hidden, pairs, values = self.project(normed)
            query, key = norm_rope((heads_of(attn, pairs, 2),), (weights,), image_rotary_emb, attn.norm_q.eps)
        tokens = modulation.gated(tokens, self.shrink(hidden, attend(attn, query, key, values)))
        return (encoder_hidden_states, tokens) if trimmed else cast(tuple[Tensor, Tensor], tokens.split([count, hidden_states.shape[1]], 1))


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


class AdaLN:
    """Shift, scale and gate [B, 1, width] that a block's norm makes of the moment's embedding [B, width] (adaLN-Zero, Peebles and Xie 2023, arXiv 2212.09748);
    twice where it has a feed-forward of its own."""

    def __init__(self, norm: Any, embedding: Tensor, count: int):
        self.norm = norm.norm
        self.shift, self.scale, self.gate, *self.further = norm.linear(norm.silu(embedding))[:, None].chunk(count, -1)

    def normed(self, x: Tensor) -> Tensor:
        """The layer norm of x [B, N, width], scaled and shifted."""
        return plus(self.shift, self.norm(x), 1 + self.scale)

    def gated(self, x: Tensor, change: Tensor) -> Tensor:
        """x with what attention made of it."""
        return plus(x, self.gate, change)

    def fed_forward(self, x: Tensor, norm: nn.Module, feed_forward: nn.Module) -> Tensor:
        """x with what the feed-forward made of it."""
        shift, scale, gate = self.further
        return plus(x, gate, feed_forward(plus(shift, norm(x), 1 + scale)))


def plus(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a * b."""
    return x + a * b if torch.compiler.is_compiling() else torch.addcmul(x, a, b)  # which the compiler would multiply by one first, in kernels of their own


def heads_of(attn: FluxAttention, x: Tensor, count: int) -> Tensor:
    """[B, N, count * width] -> [B, N, count, heads, width of a head]."""
    return x.unflatten(-1, (count, -1, attn.head_dim))


def attend(attn: FluxAttention, query: Tensor, key: Tensor, values: Tensor) -> Tensor:
    """Query and key [B, N, heads, width of a head], values [B, N, width] -> [B, N, width], by the kernel that diffusers was told to take."""
    processor, value = cast(Any, attn.processor), values.unflatten(-1, (-1, attn.head_dim))
    return dispatch_attention_fn(query, key, value, backend=processor._attention_backend, parallel_config=processor._parallel_config).flatten(2, 3)


def norms(*modules: nn.RMSNorm) -> Tensor:
    """The weights of RMS norms of a width as [count, 1, width], fp32, times the root of the width."""
    return torch.stack([module.weight.detach().float() * sqrt(len(module.weight)) for module in modules])[:, None]


def norm_rope(parts: tuple[Tensor, ...], weights: tuple[Tensor, ...], rotary: Rotary, eps: float) -> tuple[Tensor, ...]:
    """RMS norm over each head (Zhang and Sennrich 2019, arXiv 1910.07467), then the rotation of pairs by position (Su et al. 2021, arXiv 2104.09864).

    parts: tokens that follow each other, [B, some of N, count, heads, width] (query and key, say); weights as from `norms`, for each part
    -> `count` tensors [B, N, heads, width].
    """
    lengths, eps = tuple(part.shape[1] for part in parts), eps * parts[0].shape[-1]
    x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if not torch.compiler.is_compiling():
        return cast(tuple[Tensor, ...], _NormRope.apply(x, *_rotation(*rotary), eps, lengths, *weights))
    # In single operators, of which a compiler makes one kernel.
    wide, (cos, sin) = x.float(), (angle[:, None, None] for angle in rotary)
    weight = weights[0] if len(weights) == 1 else torch.cat([w.expand(n, *w.shape) for w, n in zip(weights, lengths, strict=True)])
    normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps) * weight
    real, imaginary = normed.unflatten(-1, (-1, 2)).unbind(-1)
    return (normed * cos + torch.stack([-imaginary, real], -1).flatten(-2) * sin).to(x.dtype).unbind(2)


@lru_cache(maxsize=2)
def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The positions' rotation and its inverse, complex [N, 1, 1, width / 2]; the same for all blocks of a pass, which hand on the
    same two tensors (a tensor is hashed by what it is, not by what is in it)."""
    rotation = torch.complex(cos[:, ::2], sin[:, ::2])[:, None, None]
    return rotation, rotation.conj().resolve_conj()


class _NormRope(torch.autograd.Function):
    """out = rotation * (weights * x) / |x|, pairs taken for complex numbers; nothing but x and its norm is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, back: Tensor, eps: float, lengths: tuple[int, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        """As `norm_rope`, with the rotation and its inverse as from `_rotation`, and eps times the width: the weights have the width's root in them."""
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().add_(eps).rsqrt_()
        out = torch.empty_like(x, dtype=torch.float32)
        for part, place, weight in zip(x.split(lengths, 1), out.split(lengths, 1), weights, strict=True):
            torch.mul(part, weight, out=place)
        _pairs(out).mul_(rotation)
        out = out.mul_(inverse).to(x.dtype)
        ctx.save_for_backward(x, inverse, back, *weights)
        ctx.lengths = lengths
        return out.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """`count` gradients [B, N, heads, width] -> that of x [B, N, count, heads, width]."""
        x, inverse, back, *weights = ctx.saved_tensors
        to_x = torch.empty_like(x, dtype=torch.float32)
        for gradient, scale, place in zip(gradients, inverse.unbind(2), to_x.unbind(2), strict=True):
            torch.mul(gradient, scale, out=place)
        _pairs(to_x).mul_(back)
        for place, weight in zip(to_x.split(ctx.lengths, 1), weights, strict=True):
            place.mul_(weight)
        wide = x.float()
        along = (wide * to_x).sum(-1, keepdim=True).mul_(inverse.square())
        return to_x.addcmul_(wide, along, value=-1).to(x.dtype), *(None for _ in range(4 + len(weights)))


def _pairs(x: Tensor) -> Tensor:
    """[..., width], contiguous -> the same memory as complex numbers [..., width / 2]."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
