"""What only a GPU can show: run with `pytest -m gpu`."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabooth.families import load_family
from lorabooth.runs import RunDir
from train import fit
from train.plan import MemoryPlan

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run whose training is still to be done."""
    run = RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    shutil.rmtree(run.checkpoints)
    return run


def trained(run: RunDir, plan: MemoryPlan, steps: int = 3) -> list[torch.Tensor]:
    """The LoRA's weights after some steps with a plan."""
    trainer = fit.start(run, run.config, load_family("mini"), Accelerator(), plan)
    for _ in range(steps):
        fit.train_step(trainer)
    return [p.detach().clone() for p in trainer.state.parameters]


def test_a_step_never_makes_the_host_wait_for_the_gpu(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    trainer = fit.start(run, run.config, load_family("mini"), Accelerator(), MemoryPlan("bf16", 0, 0, False))
    fit.train_step(trainer)  # the first one reads files and asks libraries
    torch.cuda.set_sync_debug_mode("error")  # which does not see a wait for the whole device
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the step waits for the GPU"))
    try:
        fit.train_step(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", [MemoryPlan("bf16", 6, 0, False), MemoryPlan("bf16", 6, 4, False), MemoryPlan("bf16", 6, 6, False)], ids=str)
def test_blocks_that_are_recomputed_or_come_and_go_give_the_same_bits(run: RunDir, plan: MemoryPlan):
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels add up their gradients in an order that changes from run to run
        resident = trained(run, MemoryPlan("bf16", 0, 0, False))
        assert all(torch.equal(a, b) for a, b in zip(resident, trained(run, plan), strict=True))
