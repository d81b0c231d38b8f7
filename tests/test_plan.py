"""Memory plans: the arithmetic against what torch keeps, the choice for each card, and the command."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabooth import flow
from lorabooth.cli import main
from lorabooth.compiled import set_up_for
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import NORMS, Conditioning
from lorabooth.lora import LoraSpec
from lorabooth.pinned import PinnedMemory, pinned_bytes
from lorabooth.quantized import put_blocks
from lorabooth.sizes import GB, blocks_of, linears, spread
from lorabooth.speed import CARDS, RTX_4090, assumed
from lorabooth.swap import BlockSwap
from scripts.bench_train import kept_bytes
from scripts.random_flux import DEV, write_model
from train import export, placement, plan
from train.lean_blocks import join, lean
from train.placement import place, start_plan
from train.plan import MemoryPlan, Shapes, choose, fitting
from train.planning import shapes_of

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


def test_shapes_are_counted_without_weights():
    family = load_family("mini")
    config = TrainConfig(trigger_word="TOK", model="mini")
    whole = Shapes.of(family.transformer(CPU, torch.float32), LoraSpec.of(config), family.text_tokens)
    assert whole == shapes_of(config, family)


def saved_values(doubles: int, singles: int, targets: str, rank: int, recomputed: int = 0, compiled: str = "", precision: str = "bf16") -> float:
    """bf16 values that a forward pass keeps for its backward, for each further token of the picture; weights are not counted."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=doubles, num_single_layers=singles, attention_head_dim=128, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=True,
    )  # fmt: skip
    transformer.to(torch.bfloat16).requires_grad_(False)
    put_blocks(blocks_of(transformer), precision, 0, CPU)
    for p in LoraSpec(rank, rank, targets).attach(transformer, 0):
        p.data = p.data.to(torch.bfloat16)
    lean(transformer, remake=True)
    if compiled:
        join(transformer)
    start_plan(transformer, MemoryPlan(precision, recomputed, 0, False), CPU, random=False)
    transformer.train()
    set_up_for(blocks_of(transformer), sparing=compiled == "sparing")
    for block in blocks_of(transformer) if compiled else ():
        block.compile(backend="aot_eager_decomp_partition", dynamic=False)
    conditioning = Conditioning(torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 16).bfloat16())
    family, values = load_family("mini"), []
    for side in (16, 32):
        with kept_bytes(transformer) as kept, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            x = torch.randn(1, 4 * side, 64).bfloat16()
            out = family.velocity(transformer, x, torch.tensor([0.5]), 1.0, conditioning, flow.image_ids(16, side))
        assert out.requires_grad
        values.append(sum(kept.values()) / 2)
    return (values[1] - values[0]) / 64


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear"])
def test_activations_are_what_torch_keeps(targets: str):
    rank = 16
    one = saved_values(1, 1, targets, rank)
    for i, counted in enumerate([saved_values(2, 1, targets, rank), saved_values(1, 2, targets, rank)]):
        assert counted - one == pytest.approx(plan.SAVED[targets]["lean"][i] * 512 + plan.SAVED_RANKS[targets][i] * rank, rel=0.03)


@pytest.mark.slow  # three tracings of each
@pytest.mark.parametrize("compiled", ["compiled", "sparing"])
@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear"])
def test_compiled_blocks_keep_what_is_reckoned(targets: str, compiled: str):
    torch._dynamo.reset()
    rank = 4  # so small that all weights that may be are joined with it
    one = saved_values(1, 1, targets, rank, compiled=compiled)
    for i, counted in enumerate([saved_values(2, 1, targets, rank, compiled=compiled), saved_values(1, 2, targets, rank, compiled=compiled)]):
        norms = 2 * 2 * 128 * (i == 0)  # fp32 weights of a double block's norms for each token, whatever the width: of FLUX.1-dev's a sixth
        assert counted - one == pytest.approx(plan.SAVED[targets][compiled][i] * 512 + plan.SAVED_RANKS[targets][i] * rank + norms, rel=0.03)


def test_compiled_blocks_do_not_keep_the_wide_copies_of_quantized_weights():
    torch._dynamo.reset()
    counted = {precision: saved_values(1, 1, "attention+ff", 16, compiled="compiled", precision=precision) for precision in ("bf16", "int8")}
    assert counted["int8"] == pytest.approx(counted["bf16"], rel=0.01)


def test_a_plan_that_recomputes_blocks_is_compiled_sparingly(dev: str):
    shapes, config = shapes_of(recipe(dev), load_family(dev)), recipe(dev, compile_blocks=True)
    kept = [plan.estimate(MemoryPlan("bf16", k, 0, False), shapes, config, RTX_4090).items["activations"] for k in (0, 1, 2)]
    assert kept[0] - kept[1] > 3 * (kept[1] - kept[2]) > 0


