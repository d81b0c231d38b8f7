"""What the machine is told to do, which is the same on every machine: operators and operations of a denoising step, and of a training step's two passes."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from torch.utils.flop_counter import FlopCounterMode

from infer.engine import Engine
from infer.loras import resolve
from infer.request import Request
from lorabooth.families import load_family
from lorabooth.runs import RunDir
from scripts.bench_train import Operators
from train import fit
from train.objective import loss_of

PX = 128


def operators_of(work: Callable[[], Any]) -> int:
    with Operators() as seen:
        work()
    return sum(seen.counts.values())


def test_a_denoising_step_launches_fewer_operators_than_the_pipelines(mini_pipe: FluxPipeline, tiny_run: Path):
    engine, loras = Engine("mini"), (resolve(str(tiny_run)),)

    def ours(steps: int) -> int:
        request = Request("a person", PX, PX, 1, num_inference_steps=steps)
        engine.read([request], loras)
        return operators_of(lambda: list(engine.generate(request, loras)))

    def theirs(steps: int) -> int:
        return operators_of(lambda: mini_pipe("a person", height=PX, width=PX, num_inference_steps=steps, max_sequence_length=48))

    ours(2), theirs(2)  # whatever is made once is made
    our_step, their_step = ours(5) - ours(4), theirs(5) - theirs(4)
    assert 200 < our_step <= their_step, f"{our_step} operators a step, {their_step} in the pipeline"


def test_a_merged_lora_costs_no_operator(tiny_run: Path):
    engine = Engine("mini")
    counts = []
    for loras in ((), (resolve(str(tiny_run)),)):
        request = Request("a person", PX, PX, 1, num_inference_steps=3)
        engine.read([request], loras)
        list(engine.generate(request, loras))
        counts.append(operators_of(lambda request=request, loras=loras: list(engine.generate(request, loras))))
    assert counts[0] == counts[1]


def test_a_training_step_computes_no_gradient_of_the_base(tiny_run: Path, tmp_path: Path):
    run = RunDir(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run.checkpoints)
    trainer = fit.start(run, run.config, load_family("mini"), Accelerator(cpu=True))
    batch = trainer.cache.batch(trainer.sampler.batch(0), run.config, random.Random(0))
    counts = []

    def in_place(_: Any, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
        """What adds a product to something, which the counter knows under its other name only."""
        return 2 * a.numel() * b[1]

    for backward in (False, True):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter, torch.set_grad_enabled(backward):
            loss = loss_of(trainer, batch, torch.Generator().manual_seed(0))
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    # One pass forward, one back for what goes in, and the thin matrices; with the base's own gradients it would be three passes.
    assert 1.7 < counts[1] / counts[0] < 2.5, counts
