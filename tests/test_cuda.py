"""What only a GPU can show: run with `pytest -m gpu`; on one that is only pretended with `python tests/pretended_gpu.py pytest -m gpu tests/test_cuda.py`."""

import gc
import math
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from infer.engine import Engine
from infer.loras import LoraChoice, resolve
from infer.plan import ServingPlan
from infer.request import Request
from lorabooth.config import Optimizer
from lorabooth.families import load_family
from lorabooth.runs import RunDir
from lorabooth.speed import RTX_4090
from train import fit
from train.checkpoint import load_checkpoint, save_checkpoint
from train.plan import MemoryPlan, estimate
from train.planning import shapes_of

pytestmark = pytest.mark.gpu

PRETENDED = "pretended"
OPTIMIZERS = [name for name in get_args(Optimizer) if name != "auto"]
PLAIN = MemoryPlan("bf16", 0, 0, False)
WHOLE = ServingPlan("bf16")
SERVED = (
    ServingPlan("bf16", untouched_on="host", encoders="host"),
    ServingPlan("bf16", loras="stacked"),
    ServingPlan("bf16", swapped=4, loras="stacked", encoders="disk", tiled=True),
    ServingPlan("int8"),
    ServingPlan("int8", swapped=4, loras="stacked"),
    ServingPlan("fp8"),
    ServingPlan("nf4", loras="stacked"),
)
NEAR = {"bf16": 1, "int8": 2, "fp8": 5, "nf4": 10}
"""How far from the picture in bf16 that of another plan may be on average, of 255; the LoRA itself makes a difference of 12."""


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run whose training is still to be done."""
    run = RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    shutil.rmtree(run.checkpoints)
    (run.path / "metrics.jsonl").unlink()
    return run


@pytest.fixture
def small_gpu() -> None:
    """For what is to fill a GPU: a true one is given out in pieces as large as the mini model."""
    if PRETENDED not in torch.cuda.get_device_name():
        pytest.skip("needs the pretended GPU, whose memory is counted to the byte")


def trained(run: RunDir, plan: MemoryPlan, steps: int = 3) -> tuple[list[torch.Tensor], list[float]]:
    """The LoRA's weights after some steps with a plan, and the losses."""
    trainer = fit.start(run, run.config, load_family("mini"), Accelerator(), plan)
    losses = [fit.train_step(trainer)[0] for _ in range(steps)]
    found = [p.detach().clone() for p in trainer.state.parameters], torch.stack(losses).tolist()
    del trainer
    gc.collect()
    return found


def picture(engine: Engine, loras: tuple[LoraChoice, ...] = ()) -> np.ndarray:
    """Its numbers, of 0 to 255."""
    return np.asarray(next(engine.generate(Request("a portrait of TOK", 128, 128, seed=1, num_inference_steps=4), loras)).image, dtype=np.float32)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "prodigy"])  # which does, for its estimate
def test_a_step_never_makes_the_host_wait_for_the_gpu(optimizer: str, run: RunDir, monkeypatch: pytest.MonkeyPatch):
    trainer = fit.start(run, run.config.model_copy(update={"optimizer": optimizer}), load_family("mini"), Accelerator(), PLAIN)
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
        resident, losses = trained(run, PLAIN)
        others, other_losses = trained(run, plan)
    assert all(torch.equal(a, b) for a, b in zip(resident, others, strict=True)) and losses == other_losses


