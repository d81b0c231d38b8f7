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


ASSUMED = Speed(150, 900, 20, "an RTX 4090 (assumed)")

SIDE = 4096
COPY_BYTES = 256 * 1024**2
WARM_UP_SECONDS = 0.25


@cache
def measured() -> Speed:
    """The first CUDA GPU's; without one, an assumed card's."""
    if not torch.cuda.is_available():
        return ASSUMED
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
