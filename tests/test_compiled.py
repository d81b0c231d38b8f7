"""Compiled blocks: the same training, and no training lost where there is no compiler."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from trainers import trainer_of

from lorabooth.families import load_family
from lorabooth.runs import RunDir
from tests.test_processes import untrained
from train import encode, fit
from train.compiled import compile_blocks
from train.plan import MemoryPlan, wanted

PLAN = MemoryPlan("bf16", 0, 0, False)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in run.history() if "loss" in row]


@pytest.mark.slow  # four compilations
@pytest.mark.parametrize(
    "settings", [{}, {"precision": "int8"}, {"gradient_checkpointing": "all", "precompute_modulation": True, "resolution": "64,128"}], ids=str
)
def test_a_compiled_run_is_the_run_without(tiny_run: Path, tmp_path: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]):
    counters.clear()
    runs = [untrained(tiny_run, tmp_path / str(compiled), compile_blocks=compiled, preview_every=4, **settings) for compiled in (True, False)]
    for run in runs:
        encode.run(run)
        fit.run(run)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-3)
    said = capsys.readouterr().err
    assert "compile (once" in said and "cannot be compiled" not in said
    assert not counters["aot_autograd"]["autograd_cache_bypass"], "what is traced is found again at the next start"


@pytest.mark.parametrize("ahead", [False, True], ids=["", "modulation ahead"])
def test_nothing_is_compiled_after_the_first_step_and_no_graph_is_broken(ahead: bool, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counters.clear()
    # What is traced is the same for every backend, and this one makes no code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = {"resolution": "64,96,128", "preservation_rate": 0.25, "validation_photos": 1, "preview_every": 1}
    run = untrained(tiny_run, tmp_path / "run", batch_size=1, precompute_modulation=ahead, **settings)
    encode.run(run)
    trainer = fit.start(run, run.config, load_family("mini"), Accelerator(cpu=True))
    compile_blocks(trainer)
    before = counters["stats"]["unique_graphs"]
    shares, threads = set(), set()
    trainer.live[0].register_hook(lambda _: threads.add(torch._C._is_multithreading_enabled()))
    for step in range(12):
        batch = fit._batch(trainer, step)[0]
        shares.add(batch.preserved)
        fit.train_step(trainer)
    fit.validate(trainer), fit.preview(trainer)
    assert shares == {0, 1} and len(trainer.sampler.by_bucket) == 3
    assert counters["stats"]["unique_graphs"] == before > 0 and not counters["graph_break"]
    assert not any("limit" in reason for reason in counters["unimplemented"]), "no variant runs uncompiled"
    assert threads == {False}, "another thread would recompute blocks with other settings of the compiler"


def test_a_plan_after_another_has_code_of_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for _ in range(2):
        counters.clear()
        compile_blocks(trainer_of(run))
        assert counters["stats"]["unique_graphs"] > 0


def test_without_a_compiler_training_goes_on_and_says_so(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    run, plain = (untrained(tiny_run, tmp_path / str(compiled), compile_blocks=compiled) for compiled in (True, False))
    fit.run(run)
    assert capsys.readouterr().err.count("note: the blocks cannot be compiled here, training goes on without (") == 1
    fit.run(plain)
    mine, theirs = (load_file(fit.checkpoint_of(r) / "lora.safetensors") for r in (run, plain))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_it_is_done_where_it_pays():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert wanted(None, PLAN, cuda, 1000) and not wanted(None, PLAN, cuda, 100) and not wanted(None, PLAN, cpu, 1000)
    assert wanted(True, PLAN, cpu, 1) and not wanted(False, PLAN, cuda, 1000)
    assert not wanted(True, MemoryPlan("bf16", 57, 10, False), cuda, 1000) and not wanted(True, MemoryPlan("nf4", 0, 0, False), cuda, 1000)
