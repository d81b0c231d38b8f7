"""Which attention kernel to use: the fastest of those that compute attention, found by trying them on this GPU.

torch has several for one product, and which of them is fast, and right, changes with its version, cuDNN's and the GPU.
"""

import atexit
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabooth.device import base_dtype
from lorabooth.families.flux1 import BUCKET_MULTIPLE_PX, Flux1

CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ERROR_TOKENS = (512, 500, 448)
"""Tokens that errors are measured on, for the fp32 product is large: whole tiles of 128 as kernels work in, and a rest, where some have been wrong."""
TOLERANCE = 0.02
"""Largest distance of the output and of each gradient from the plain fp32 product, over its size; bf16 itself is within 0.005."""
ROUNDS = 5


@dataclass(frozen=True)
class Trial:
    """What a kernel did: the largest of its errors, and seconds at the size that was asked for."""

    backend: SDPBackend
    error: float
    seconds: float


def trials(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    width: int,
    tokens: int,
    gradients: bool = True,
    candidates: tuple[SDPBackend, ...] = CANDIDATES,
) -> list[Trial]:
    """Every candidate that runs here. heads of `width` values; errors are measured on few tokens, for all of them and for the last queries alone
    (train/lean_blocks.py has such a block).

    gradients: whether the backward pass counts, in errors and in seconds.
    """
    found = []
    drawn = [_inputs(device, dtype, heads, width, min(tokens, count), gradients) for count in ERROR_TOKENS]
    tried = [[query[:, :, start:], key, value] for query, key, value in drawn for start in (0, query.shape[2] // 4)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = [_pass([t.detach().float().requires_grad_(gradients) for t in inputs]) for inputs in tried]
    large = _inputs(device, dtype, heads, width, tokens, gradients)
    for backend in candidates:
        try:
            with sdpa_kernel(backend):
                errors = [_distance(*pair) for inputs, right in zip(tried, expected, strict=True) for pair in zip(_pass(inputs), right, strict=True)]
                # A maximum loses what is not a number.
                found.append(Trial(backend, max(errors) if all(map(math.isfinite, errors)) else math.inf, _seconds(large)))
        except RuntimeError:  # not built in, or not for this GPU
            continue
    return found


def fastest(found: list[Trial]) -> SDPBackend | None:
    """The fastest kernel whose result is right; None where none is, and torch's own choice stays."""
    right = [trial for trial in found if trial.error <= TOLERANCE]
    return min(right, key=lambda trial: trial.seconds).backend if right else None


def choose_kernel(px: int, family: Flux1, device: torch.device, gradients: bool = True) -> str:
    """Try the kernels on a square picture of that side and have torch use the fastest that is right; its name. gradients: as of `trials`."""
    transformer = family.config("transformer")
    tokens = family.text_tokens + (px // BUCKET_MULTIPLE_PX) ** 2
    _in_use.close()
    backend = fastest(trials(device, base_dtype(device), transformer["num_attention_heads"], transformer["attention_head_dim"], tokens, gradients))
    if backend is None:
        return "torch's own choice"
    use(backend)
    return str(backend.name.lower())


def use(backend: SDPBackend) -> None:
    """Have torch take this kernel in this process, and another only where it cannot.

    The VAE has one head of 512 values, and of the fast kernels only the memory-efficient one takes more than 256: the plain product would hold gigabytes
    for a large picture.
    """
    order = list(dict.fromkeys((backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)))
    _in_use.close()
    _in_use.enter_context(sdpa_kernel(order, set_priority=True))
    _in_use.callback(_names.clear)
    _names.append(backend.name.lower())


def in_use() -> str:
    """The name of the kernel that comes first; "any" where none was chosen."""
    return _names[0] if _names else "any"


_in_use, _names = ExitStack(), list[str]()
atexit.register(_in_use.close)


def _inputs(device: torch.device, dtype: torch.dtype, heads: int, width: int, tokens: int, gradients: bool) -> list[Tensor]:
    """Query, key and value [1, heads, tokens, width], laid out as a transformer's linears leave them: the heads of a token side by side."""
    drawn = torch.randn(1, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return [t.permute(0, 2, 1, 3).requires_grad_(gradients) for t in drawn.unbind(2)]


def _pass(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Attention, and where inputs ask for them the gradients of its weighted sum."""
    query, key, value = inputs
    out = F.scaled_dot_product_attention(query, key, value)
    if not query.requires_grad:
        return (out,)
    weights = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def _distance(mine: Tensor, right: Tensor) -> float:
    mine, right = mine.detach().float(), right.detach().float()
    return float((mine - right).norm() / right.norm())


def _seconds(inputs: list[Tensor]) -> float:
    """The least of a few rounds, after one to warm up."""
    times = []
    for _ in range(ROUNDS + 1):
        _wait(inputs[0].device)
        start = time.perf_counter()
        _pass(inputs)
        _wait(inputs[0].device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
