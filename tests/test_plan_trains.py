"""Every memory plan trains the same LoRA, and where memory runs out all the same the next one goes on."""

import json
import weakref
from pathlib import Path
from traceback import clear_frames
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lorabooth import flow, machine
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning
from lorabooth.lora import LoraSpec
from lorabooth.quantized import QuantizedLinear, fp8_scale, quantized
from lorabooth.runs import RunDir
from lorabooth.sizes import blocks_of
from lorabooth.speed import RTX_4090
from tests.test_processes import untrained
from train import encode, fit, objective, plan, planning
from train import trainer as trainer_room
from train.lean_blocks import lean
from train.placement import place, start_plan
from train.plan import MemoryPlan
from train.planning import plans_for

CPU = torch.device("cpu")


def forward_and_backward(memory_plan: MemoryPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """The mini model's output and its LoRA's gradients with a plan."""
    family = load_family("mini")
    transformer = family.transformer(CPU, torch.float32)
    modulation = place(transformer, memory_plan, CPU)
    parameters = LoraSpec(8, 8, "attention+ff").attach(transformer, 0)
    lean(transformer, remake=True)
    start_plan(transformer, memory_plan, CPU, random=False)
    transformer.train()
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data = 0.02 * torch.randn(p.shape, generator=generator)
    embeds = torch.randn(2, 48, transformer.config["joint_attention_dim"], generator=generator)
    conditioning = Conditioning(embeds, torch.randn(2, transformer.config["pooled_projection_dim"], generator=generator))
    sigma, x = torch.tensor([0.3, 0.8]), torch.randn(2, 64, 64, generator=generator)
    if modulation:
        modulation.show(sigma, 1.0, conditioning.pooled)
    out = family.velocity(transformer, x, sigma, 1.0, conditioning, flow.image_ids(16, 16))
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.fixture(scope="module")
def plainly() -> tuple[torch.Tensor, torch.Tensor]:
    return forward_and_backward(MemoryPlan("fp32", 0, 0, False))


@pytest.mark.parametrize("memory_plan", [MemoryPlan("fp32", 3, 0, False), MemoryPlan("fp32", 6, 3, True), MemoryPlan("fp32", 6, 6, False)], ids=str)
def test_where_weights_are_and_what_is_recomputed_changes_no_bit(plainly: tuple[torch.Tensor, torch.Tensor], memory_plan: MemoryPlan):
    for mine, plain in zip(forward_and_backward(memory_plan), plainly, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize(
    ("memory_plan", "tolerances"),
    [
        (MemoryPlan("int8", 0, 0, False), (0.01, 0.02)),
        (MemoryPlan("int8", 6, 4, True), (0.01, 0.02)),
        (MemoryPlan("fp8", 0, 0, False), (0.025, 0.07)),
        (MemoryPlan("nf4", 6, 0, True), (0.09, 0.21)),
    ],
    ids=str,
)
def test_small_bases_stay_near(plainly: tuple[torch.Tensor, torch.Tensor], memory_plan: MemoryPlan, tolerances: tuple[float, float]):
    """The distance over the size, of the output and of the gradients (docs/training.md)."""
    for mine, plain, tolerance in zip(forward_and_backward(memory_plan), plainly, tolerances, strict=True):
        assert 0 < (mine - plain).norm() / plain.norm() < tolerance


@pytest.mark.parametrize("width", [256, 224])
@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.01), ("fp8", 0.04), ("nf4", 0.11)])
def test_a_quantised_linear_is_nearly_the_linear(precision: str, tolerance: float, width: int):
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, 384).requires_grad_(False)
    x = torch.randn(4, 7, width, requires_grad=True)
    plain = linear(x)
    small = quantized(linear, precision, CPU)
    with torch.no_grad():  # as for a preview in the midst of training
        assert (small.eval()(x) - plain).norm() / plain.norm() < tolerance
    mine = small.train()(x)
    assert (mine - plain).norm() / plain.norm() < tolerance
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, plain)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < tolerance
    assert small.weight.numel() * small.weight.element_size() <= 384 * width * (0.5 if precision == "nf4" else 1)


