"""Memory as a user states it on the command line."""

import math
from typing import Any

import click


class _Gigabytes(click.FloatRange):
    """NaN, which is neither too small nor too large, is refused, too."""

    name = "GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        return self.fail("nan is not a number of GB", param, ctx) if math.isnan(number) else number


def check_stated(vram_gb: float | None, has_gpu: bool) -> None:
    """Refuse to plan for a GPU that is neither here nor stated."""
    if vram_gb is None and not has_gpu:
        raise click.UsageError("torch finds no CUDA GPU here; say how much memory the GPU has with --vram-gb 24")


GIGABYTES = _Gigabytes(0.1, 10_000)
"""Type of an option."""
