"""Optimisers by the hosted trainer's names, each from the library that makes it."""

import io
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorabooth.config import TrainConfig
from lorabooth.errors import UserError

Parameters = list[dict[str, list[Tensor]]]
"""Groups, as torch's optimisers take them."""


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    """A class of bitsandbytes, imported when it is wanted: it looks for CUDA libraries as it is imported."""

    def make(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
        try:
            from bitsandbytes import optim
        except ImportError:
            raise UserError("this optimiser needs bitsandbytes, which is not installed", hint="pip install bitsandbytes, or choose --optimizer adamw") from None
        # Its step waits for the GPU after each tensor, 836 times for a LoRA of FLUX.1-dev. Only paged states need that, and these are not paged.
        optim.optimizer.sync_gpu = lambda t: None
        optimizer: torch.optim.Optimizer = getattr(optim, name)(parameters, **options)
        return optimizer

    return make


def _prodigy(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    """Prodigy with what its authors advise for diffusion models (https://github.com/konstmish/prodigy); a warm-up must not feed its estimate."""
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # where `train --json` has its answer, it would say that its weight decay is decoupled
        optimizer: torch.optim.Optimizer = Prodigy(parameters, betas=(0.9, 0.99), use_bias_correction=True, safeguard_warmup=True, **options)
    return optimizer


def _adafactor(parameters: Parameters, **options: Any) -> torch.optim.Optimizer:
    """Transformers' with the rate as it is. torch's makes it smaller by the size of the weights, a thousand times for lora_B, which starts at zero, so that
    nothing is learnt; and its step waits for the GPU twice for each tensor."""
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(parameters, scale_parameter=False, relative_step=False, **options)
    return optimizer


class _Adagrad(torch.optim.Adagrad):
    """With the weight decay of the others here (decoupled): torch's adds it to the gradient, whose size Adagrad divides by, so it would outweigh the photos."""

    def __init__(self, parameters: Parameters, lr: float, weight_decay: float):
        super().__init__(parameters, lr=lr, foreach=False)  # all at once it would hold two copies of every gradient
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as torch's."""
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * self.decay)
        return super().step(closure)


def _fused(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """One kernel for all parameters instead of a dozen for each: of a deep LoRA's step, four operators in ten."""
    return partial(kind, fused=True, **options)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw8bit": _bitsandbytes("AdamW8bit"),
    "adamw": _fused(torch.optim.AdamW),
    "adam8bit": _bitsandbytes("Adam8bit"),
    "adam": _fused(torch.optim.Adam, decoupled_weight_decay=True),  # as bitsandbytes' is
    "lion8bit": _bitsandbytes("Lion8bit"),
    "lion": _bitsandbytes("Lion"),
    "prodigy": _prodigy,
    "adagrad": _Adagrad,
    "adafactor": _adafactor,
}


def chosen(config: TrainConfig, device: torch.device) -> str:
    """The optimiser's name; `auto` is adamw8bit on CUDA, where its moments take a quarter of the memory, else adamw."""
    if config.optimizer == "auto":
        return "adamw8bit" if device.type == "cuda" else "adamw"
    return config.optimizer


def rate(config: TrainConfig) -> float:
    """The peak learning rate. Prodigy finds its own and takes a factor of it: as in the hosted trainer, one under 0.1 means 1."""
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        return 1.0
    return config.learning_rate


def ratios(config: TrainConfig) -> tuple[float, ...]:
    """How many times the learning rate each group of parameters has: lora_A and lora_B of the transformer, then of CLIP, as far as they differ.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): lora_B starts at zero and is to grow as far as lora_A stands already.
    """
    if config.optimizer == "prodigy":  # one estimate for all
        return (1.0,)
    of_parts = (1.0, config.text_encoder_lr_ratio) if config.train_text_encoder else (1.0,)
    of_sides = (1.0, config.loraplus_lr_ratio) if config.loraplus_lr_ratio > 1 else (1.0,)
    return tuple(part * side for part in of_parts for side in of_sides)


def build(name: str, parameters: dict[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser called `name` (as from `chosen`) on these parameters, in groups by their names, which begin with the component they are of."""
    groups: list[list[Tensor]] = [[] for _ in ratios(config)]
    sides = 2 if config.loraplus_lr_ratio > 1 else 1
    for key, p in parameters.items():
        place = sides * key.startswith("text_encoder.") + (sides - 1) * (".lora_B." in key)
        groups[place if len(groups) > 1 else 0].append(p)
    return MAKERS[name]([{"params": group} for group in groups], lr=rate(config), weight_decay=config.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Set the learning rates of a step, counted from 0: a linear warm-up, then what the recipe says; each group's by its ratio."""
    share = min(1.0, (step + 1) / max(1, config.warmup_steps)) * _left(config, step)
    for group, ratio in zip(optimizer.param_groups, ratios(config), strict=True):
        group["lr"] = rate(config) * share * ratio


def _left(config: TrainConfig, step: int) -> float:
    """The share of the peak rate after the warm-up: 1 at its first step, nearly 0 at the last. As transformers' schedules of these names."""
    done = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler == "cosine" else 1.0
