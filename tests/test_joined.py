"""Frozen weights and their LoRA in one matrix: the same training where blocks are compiled, in fewer products."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lorabooth.families import load_family
from lorabooth.lora import LoraSpec
from lorabooth.sizes import blocks_of
from tests.test_lean import gradients, velocity, with_lora
from tests.test_processes import untrained
from train import encode, fit, objective
from train import trainer as trainer_room
from train.compiled import compile_blocks
from train.joined import ALIGNED, Joined
from train.lean_blocks import LeanDoubleBlock, LeanFeedForward, LeanSingleBlock, join, lean


@pytest.fixture(autouse=True)
def _worth_it_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.joined.WORTH", 1 / 2)


def compiled(transformer: nn.Module, joined: bool = True, backend: Any = "aot_eager") -> None:
    """Blocks as a compiler sees them, down to the operators that it makes kernels of."""
    torch._dynamo.reset()
    lean(transformer, remake=True)
    if joined:
        join(transformer)
    for block in blocks_of(transformer):
        block.compile(backend=backend, dynamic=False, fullgraph=True)


def products(transformer: nn.Module) -> list[Joined]:
    """What has been joined."""
    lean_blocks = [m for m in transformer.modules() if isinstance(m, LeanFeedForward | LeanDoubleBlock | LeanSingleBlock)]
    return [product.joined for block in lean_blocks for product in block.products() if product and product.joined]


SPECS = [
    LoraSpec(4, 4, "attention+ff"), LoraSpec(3, 6, "attention+ff"), LoraSpec(4, 4, "attention"), LoraSpec(4, 8, r".*to_q|.*proj_out"),
    LoraSpec(4, 4, r".*to_q|.*to_v|.*proj_mlp"), LoraSpec(4, 4, "all-linear", use_rslora=True),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "joined"), [*((spec, True) for spec in SPECS), (SPECS[1], False), (SPECS[4], False)], ids=str)
def test_output_and_gradients_are_those_of_diffusers_and_peft(spec: LoraSpec, joined: bool):
    transformer, parameters = with_lora(spec)
    theirs, their_gradients = gradients(transformer, parameters)
    compiled(transformer, joined)
    assert bool(products(transformer)) == joined
    ours, our_gradients = gradients(transformer, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, right in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_what_is_written_to_a_weight_is_in_the_matrix():
    transformer, parameters = with_lora(SPECS[0])
    compiled(transformer)
    other, values = with_lora(SPECS[0])
    changed = [value.detach() * torch.linspace(0.5, 2, value.numel()).view_as(value) for value in values]
    for parameter, value in zip(values, changed, strict=True):
        parameter.data = value.clone()
    trainer_room.write([p.detach() for p in parameters], changed)
    torch.testing.assert_close(velocity(transformer), velocity(other), rtol=1e-4, atol=1e-5)


def test_a_step_has_two_thirds_of_the_products():
    counts = []

    def counted(graph: torch.fx.GraphModule, _: object) -> object:
        counts[-1] += sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    for joined in (True, False):
        transformer, parameters = with_lora(SPECS[0])
        counts.append(0)
        compiled(transformer, joined, aot_autograd(fw_compiler=counted))
        gradients(transformer, parameters)
    assert 0 < counts[0] < 0.67 * counts[1], counts


def test_rows_stay_aligned_and_a_large_rank_stays_apart():
    for rank in (1, 4, 12):
        transformer, _ = with_lora(LoraSpec(rank, rank, "attention+ff"))
        compiled(transformer)
        found = products(transformer)
        assert all(side % ALIGNED == 0 for joined in found for side in joined.matrix.shape)
        assert any(joined.beside for joined in found) and not all(joined.beside for joined in found)
    transformer, _ = with_lora(LoraSpec(128, 128, "attention+ff"))
    compiled(transformer)
    assert not products(transformer)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_weights_stay_apart_and_are_right(precision: str):
    transformer, parameters = with_lora(SPECS[0], precision=precision)
    theirs, their_gradients = gradients(transformer, parameters)
    compiled(transformer)
    ours, our_gradients = gradients(transformer, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, right in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


EVERYTHING = {"gradient_checkpointing": "all", "resolution": "64,128", "preservation_rate": 0.25}


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=str
)  # every share of each shape is traced, forward and backward
def test_a_run_whose_weights_are_joined_is_the_run_without(settings: dict[str, Any], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for room in (fit, objective, trainer_room):
        monkeypatch.setattr(room, "base_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run, plain = (untrained(tiny_run, tmp_path / str(kind), compile_blocks=kind, preview_every=4, **settings) for kind in (True, False))
    encode.run(run), encode.run(plain)
    trainer = fit.start(run, run.config, load_family(run.config.model), Accelerator(cpu=True))
    compile_blocks(trainer)
    assert products(trainer.transformer) and not all(p.is_contiguous() for p in trainer.live)
    fit.train_step(trainer)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(trainer.live, trainer.state.parameters, strict=True)), "the live weights are those of the state"
    # The whole runs, through checkpoints and previews.
    fit.run(run), fit.run(plain)
    mine, right = ([row["loss"] for row in r.history() if "loss" in row] for r in (run, plain))
    assert mine == pytest.approx(right, rel=0.03) and mine != right  # what bf16 rounds, as in test_plan_trains
