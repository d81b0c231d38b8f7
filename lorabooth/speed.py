"""How fast this GPU is, measured in a second: what a plan's times are made of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from lorabooth.sizes import GB


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second: matrix products (10**12 operations), bytes (10**9) of its own memory and from the host's."""

    tflop: float
    memory_gb: float
    host_gb: float
    name: str


RTX_4090 = Speed(150, 900, 20, "an RTX 4090 (assumed)")
CARDS = (
    (8, Speed(27, 245, 12, "an RTX 4060 (assumed)")),
    (12, Speed(52, 450, 20, "an RTX 4070 (assumed)")),
    (16, Speed(88, 645, 20, "an RTX 4080 (assumed)")),
    (24, RTX_4090),
    (32, Speed(190, 1600, 40, "an RTX 5090 (assumed)")),
    (48, Speed(250, 780, 20, "an L40S (assumed)")),
    (80, Speed(750, 3000, 40, "an H100 (assumed)")),
    (141, Speed(790, 4300, 40, "an H200 (assumed)")),
)
"""GiB of memory and speed of a card that people have with so much: NVIDIA's data sheets (dense bf16 products with fp32 sums), less what practice takes off."""

SIDE = 4096
COPY_BYTES = 256 * 1024**2
WARM_UP_SECONDS = 0.25


def speed_of(stated_bytes: float | None) -> Speed:
    """That of a card with so much memory, where somebody stated it; else the first CUDA GPU's."""
    return assumed(stated_bytes) if stated_bytes else measured()


def assumed(gpu_bytes: float) -> Speed:
    """That of a card with so much free memory."""
    return next((speed for gib, speed in CARDS if gpu_bytes <= gib * 2**30), CARDS[-1][1])


@cache
def measured() -> Speed:
    """The first CUDA GPU's."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    near, host = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda"), torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    return Speed(
        tflop=2 * SIDE**3 / 1e12 / _seconds(lambda: a @ b),
        memory_gb=2 * COPY_BYTES / GB / _seconds(near.clone),
        host_gb=COPY_BYTES / GB / _seconds(lambda: near.copy_(host, non_blocking=True)),
        name=torch.cuda.get_device_name(),
    )


def _seconds(work: Callable[[], object], times: int = 10) -> float:
    """The mean of several, after it was at work for so long that an idle GPU's clock has risen."""
    start = time.perf_counter()
    while time.perf_counter() < start + WARM_UP_SECONDS:
        work()
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times