def test_products_in_fp8_stay_near(plainly: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch):
    """What a GPU with fp8 does: inputs and gradients are rounded, too. torch has the product on the CPU as well."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 384).requires_grad_(False)
    x = torch.randn(4, 7, 256, requires_grad=True)
    small = QuantizedLinear(linear, "fp8")
    by_weights_alone = small(x)
    monkeypatch.setattr("lorabooth.quantized.multiplies_fp8", lambda _: True)
    y = small(x)
    assert y.shape == (4, 7, 384) and not torch.equal(y, by_weights_alone)
    weights = torch.randn(y.shape)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, linear(x))]
    for mine, plain in ((y, linear(x)), gradients):
        assert (mine - plain).norm() / plain.norm() < 0.05
    for mine, plain in zip(forward_and_backward(MemoryPlan("fp8", 0, 0, False)), plainly, strict=True):
        assert 0 < (mine - plain).norm() / plain.norm() < 0.12


def test_scales_of_fp8_are_powers_of_two_that_fit_and_waste_at_most_half():
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 200)[:, None]
    rows = torch.cat([rows, torch.tensor([[448.0], [448.1], [447.9], [1.0]]).expand(4, 64)])
    scale = fp8_scale(rows)
    assert scale.dtype == torch.float32 and torch.all(torch.frexp(scale).mantissa == 0.5)
    largest = rows.abs().amax(1, keepdim=True) / scale
    assert largest.min() >= 224 and largest.max() <= 448
    assert torch.equal(fp8_scale(rows.bfloat16()).bfloat16().float(), fp8_scale(rows.bfloat16()))
    assert torch.isfinite(torch.zeros(2, 64) / fp8_scale(torch.zeros(2, 64))).all(), "a row of nothing stays nothing"


def test_exactly_the_first_blocks_run_twice():
    family = load_family("mini")
    transformer = family.transformer(CPU, torch.float32)
    LoraSpec(4, 4, "attention").attach(transformer, 0)
    start_plan(transformer, MemoryPlan("fp32", 4, 0, False), CPU, random=False)
    transformer.train()
    runs = [0] * len(blocks_of(transformer))
    for i, block in enumerate(blocks_of(transformer)):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    conditioning = Conditioning(torch.randn(1, 48, transformer.config["joint_attention_dim"]), torch.randn(1, transformer.config["pooled_projection_dim"]))
    family.velocity(transformer, torch.randn(1, 64, 64), torch.tensor([0.5]), 1.0, conditioning, flow.image_ids(16, 16)).mean().backward()
    assert runs == [2, 2, 2, 2, 1, 1]


SETTINGS = [
    {"gradient_checkpointing": "2"},
    {"blocks_to_swap": 3, "gradient_checkpointing": "auto"},
    {"precompute_modulation": True, "gradient_accumulation": 2},
    {"precompute_modulation": True, "blocks_to_swap": 6, "gradient_checkpointing": "all", "lora_dropout": 0.2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_with_a_plan_is_the_run_without_it(tiny_run: Path, tmp_path: Path, settings: dict[str, object]):
    plain = {"gradient_checkpointing": "none", "blocks_to_swap": None, "precompute_modulation": None}
    shared = {"preservation_rate": 0.3, "preview_every": 4}
    recipes = [settings | shared, settings | plain | shared]
    runs = [untrained(tiny_run, tmp_path / str(i), **changes) for i, changes in enumerate(recipes)]
    for run in runs:
        encode.run(run)
        fit.run(run)
    mine, theirs = (fit.final_weights(run) for run in runs)
    # A product of 64 rows is rounded otherwise than one of 2: the modulation ahead is the same to rounding, which Adam's first
    # steps make larger where a gradient is about zero. Another dropout is a distance of .2 and more.
    distance = sum((a - b).square().sum() for a, b in zip(mine, theirs, strict=True)) / sum(b.square().sum() for b in theirs)
    assert distance.sqrt() <= (1e-2 if "precompute_modulation" in settings else 0), distance.sqrt()


def test_a_resume_inside_a_window_of_the_modulation_gives_the_same_bytes(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit, "WINDOW", 3)
    whole, halved = (untrained(tiny_run, tmp_path / name, precompute_modulation=True, steps=6) for name in ("whole", "halved"))
    fit.run(whole)
    step, taken = fit.train_step, []

    def interrupted(trainer: fit.Trainer):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(1)
        return step(trainer)

    monkeypatch.setattr(fit, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit.run(halved)
    monkeypatch.setattr(fit, "train_step", step)
    fit.run(halved)
    for name in ("lora", "ema"):
        a, b = (load_file(fit.checkpoint_of(run) / f"{name}.safetensors") for run in (whole, halved))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_in_bf16_the_optimiser_works_on_fp32_weights(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for room in (fit, objective, trainer_room):
        monkeypatch.setattr(room, "base_dtype", lambda _: torch.bfloat16)
    run = untrained(tiny_run, tmp_path / "run", gradient_accumulation=2)
    trainer = fit.start(run, run.config, load_family(run.config.model), Accelerator(cpu=True))
    for _ in range(3):
        fit.train_step(trainer)
    assert {p.dtype for p in trainer.live} == {torch.bfloat16} and {p.dtype for p in trainer.state.parameters} == {torch.float32}
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(trainer.live, trainer.state.parameters, strict=True))
    assert any(not torch.equal(p.float(), q) for p, q in zip(trainer.live, trainer.state.parameters, strict=True))
    # The whole run, through its checkpoints and previews, ends near the one in fp32.
    run = untrained(tiny_run, tmp_path / "whole", preview_every=4)
    fit.run(run)
    assert all(t.dtype == torch.float32 for t in load_file(fit.checkpoint_of(run) / "lora.safetensors").values())
    mine, exact = ([row["loss"] for row in r.history() if "loss" in row] for r in (run, RunDir(tiny_run)))
    assert mine == pytest.approx(exact, rel=0.03) and mine != exact


# Memory that runs out all the same


@pytest.fixture
def full_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third step does not fit, once; and two plans to choose from."""
    step, taken = fit.train_step, []

    def fails(trainer: fit.Trainer):
        taken.append(1)
        if len(taken) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(trainer)

    def two_plans(config: TrainConfig, family: object, device: torch.device, shards: int):
        [best] = plans_for(config, load_family("mini"), device)
        return [best, plan.Estimate(MemoryPlan("fp32", 6, 2, False), {"base": 0.0}, 0.0, 1.0)]

    monkeypatch.setattr(fit, "train_step", fails)
    monkeypatch.setattr(planning, "plans_for", two_plans)


