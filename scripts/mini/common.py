"""What the training stages share: precision by machine, EMA, resumable state, learning-rate schedule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast() -> torch.autocast:
    """bf16 where the machine multiplies bf16 in hardware (CUDA; CPUs with AVX512-BF16), else fp32.

    On two cores with AVX512-BF16 a bf16 matrix product ran 4.5 times as fast as fp32; without it, 100 times slower.
    """
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu._is_avx512_bf16_supported()))


@contextmanager
def compute() -> Iterator[None]:
    """Autocast, and on the CPU attention by plain matrix products: for a hundred tokens twice as fast as the blocked kernel."""
    if torch.cuda.is_available():
        with autocast():
            yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH), autocast():
        yield


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Training:
    """A module under training: optimisers, EMA of the weights, and a file that lets an interrupted stage go on.

    orthogonal: the matrices inside transformer blocks go to Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon),
    scaled so that AdamW's learning rate fits both (Liu et al. 2025, arXiv 2502.16982); everything else stays with AdamW.
    """

    def __init__(self, module: nn.Module, file: Path, peak: float, steps: int, ema_decay: float = 0.999, orthogonal: bool = False):
        self.module, self.file, self.peak, self.steps, self.ema_decay = module, file, peak, steps, ema_decay
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for n, p in named if orthogonal and "blocks." in n and p.ndim == 2]
        rest = [p for p in self.parameters if not any(p is m for m in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.ema = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        self.step = 0
        if file.exists():
            self._load()

    def update(self, loss: torch.Tensor) -> None:
        """Backward, clip, optimiser steps, EMA."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.peak)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), self.parameters, 1 - decay)

    def save(self) -> None:
        """Weights, EMA and optimiser moments in one safetensors file, written whole."""
        named = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        state = {f"raw.{n}": p.detach() for n, p in named.items()} | {f"ema.{n}": t for n, t in self.ema.items()}
        for n, p in named.items():
            state |= {f"opt.{n}.{k}": t for optimizer in self.optimizers for k, t in optimizer.state.get(p, {}).items()}
        part = self.file.with_suffix(".part")
        save_file({k: t.contiguous().cpu() for k, t in state.items()}, part, metadata={"step": str(self.step)})
        part.replace(self.file)

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            self.step = int(file.metadata()["step"])
        state = load_file(self.file, device=str(device()))
        for n, p in self.module.named_parameters():
            if not p.requires_grad:
                continue
            p.data.copy_(state[f"raw.{n}"])
            self.ema[n].copy_(state[f"ema.{n}"])
            prefix = f"opt.{n}."
            for optimizer in self.optimizers:
                if any(p is q for group in optimizer.param_groups for q in group["params"]):
                    optimizer.state[p] = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}

    def load_ema(self) -> None:
        """Put the averaged weights into the module (for export)."""
        with torch.no_grad():
            for n, p in self.module.named_parameters():
                if n in self.ema:
                    p.copy_(self.ema[n])
