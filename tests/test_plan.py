"""Memory plans: the arithmetic against what torch keeps, the choice for each card, and every plan trains the same LoRA."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabooth import flow
from lorabooth.cli import main
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning
from lorabooth.lora import LoraSpec
from lorabooth.quantized import QuantizedLinear, quantized
from lorabooth.runs import RunDir
from lorabooth.sizes import GB, blocks_of
from lorabooth.speed import ASSUMED
from scripts.bench_train import kept_bytes
from scripts.random_flux import DEV, write_model
from tests.test_processes import untrained
from train import encode, export, fit, objective, plan
from train import trainer as trainer_room
from train.lean_blocks import lean
from train.placement import place, start_plan
from train.plan import MemoryPlan, Shapes, choose, fitting
from train.planning import plans_for, shapes_of

CPU = torch.device("cpu")
HOST_BYTES = 60 * GB


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> str:
    """FLUX.1-dev's configs without weights."""
    folder = tmp_path_factory.mktemp("dev")
    write_model(folder, DEV)
    return str(folder)


def recipe(model: str, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"trigger_word": "TOK", "model": model, "resolution": "512"} | changes)


# The arithmetic


def test_flux_dev_has_the_size_it_is_known_for(dev: str):
    shapes = shapes_of(recipe(dev), load_family(dev))
    total = sum(shapes.blocks) + shapes.modulation + shapes.rest
    assert total == pytest.approx(11.90e9, rel=0.001)
    assert shapes.modulation / total == pytest.approx(0.27, abs=0.005)
    assert (len(shapes.blocks), shapes.double, shapes.width, shapes.text_tokens) == (57, 19, 3072, 512)