@pytest.mark.usefixtures("full_once")
def test_a_run_that_does_not_fit_goes_on_with_the_next_plan(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = untrained(tiny_run, tmp_path / "run")
    fit.run(run)
    assert "memory ran out; going on from the last step with: base fp32, 6 blocks recomputed, 2 blocks in host memory" in capsys.readouterr().err
    rows = run.history()
    plans = [(row["step"], row["plan"]) for row in rows if row.get("event") == "plan"]
    assert plans == [(0, "base fp32, nothing recomputed"), (2, "base fp32, 6 blocks recomputed, 2 blocks in host memory")]
    assert all(torch.equal(a, b) for a, b in zip(fit.final_weights(run), fit.final_weights(RunDir(tiny_run)), strict=True)), "no step was lost or done twice"
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4], "nor its loss"


class _Doubled(torch.autograd.Function):
    """A node that keeps an object, as those of lean layers keep the base's; `fails` where its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: object, fails: bool) -> torch.Tensor:
        ctx.kept, ctx.fails = kept, fails
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if ctx.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * gradient, None, None


def test_where_memory_runs_out_for_gradients_nothing_of_the_step_stays_for_the_next_plan_to_find_room_beside():
    class Base:
        """Something as large as a transformer."""

    base, x = Base(), torch.zeros(3, requires_grad=True)
    gone = weakref.ref(base)
    loss = _Doubled.apply(x, base, False).sum() + _Doubled.apply(_Doubled.apply(x, base, False), None, True).sum()
    del base
    with pytest.raises(torch.OutOfMemoryError) as stopped:
        trainer_room.backward(loss)
    del loss
    clear_frames(stopped.tb)
    assert gone() is None, "what had not been computed yet waits in autograd's queue"


def test_a_run_goes_on_in_the_precision_it_was_begun_in_while_that_fits(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def plans(config: TrainConfig, *_: object) -> list[plan.Estimate[MemoryPlan]]:
        bytes_of = {"bf16": 10.0, "int8": 5.0, "nf4": 2.0}
        found = [(precision, size) for precision, size in bytes_of.items() if size <= free and config.precision in ("auto", precision)]
        if not found:
            raise UserError("this training needs more")
        return [plan.Estimate(MemoryPlan(precision, 0, 0, False), {"base": size}, 0.0, 1.0) for precision, size in found]

    monkeypatch.setattr(planning, "plans_for", plans)
    checkpoint = max(run.checkpoints.iterdir())

    def precisions(begun_in: object) -> list[str]:
        record = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps(record | {"precision": begun_in}))
        return [e.plan.precision for e in planning.plans_to_go_on(run, load_family("mini"), CPU)]

    assert json.loads((checkpoint / "state.json").read_text())["precision"] == "fp32"
    free = 20.0
    assert precisions("bf16") == precisions("of another version") == precisions(None) == ["bf16", "int8", "nf4"]
    assert precisions("int8") == ["int8", "nf4"] and not capsys.readouterr().err
    free = 5.0
    assert precisions("bf16") == ["int8", "nf4"]
    assert "so far the base was in bf16, and from here on in int8: this training needs more" in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "share"), [(None, 1.0), ("4", 0.25)])
def test_processes_of_one_machine_share_its_memory(processes: str | None, share: float, monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (128e9, 100e9))
    monkeypatch.setattr(planning, "choose", lambda *arguments: given.append(arguments[4]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20e9, 24e9))
    monkeypatch.setattr(planning, "measured", lambda: RTX_4090)
    planning.plans_for(TrainConfig(trigger_word="TOK", model="mini"), load_family("mini"), torch.device("cuda"))
    assert given == [machine.HOST_SHARE * 100e9 * share]


@pytest.mark.usefixtures("full_once")
def test_without_the_retry_it_is_saved_and_said(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", auto_retry=False)
    with pytest.raises(UserError, match="memory ran out") as stopped:
        fit.run(run)
    assert "2 blocks in host memory" in stopped.value.hint
    [checkpoint] = run.checkpoints.iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 2