def test_a_run_that_is_compiled_is_reckoned_with_what_the_compiler_keeps(dev: str):
    shapes, fastest = shapes_of(recipe(dev), load_family(dev)), MemoryPlan("bf16", 0, 0, False)

    def activations(**settings: object) -> float:
        return plan.estimate(fastest, shapes, recipe(dev, **settings), RTX_4090).items["activations"]

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


@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_in_host_memory_take_what_is_reckoned(ahead: bool, monkeypatch: pytest.MonkeyPatch):
    family, made = load_family("mini"), []
    monkeypatch.setattr(placement, "BlockSwap", lambda *arguments: made.append(BlockSwap(*arguments)))
    shapes, transformer, chosen = shapes_of(recipe("mini"), family), family.transformer(CPU, torch.float32), MemoryPlan("fp32", 6, 6, ahead)
    place(transformer, chosen, CPU)
    start_plan(transformer, chosen, CPU, random=False)
    [swap] = made
    taken = [4 * sum(place.host.numel() for places in swap.places for place in places), 4 * shapes.modulation * ahead]
    assert plan.estimate(chosen, shapes, recipe("mini"), RTX_4090).host_bytes == sum(map(pinned_bytes, taken))


def test_pinned_memory_takes_no_more_than_is_reckoned(dev: str):
    transformer = load_family(dev).empty_transformer().to(torch.bfloat16)
    for some in ((True, False), (True,), (False,)):  # all matrices, those of the modulation, those without
        memory, size = PinnedMemory(pin=False), 0  # which nobody writes into, so it is none yet
        for block in blocks_of(transformer):
            for name, linear in linears(block):
                if (re.fullmatch(NORMS, name) is not None) in some:
                    memory.reserve(linear.weight.nbytes)
                    size += linear.weight.nbytes
        assert sum(map(len, memory.chunks)) <= pinned_bytes(size)


def test_a_recomputed_block_keeps_its_input_only():
    assert saved_values(1, 2, "attention+ff", 16, recomputed=3) - saved_values(1, 1, "attention+ff", 16, recomputed=2) == pytest.approx(512, rel=0.01)


@pytest.mark.parametrize(("some", "places"), [(0, ()), (1, (5,)), (3, (1, 5, 8)), (10, tuple(range(10)))])
def test_blocks_that_come_and_go_are_evenly_apart(some: int, places: tuple[int, ...]):
    assert tuple(spread(range(10), some)) == places


# The choice


@pytest.mark.parametrize(("vram_gb", "px"), [(24, 1024), (16, 1024), (12, 768), (8, 512)])
def test_a_card_of_this_size_trains_at_this_resolution(dev: str, vram_gb: int, px: int):
    config = recipe(dev, resolution=str(px))
    best = choose(shapes_of(config, load_family(dev)), config, assumed(vram_gb * GB), 0.95 * vram_gb * GB, HOST_BYTES)[0]
    assert best.bytes <= 0.95 * vram_gb * GB and best.plan.precision != "nf4"


def test_a_large_card_gives_up_nothing_and_the_lighter_plans_are_lighter(dev: str):
    config = recipe(dev, resolution="1024")
    found = choose(shapes_of(config, load_family(dev)), config, RTX_4090, 141 * GB, HOST_BYTES)
    assert found[0].plan == MemoryPlan("bf16", 0, 0, False)
    assert all(a.bytes > b.bytes for a, b in pairwise(found)) and len(found) > 3
    assert plan.next_lighter(found[0].plan, found) == found[1].plan and plan.next_lighter(found[-1].plan, found) is None


def test_what_is_asked_for_is_kept(dev: str):
    config = recipe(dev, precision="bf16", gradient_checkpointing=True, blocks_to_swap=20, precompute_modulation=True)
    [best] = choose(shapes_of(config, load_family(dev)), config, RTX_4090, 24 * GB, HOST_BYTES)
    assert best.plan == MemoryPlan("bf16", 57, 20, True)
    reads_the_base = recipe(dev, use_dora=True)
    assert {e.plan.precision for e in fitting(shapes_of(config, load_family(dev)), reads_the_base, RTX_4090, 80 * GB, HOST_BYTES)} == {"bf16"}
    on_norms = recipe(dev, targets="all-linear")
    assert not any(e.plan.precomputed for e in fitting(shapes_of(on_norms, load_family(dev)), on_norms, RTX_4090, 80 * GB, HOST_BYTES))