@pytest.mark.parametrize(
    "plan", [MemoryPlan("bf16", 3, 0, True), MemoryPlan("fp8", 0, 0, False), MemoryPlan("int8", 6, 4, True), MemoryPlan("nf4", 6, 0, True)], ids=str
)
def test_every_plan_learns_what_the_plain_one_does_in_no_more_memory_than_it_said(run: RunDir, plan: MemoryPlan):
    family, (_, expected) = load_family("mini"), trained(run, PLAIN)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, losses = trained(run, plan)
    assert losses == pytest.approx(expected, rel=0.2 if plan.precision == "nf4" else 0.05)
    expects, took = estimate(plan, shapes_of(run.config, family), run.config, RTX_4090), torch.cuda.max_memory_allocated() - before
    # A true GPU's libraries need the reserve; and bitsandbytes computes nf4 on the pretended one by its Python, which takes more.
    reserve = expects.items["reserve"] if PRETENDED in torch.cuda.get_device_name() and plan.precision != "nf4" else 0
    assert took < expects.bytes - reserve


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_that_goes_on_from_a_checkpoint_gives_the_same_bits(optimizer: str, run: RunDir):
    config = run.config.model_copy(update={"optimizer": optimizer, "learning_rate": 1e-3})

    def begun() -> fit.Trainer:
        trainer = fit.start(run, config, load_family("mini"), Accelerator(), PLAIN)
        load_checkpoint(run, trainer.state)
        trainer.show_weights()
        return trainer

    with sdpa_kernel(SDPBackend.MATH):
        whole = begun()
        for step in range(4):
            if step == 2:
                save_checkpoint(run, whole.state)
            fit.train_step(whole)
        resumed = begun()
        assert resumed.state.step == 2
        for _ in range(2):
            fit.train_step(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.state.parameters, resumed.state.parameters, strict=True))


@pytest.mark.usefixtures("small_gpu")
def test_where_memory_runs_out_training_goes_on_with_a_plan_that_takes_less(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    family, lighter = load_family("mini"), MemoryPlan("bf16", 6, 6, False)
    shapes = shapes_of(run.config, family)
    monkeypatch.setattr(fit, "plans_to_go_on", lambda *_: [estimate(plan, shapes, run.config, RTX_4090) for plan in (PLAIN, lighter)])
    monkeypatch.setattr(fit, "choose_kernel", lambda *_: "the first")
    whole = torch.cuda.get_device_properties(0).total_memory
    trained(run, PLAIN, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained(run, PLAIN, 2)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.max_memory_allocated() - 1000) / whole)
    try:
        fit.run(run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = run.history()
    assert [row["plan"] for row in rows if row.get("event") == "plan"] == [str(PLAIN), str(lighter)]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4], "no step was lost or done twice"
    assert f"going on from the last step with: {lighter}" in capsys.readouterr().err
    assert torch.cuda.memory_allocated() < before + 1_000_000, "nothing of either plan is left on the GPU"


@pytest.mark.parametrize("plan", SERVED, ids=str)
def test_every_plan_makes_nearly_the_same_picture_again_and_again(plan: ServingPlan, tiny_run: Path):
    lora, engine = (resolve(str(tiny_run)),), Engine("mini", plan=plan)
    first = picture(engine, lora)
    without = picture(engine)
    assert np.array_equal(picture(engine, lora), first) and not np.array_equal(without, first), "a LoRA that comes and goes leaves nothing behind"
    assert np.abs(first - picture(Engine("mini", plan=WHOLE), lora)).mean() < NEAR[plan.precision]


@pytest.mark.usefixtures("small_gpu")
def test_where_memory_runs_out_a_lighter_plan_makes_the_picture(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    lora, lighter = (resolve(str(tiny_run)),), ServingPlan("bf16", swapped=6, loras="stacked", encoders="disk")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    picture(Engine("mini", plan=WHOLE), lora)
    gc.collect()
    engine = Engine("mini", plan=WHOLE)
    engine._lighter = [lighter]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.max_memory_allocated() - 1_000_000) / torch.cuda.get_device_properties(0).total_memory)
    try:
        made = picture(engine, lora)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.base.plan == lighter and f"going on with: {lighter}" in capsys.readouterr().err
    assert np.array_equal(made, picture(Engine("mini", plan=lighter), lora))


def test_a_loss_is_a_number_on_each_attention_kernel_that_is_here(run: RunDir):
    tried = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                assert all(map(math.isfinite, trained(run, PLAIN, 1)[1]))
        except RuntimeError as error:
            assert "No available kernel" in str(error), "not here"
        else:
            tried.append(backend)
    assert SDPBackend.MATH in tried
