"""A trainer of a run of the mini model, for tests that look into it."""

from typing import Any

from accelerate import Accelerator

from lorabooth.families import load_family
from lorabooth.runs import RunDir
from train import fit


def trainer_of(run: RunDir, **changed: Any) -> fit.Trainer:
    """A trainer before its first step, on the CPU, with some settings changed."""
    return fit.start(run, run.config.model_copy(update=changed), load_family("mini"), Accelerator(cpu=True))
