"""What a transformer weighs, and what that takes of a GPU: the arithmetic that memory plans of training and of generating share.

All sizes are bytes of 10**9 to the GB.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Generic, TypeVar, cast

from torch import nn

from lorabooth.families.flux1 import NORMS

GB = 1e9
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.516}
"""Bytes of a base weight; nf4 with its block scales quantised too (4 + 8/64 + 32/(64 * 256) bits). Row scales of fp8 and int8 are left out."""
BEST_FIRST = ("bf16", "int8", "fp8", "nf4")
"""Precisions by exactness: of two plans of the same speed the first is taken."""
RESERVE_BYTES, RESERVE_SHARE = 0.7 * GB, 0.04
"""Libraries' workspaces, and what the allocator cannot use between two blocks of memory, which grows with what it holds."""
MFU = 0.5
"""Share of the GPU's own rate of matrix products that a training step is taken to reach; it orders plans and is no promise."""


@dataclass(frozen=True)
class BaseSizes:
    """A transformer's sizes: the width, the weights of each block's linears without those of the modulation, the largest linear's,
    those of each block's modulation, and of everything else; the inputs and outputs of all linears, which are the numbers of a LoRA of rank 1 on each;
    and the tokens of a prompt."""

    width: int
    double: int
    blocks: tuple[int, ...]
    largest: int
    modulations: tuple[int, ...]
    rest: int
    ends: int
    text_tokens: int

    @property
    def modulation(self) -> int:
        """The weights of the modulation's linears in all blocks."""
        return sum(self.modulations)

    @property
    def whole_blocks(self) -> tuple[int, ...]:
        """The weights of each block's linears, those of the modulation with them."""
        return tuple(map(sum, zip(self.blocks, self.modulations, strict=True)))

    @staticmethod
    def count(transformer: nn.Module, text_tokens: int) -> "BaseSizes":
        """Count them on a transformer, which may be on the meta device."""
        blocks = blocks_of(transformer)
        counts = [[m.weight.numel() for name, m in linears(block) if not re.fullmatch(NORMS, name)] for block in blocks]
        modulations = tuple(sum(m.weight.numel() for name, m in linears(block) if re.fullmatch(NORMS, name)) for block in blocks)
        total = sum(p.numel() for p in transformer.parameters())
        return BaseSizes(
            width=cast(nn.Linear, transformer.get_submodule("x_embedder")).out_features,
            double=len(list(transformer.get_submodule("transformer_blocks").children())),
            blocks=tuple(map(sum, counts)),
            largest=max(max(block) for block in counts),
            modulations=modulations,
            rest=total - sum(modulations) - sum(map(sum, counts)),
            ends=sum(m.in_features + m.out_features for _, m in linears(transformer)),
            text_tokens=text_tokens,
        )


Plan = TypeVar("Plan")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Estimate(Generic[Plan]):
    """A plan with what it takes: bytes on the GPU by item, bytes in the host's memory, seconds for a unit of its work."""

    plan: Plan
    items: dict[str, float]
    host_bytes: float
    seconds: float

    @property
    def bytes(self) -> float:
        """All items together."""
        return sum(self.items.values())

    def table(self) -> list[str]:
        """The plan and its items, line by line."""
        lines = [f"plan: {self.plan}", ""]
        lines += [f"  {name:<22}{size / GB:6.1f} GB" for name, size in self.items.items() if size >= 0.05 * GB]
        return [*lines, f"  {'together':<22}{self.bytes / GB:6.1f} GB on the GPU, {self.host_bytes / GB:.1f} GB in host memory"]


def steps_down(found: list[Estimate[Plan]]) -> list[Estimate[Plan]]:
    """The first of several, and after it those that take clearly less than the one before, in their order."""
    lighter = found[:1]
    for candidate in found[1:]:
        if candidate.bytes < 0.93 * lighter[-1].bytes:
            lighter.append(candidate)
    return lighter


MORE_GPU = "use a GPU with more memory, or stop other programs on this one (nvidia-smi lists them)"
MORE_HOST = "stop other programs on this machine, or use one with more memory"


def lacking(every: Sequence[Estimate[Plan]], gpu_bytes: float, host_bytes: float) -> tuple[str, str]:
    """What plans need of which none fits, to be said behind "needs", and how to get more of what is lacking. With what it names in place of what is free,
    rounded so, one of them does fit."""
    gpu = min((e.bytes for e in every if e.host_bytes <= host_bytes), default=0.0)
    host = min((e.host_bytes for e in every if e.bytes <= gpu_bytes), default=0.0)
    either = " or "
    if not gpu and not host:  # of both together there is no least: what the plan of the fewest bytes on the GPU takes
        (gpu, host), either = min((e.bytes, e.host_bytes) for e in every), " and "
    kinds = [("host memory", host, host_bytes, MORE_HOST)] * bool(host) + [("GPU memory", gpu, gpu_bytes, MORE_GPU)] * bool(gpu)
    needs = [f"{ceil(need / GB * 10) / 10:.1f} GB of {kind} ({free / GB:.1f} GB are free)" for kind, need, free, _ in kinds]
    return ("at least " if either == " or " else "") + either.join(needs), "; or ".join(hint for *_, hint in kinds)


def cheaper(estimates: list[Estimate[Plan]]) -> list[str]:
    """A line on the plan after the first, where there is one."""
    best, *others = estimates
    return [f"next cheaper: {other.plan}: {other.bytes / GB:.1f} GB, {other.seconds / best.seconds:.2f} times as long" for other in others[:1]]


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks in the order of the forward pass: double ones, then single ones."""
    return [block for name in ("transformer_blocks", "single_transformer_blocks") for block in transformer.get_submodule(name).children()]


def spread(blocks: Sequence[Item], some: int) -> list[Item]:
    """Those of the blocks (or of their sizes) that come and go, evenly apart: while one is on its way, those between compute."""
    return [blocks[(2 * i + 1) * len(blocks) // (2 * some)] for i in range(some)]


def linears(part: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of a block, or of all, by name."""
    return [(name, module) for name, module in part.named_modules() if isinstance(module, nn.Linear)]