def saved_values(doubles: int, singles: int, targets: str, rank: int, recomputed: int = 0, compiled: bool = False) -> float:
    """bf16 values that a forward pass keeps for its backward, for each of 128 tokens; weights are not counted."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=doubles, num_single_layers=singles, attention_head_dim=128, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=True,
    )  # fmt: skip
    transformer.to(torch.bfloat16).requires_grad_(False)
    for p in LoraSpec(rank, rank, targets).attach(transformer, 0):
        p.data = p.data.to(torch.bfloat16)
    lean(transformer, remake=True)
    start_plan(transformer, MemoryPlan("bf16", recomputed, 0, False), CPU, random=False)
    transformer.train()
    for block in blocks_of(transformer) if compiled else ():
        block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    conditioning = Conditioning(torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 16).bfloat16())
    with kept_bytes(transformer) as kept, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        family = load_family("mini")
        out = family.velocity(transformer, torch.randn(1, 64, 64).bfloat16(), torch.tensor([0.5]), 1.0, conditioning, flow.image_ids(16, 16))
    assert out.requires_grad
    return sum(kept.values()) / 128 / 2


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear"])
def test_activations_are_what_torch_keeps(targets: str):
    rank = 16
    one = saved_values(1, 1, targets, rank)
    for i, counted in enumerate([saved_values(2, 1, targets, rank), saved_values(1, 2, targets, rank)]):
        assert counted - one == pytest.approx(plan.SAVED[targets]["lean"][i] * 512 + plan.SAVED_RANKS[targets][i] * rank, rel=0.03)


@pytest.mark.slow  # six tracings
@pytest.mark.parametrize("targets", ["attention", "attention+ff"])
def test_compiled_blocks_keep_what_is_reckoned(targets: str):
    one = saved_values(1, 1, targets, 16, compiled=True)
    for i, counted in enumerate([saved_values(2, 1, targets, 16, compiled=True), saved_values(1, 2, targets, 16, compiled=True)]):
        assert counted - one == pytest.approx(plan.SAVED[targets]["compiled"][i] * 512 + plan.SAVED_RANKS[targets][i] * 16, rel=0.03)


def test_a_run_that_is_compiled_is_reckoned_with_what_the_compiler_keeps(dev: str):
    shapes, fastest = shapes_of(recipe(dev), load_family(dev)), MemoryPlan("bf16", 0, 0, False)

    def activations(**settings: object) -> float:
        return plan.estimate(fastest, shapes, recipe(dev, **settings), ASSUMED).items["activations"]

    assert activations(steps=1000) == activations(compile_blocks=True) > 1.3 * activations(steps=100) == 1.3 * activations(compile_blocks=False)
    assert activations(compile_blocks=False, train_text_encoder=True) > 1.1 * activations(compile_blocks=False)
    assert activations(lora_dropout=0.1, use_dora=True) > activations(use_dora=True) > activations(lora_dropout=0.1) > activations(compile_blocks=True)


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [({}, True), ({"targets": "all-linear"}, False), ({"layers_to_optimize_regex": "attn"}, True), ({"layers_to_optimize_regex": "transformer_blocks"}, False)],
    ids=str,
)
def test_modulation_is_never_computed_ahead_where_a_lora_sits_on_it(dev: str, settings: dict[str, object], ahead: bool):
    config = recipe(dev, **settings)
    assert any(found.precomputed for found in plan.candidates(shapes_of(config, load_family(dev)), config)) == ahead


def test_a_recomputed_block_keeps_its_input_only():
    assert saved_values(1, 2, "attention+ff", 16, recomputed=3) - saved_values(1, 1, "attention+ff", 16, recomputed=2) == pytest.approx(512, rel=0.01)


# The choice


@pytest.mark.parametrize(("vram_gb", "px"), [(24, 1024), (16, 1024), (12, 768), (8, 512)])
def test_a_card_of_this_size_trains_at_this_resolution(dev: str, vram_gb: int, px: int):
    config = recipe(dev, resolution=str(px))
    best = choose(shapes_of(config, load_family(dev)), config, ASSUMED, 0.95 * vram_gb * GB, HOST_BYTES)[0]
    assert best.bytes <= 0.95 * vram_gb * GB and best.plan.precision != "nf4"


def test_a_large_card_gives_up_nothing_and_the_lighter_plans_are_lighter(dev: str):
    config = recipe(dev, resolution="1024")
    found = choose(shapes_of(config, load_family(dev)), config, ASSUMED, 141 * GB, HOST_BYTES)
    assert found[0].plan == MemoryPlan("bf16", 0, 0, False)
    assert all(a.bytes > b.bytes for a, b in pairwise(found)) and len(found) > 3
    assert plan.next_lighter(found[0].plan, found) == found[1].plan and plan.next_lighter(found[-1].plan, found) is None


def test_what_is_asked_for_is_kept(dev: str):
    config = recipe(dev, precision="bf16", gradient_checkpointing=True, blocks_to_swap=20, precompute_modulation=True)
    [best] = choose(shapes_of(config, load_family(dev)), config, ASSUMED, 24 * GB, HOST_BYTES)
    assert best.plan == MemoryPlan("bf16", 57, 20, True)
    reads_the_base = recipe(dev, use_dora=True)
    assert {e.plan.precision for e in fitting(shapes_of(config, load_family(dev)), reads_the_base, ASSUMED, 80 * GB, HOST_BYTES)} == {"bf16"}
    on_norms = recipe(dev, targets="all-linear")
    assert not any(e.plan.precomputed for e in fitting(shapes_of(on_norms, load_family(dev)), on_norms, ASSUMED, 80 * GB, HOST_BYTES))


def test_gpus_that_divide_the_base_hold_their_part_and_two_blocks(dev: str):
    config, shapes = recipe(dev), shapes_of(recipe(dev), load_family(dev))
    together = choose(shapes, config, ASSUMED, 40 * GB, HOST_BYTES, 2)[0]
    assert (together.plan.precision, together.plan.swapped, together.plan.precomputed, together.plan.shards) == ("bf16", 0, False, 2)
    largest = max(shapes.blocks) + shapes.modulation // 57
    assert together.items["base"] == pytest.approx(sum(shapes.blocks) + shapes.modulation + 2 * 2 * largest + 2 * shapes.rest)
    assert choose(shapes, config, ASSUMED, 20 * GB, HOST_BYTES, 2)[0].plan.precision == "bf16", "24 GB of weights do not fit into 20 GB, halves do"
    with pytest.raises(UserError, match=r"a base divided among GPUs \(FSDP\) stays on them and in bf16"):
        choose(shapes, recipe(dev, precision="int8"), ASSUMED, 40 * GB, HOST_BYTES, 2)


@pytest.mark.parametrize(
    ("changes", "vram_gb", "advice"),
    [
        ({"resolution": "1024", "batch_size": 8}, 12, "--batch-size 1"),
        ({"precision": "bf16", "blocks_to_swap": 0}, 16, "--precision auto"),
        ({"blocks_to_swap": 0, "batch_size": 4}, 10, "(no --blocks-to-swap)"),
        ({}, 2, "a GPU with more memory"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(dev: str, changes: dict[str, object], vram_gb: int, advice: str):
    config = recipe(dev, **changes)
    with pytest.raises(UserError, match="GB of GPU memory") as refused:
        choose(shapes_of(config, load_family(dev)), config, ASSUMED, vram_gb * GB, HOST_BYTES)
    assert advice in refused.value.hint


def test_weights_that_the_host_cannot_hold_are_not_put_there(dev: str):
    config = recipe(dev, resolution="768")
    shapes = shapes_of(config, load_family(dev))
    assert all(e.host_bytes <= 4 * GB for e in fitting(shapes, config, ASSUMED, 24 * GB, 4 * GB))


# The command


def test_the_command_says_memory_time_and_the_next_cheaper_plan(dev: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", dev, "--vram-gb", "24", "--ram-gb", "60", "--resolution", "1024"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan: base ") and "GB on the GPU" in said and "s a step" in said and "next cheaper: " in said and "(assumed)" in said
    assert main(["plan", "--model", dev, "--vram-gb", "24", "--ram-gb", "60", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["plans"][0]["bytes"] <= 24 * GB and record["plans"][0]["plan"]["precision"] in plan.BEST_FIRST


def test_the_command_refuses_in_one_sentence(dev: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", dev, "--vram-gb", "2"]) == 2
    assert "GB of GPU memory" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["plan", "--model", dev]) == 2
        assert "--vram-gb" in capsys.readouterr().err


def test_a_training_that_does_not_fit_is_refused_before_the_photos_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The GPU is asked in a process of its own, which says why."""
    recipe_file = TrainConfig(trigger_word="TOK", model="mini").model_dump_json()
    assert subprocess.run(export.CHECK, input=recipe_file, text=True, timeout=120, check=False).returncode == 0
    read = "import json, sys; sys.exit(2 if json.load(sys.stdin)['trigger_word'] == 'TOK' else 3)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(export, "CHECK", (sys.executable, "-c", read))
    assert main(["train", str(tmp_path), "--trigger", "TOK", "--model", "mini", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


# Every plan trains


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
    ("memory_plan", "tolerance"),
    [(MemoryPlan("int8", 0, 0, False), 0.02), (MemoryPlan("int8", 6, 4, True), 0.02), (MemoryPlan("fp8", 0, 0, False), 0.07)],
    ids=str,
)
def test_eight_bits_stay_near(plainly: tuple[torch.Tensor, torch.Tensor], memory_plan: MemoryPlan, tolerance: float):
    """The distance over the size, of the output and of the gradients."""
    for mine, plain in zip(forward_and_backward(memory_plan), plainly, strict=True):
        assert 0 < (mine - plain).norm() / plain.norm() < tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.01), ("fp8", 0.04), ("nf4", 0.11)])
