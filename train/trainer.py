"""`Trainer`: the live objects of a run, and other LoRA weights in place of those that are being trained.

The optimiser works on fp32 weights, the transformer on copies of them in its own precision (Micikevicius et al. 2018, arXiv 1710.03740).
On a CPU both are fp32 and the same tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import CLIPTextModel

from lorabooth.config import TrainConfig
from lorabooth.device import base_dtype
from lorabooth.families.flux1 import Conditioning, Flux1
from lorabooth.runs import RunDir
from train.checkpoint import TrainState
from train.data import Cache, Sampler
from train.modulation import Modulation
from train.plan import MemoryPlan


@dataclass
class Trainer:
    """A run's live objects: what the step needs, in one place."""

    run: RunDir
    config: TrainConfig
    family: Flux1
    accelerator: Accelerator
    plan: MemoryPlan
    transformer: torch.nn.Module
    live: list[Tensor]
    """The LoRA's weights that the transformer computes with; those of the state, rounded."""
    state: TrainState
    untrained: list[Tensor]
    """The live weights at their start, with which the model is the base; empty where the recipe does not ask it."""
    sampler: Sampler
    others: Sampler | None
    """Of the photos of others, where the recipe has a prior_rate."""
    cache: Cache
    modulation: Modulation | None
    """Where the plan computes it ahead."""
    text_encoder: CLIPTextModel | None = None
    """Where it is trained, too."""

    @property
    def trained(self) -> list[torch.nn.Module]:
        """The modules that have a LoRA."""
        return [self.transformer, *([self.text_encoder] if self.text_encoder else [])]

    @property
    def part(self) -> slice:
        """What this process computes of a whole batch. Not items side by side: the first of a batch preserve, which costs a pass more, and no process
        should wait for one that has them all."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def conditioned(self, cached: Conditioning) -> Conditioning:
        """Cached prompts on the device in the base's precision; where CLIP is trained, with what it makes of them now."""
        found = cached.to(self.accelerator.device, base_dtype(self.accelerator.device))
        if self.text_encoder is None:
            return found
        assert cached.clip_ids is not None, "the cache was written without CLIP's token ids"
        return replace(found, pooled=self.family.pooled(self.text_encoder, cached.clip_ids))

    @property
    def mixed(self) -> bool:
        """Whether the live weights are copies."""
        return self.live[0] is not self.state.parameters[0]

    def collect_gradients(self) -> None:
        """Move the live weights' gradients to the state's, in fp32, so that those of many batches add up exactly."""
        if not self.mixed:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.live]
        wide = [torch.empty_like(p) for p in self.state.parameters]
        torch._foreach_copy_(wide, gradients)  # a kernel for many, not one for each of 836
        before = [p.grad for p in self.state.parameters if p.grad is not None]
        if before:
            torch._foreach_add_(before, wide)
        else:
            for p, gradient in zip(self.state.parameters, wide, strict=True):
                p.grad = gradient
        for p in self.live:
            p.grad = None

    def average_gradients(self) -> None:
        """Give every process the mean of all processes' gradients, once a step and in one message. DistributedDataParallel would send the frozen
        base around first, and wants it whole on each GPU."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.state.parameters]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        parts = mean.split([gradient.numel() for gradient in gradients])
        for p, part in zip(self.state.parameters, parts, strict=True):
            p.grad = part.view_as(p)

    @torch.no_grad()
    def show_weights(self) -> None:
        """Round the state's weights into the live ones."""
        if self.mixed:
            write(self.live, self.state.parameters)


def write(weights: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into weights. Those that are parts of larger matrices (train/joined.py) apart: one of them among many has torch copy all one by one."""
    for dense in (True, False):
        if pairs := [pair for pair in zip(weights, values, strict=True) if pair[0].is_contiguous() == dense]:
            torch._foreach_copy_([weight for weight, _ in pairs], [value for _, value in pairs])


def backward(loss: Tensor) -> None:
    """Gradients of the live weights, computed in the thread that calls. autograd has a thread of its own for each GPU, and there the compiler's settings
    (lorabooth/compiled.py) are torch's own: a block compiled anew in it, when it is recomputed, would keep other tensors than it was to.

    Where it fails, what was still to be done stays in this thread's queue, and keeps activations and base alive until somebody computes gradients again: torch
    then throws away what nobody waits for (torch/csrc/autograd/engine.cpp).
    """
    with torch.autograd.set_multithreading_enabled(False):
        try:
            loss.backward()
        except BaseException:
            with torch.enable_grad():
                torch.zeros((), requires_grad=True).clone().backward()
            raise


@contextmanager
def with_weights(trainer: Trainer, weights: list[Tensor]) -> Iterator[None]:
    """Other LoRA weights in place of the raw ones, and no gradients."""
    with torch.no_grad():
        raw = [p.detach().clone() for p in trainer.live]
        write(trainer.live, weights)
        try:
            yield
        finally:
            write(trainer.live, raw)


@contextmanager
def evaluating(trainer: Trainer) -> Iterator[None]:
    """Without dropout."""
    before = [module.training for module in trainer.trained]
    for module in trainer.trained:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(trainer.trained, before, strict=True):
            module.train(training)


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """The averaged weights, without dropout, and one operator after the other: to compile the blocks once more, without gradients and
    for other shapes, would take longer than a preview does."""
    with with_weights(trainer, trainer.state.ema), evaluating(trainer), torch.compiler.set_stance("force_eager"):
        yield