def test_gpus_that_divide_the_base_hold_their_part_and_three_blocks(dev: str):
    config, shapes = recipe(dev), shapes_of(recipe(dev), load_family(dev))
    together = choose(shapes, config, RTX_4090, 40 * GB, HOST_BYTES, 2)[0]
    assert (together.plan.precision, together.plan.swapped, together.plan.precomputed, together.plan.shards) == ("bf16", 0, False, 2)
    largest = max(shapes.whole_blocks)
    assert together.items["base"] == pytest.approx(sum(shapes.blocks) + shapes.modulation + 2 * 3 * largest + 2 * shapes.rest)
    assert choose(shapes, config, RTX_4090, 20 * GB, HOST_BYTES, 2)[0].plan.precision == "bf16", "24 GB of weights do not fit into 20 GB, halves do"
    with pytest.raises(UserError, match=r"a base divided among GPUs \(FSDP\) stays on them and in bf16"):
        choose(shapes, recipe(dev, precision="int8"), RTX_4090, 40 * GB, HOST_BYTES, 2)


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
        choose(shapes_of(config, load_family(dev)), config, RTX_4090, vram_gb * GB, HOST_BYTES)
    assert advice in refused.value.hint


@pytest.mark.parametrize(
    ("vram_gb", "ram_gb", "lacking", "said"),
    [(6, 12.5, ("host", "GPU"), "or"), (8, 1, ("host", "GPU"), "or"), (2, 60, ("GPU",), ""), (4, 1, ("host", "GPU"), "and")],
)
def test_what_lacks_is_told_with_amounts_that_do(dev: str, vram_gb: float, ram_gb: float, lacking: tuple[str, ...], said: str):
    config = recipe(dev, resolution="1024", **({"blocks_to_swap": 57} if said == "and" else {}))
    shapes, free = shapes_of(config, load_family(dev)), {"GPU": vram_gb, "host": ram_gb}
    with pytest.raises(UserError, match="this training needs at least" if said != "and" else r"\) and ") as refused:
        choose(shapes, config, RTX_4090, vram_gb * GB, ram_gb * GB)
    needs = {kind: float(need) for need, kind in re.findall(r"([\d.]+) GB of (GPU|host) memory", refused.value.message)}
    assert tuple(needs) == lacking and all(f"({free[kind]:.1f} GB are free)" in refused.value.message for kind in needs)
    for given in [free | needs] if said == "and" else [free | {kind: need} for kind, need in needs.items()]:
        assert choose(shapes, config, RTX_4090, given["GPU"] * GB, given["host"] * GB)
    for kind in needs:
        given = free | (needs if said == "and" else {}) | {kind: needs[kind] - 0.2}
        assert not fitting(shapes, config, RTX_4090, given["GPU"] * GB, given["host"] * GB), "it is the least"


def test_where_host_memory_lacks_the_way_out_is_of_the_host(dev: str):
    config = recipe(dev, blocks_to_swap=57, resolution="256")
    with pytest.raises(UserError, match=r"needs at least [\d.]+ GB of host memory \(1\.0 GB are free\)\n") as refused:
        choose(shapes_of(config, load_family(dev)), config, RTX_4090, 8 * GB, 1 * GB)
    assert refused.value.hint == "stop other programs on this machine, or use one with more memory"


def test_weights_that_the_host_cannot_hold_are_not_put_there(dev: str):
    config = recipe(dev, resolution="768")
    shapes = shapes_of(config, load_family(dev))
    assert all(e.host_bytes <= 4 * GB for e in fitting(shapes, config, RTX_4090, 24 * GB, 4 * GB))


# The command


def test_the_command_says_memory_time_and_the_next_cheaper_plan(dev: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", dev, "--vram-gb", "24", "--ram-gb", "60", "--resolution", "1024"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan: base ") and "GB on the GPU" in said and "s a step" in said and "next cheaper: " in said and "(assumed)" in said
    assert main(["plan", "--model", dev, "--vram-gb", "24", "--ram-gb", "60", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["plans"][0]["bytes"] <= 24 * GB and record["plans"][0]["plan"]["precision"] in plan.BEST_FIRST


@pytest.mark.parametrize(
    ("vram_gb", "name"),
    [(7.5, "RTX 4060"), (8.5, "RTX 4060"), (12, "RTX 4070"), (24, "RTX 4090"), (25.7, "RTX 4090"), (80, "H100"), (141, "H200"), (200, "H200")],
)
def test_times_are_those_of_a_card_with_so_much_memory(vram_gb: float, name: str):
    assert name in assumed(vram_gb * GB).name


def test_a_card_with_more_memory_computes_faster():
    speeds = [speed for _, speed in CARDS]
    assert all(later.tflop > earlier.tflop for earlier, later in pairwise(speeds))


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