def test_a_quantised_linear_is_nearly_the_linear(precision: str, tolerance: float):
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 384).requires_grad_(False)
    x = torch.randn(4, 7, 256, requires_grad=True)
    plain = linear(x)
    small = quantized(linear, precision, CPU)
    mine = small(x)
    assert (mine - plain).norm() / plain.norm() < tolerance
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, plain)]
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < tolerance
    assert small.weight.numel() * small.weight.element_size() <= 384 * 256 * (0.5 if precision == "nf4" else 1)


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
    shared = {"preservation_rate": 0.3, "caption_swap_rate": 0.3, "preview_every": 4}
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
    monkeypatch.setattr(fit, "plans_for", two_plans)


@pytest.mark.usefixtures("full_once")
def test_a_run_that_does_not_fit_goes_on_with_the_next_plan(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = untrained(tiny_run, tmp_path / "run")
    fit.run(run)
    assert "memory ran out; going on from the last step with: base fp32, 6 blocks recomputed, 2 blocks in host memory" in capsys.readouterr().err
    rows = run.history()
    plans = [(row["step"], row["plan"]) for row in rows if row.get("event") == "plan"]
    assert plans == [(0, "base fp32, nothing recomputed"), (2, "base fp32, 6 blocks recomputed, 2 blocks in host memory")]
    assert all(torch.equal(a, b) for a, b in zip(fit.final_weights(run), fit.final_weights(RunDir(tiny_run)), strict=True)), "no step was lost or done twice"


@pytest.mark.usefixtures("full_once")
def test_without_the_retry_it_is_saved_and_said(tiny_run: Path, tmp_path: Path):
    run = untrained(tiny_run, tmp_path / "run", auto_retry=False)
    with pytest.raises(UserError, match="memory ran out") as stopped:
        fit.run(run)
    assert "2 blocks in host memory" in stopped.value.hint
    [checkpoint] = run.checkpoints.iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 2


def test_shapes_are_counted_without_weights():
    family = load_family("mini")
    config = TrainConfig(trigger_word="TOK", model="mini")
    whole = Shapes.of(family.transformer(CPU, torch.float32), LoraSpec.of(config), family.text_tokens)
    assert whole == shapes_of(config, family)
