"""The engine: LoRAs come and go to the bit, batches of different people, pictures to start from, every precision; on the mini model."""

import json
import random
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from infer import engine as engine_module
from infer import live
from infer.base import Base
from infer.engine import Engine, Piece, fitted
from infer.glimpse import Glimpse
from infer.loras import LoraChoice
from infer.plan import ServingPlan
from infer.request import Request, Source
from infer.settings import Settings
from lorabooth.device import check_device
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.lora import LoraSpec, save_lora, tensors
from lorabooth.lora_file import LoraFile
from lorabooth.pinned import PinnedMemory

CPU = torch.device("cpu")
PROMPT = "a person in a red hoodie, smiling"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("mini")


@pytest.fixture(scope="module")
def stacking() -> Engine:
    """One that makes pictures with different LoRAs in one batch."""
    return Engine("mini", Settings(batch=4, mixed=True))


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[LoraChoice]:
    """Five of random weights: ranks 2 to 24, one a DoRA, one on the modulation too; each shows in a picture."""
    folder = tmp_path_factory.mktemp("loras")
    specs = [LoraSpec(2, 2, "attention"), LoraSpec(24, 12, "attention+ff"), LoraSpec(4, 4, "all-linear"), LoraSpec(4, 4, "attention", use_dora=True)]
    specs.append(LoraSpec(3, 3, "attention+ff", use_rslora=True))
    found = []
    for i, spec in enumerate(specs):
        transformer = load_family("mini").transformer(CPU, torch.float32)
        spec.attach(transformer, seed=i)
        generator = torch.Generator().manual_seed(i)
        state = {key: t * 1.3 if "magnitude" in key else t + 0.15 * torch.randn(t.shape, generator=generator) for key, t in tensors(transformer).items()}
        save_lora(folder / f"{i}.safetensors", state, spec, {"lorabooth.base": "mini"})
        found.append(LoraChoice(LoraFile.read(folder / f"{i}.safetensors"), 1.0))
    return found


def request(**changes: object) -> Request:
    return Request(**({"prompt": PROMPT, "width_px": 64, "height_px": 64, "seed": 7, "num_inference_steps": 2} | changes))  # type: ignore[arg-type]


def pixels(engine: Engine, *loras: LoraChoice, **changes: object) -> np.ndarray:
    return np.asarray(next(engine.generate(request(**changes), loras)).image, dtype=np.int16)


def weighted(choice: LoraChoice, weight: float) -> LoraChoice:
    return LoraChoice(choice.file, weight)


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


# LoRAs come and go


def test_after_a_thousand_swaps_the_base_and_each_lora_give_the_same_picture_to_the_bit(engine: Engine, loras: list[LoraChoice]):
    before = pixels(engine)
    with_each = [pixels(engine, choice) for choice in loras]
    assert all(distance(before, picture) > 2 for picture in with_each)
    draw = random.Random(0)
    for _ in range(1000):
        several = draw.sample(loras, draw.randint(0, 3))
        one, _ = engine.adapters.weighted(tuple(weighted(choice, draw.uniform(-2, 3)) for choice in several))
        engine.base.transformer([one])
    assert np.array_equal(pixels(engine), before)
    assert all(np.array_equal(pixels(engine, choice), picture) for choice, picture in zip(loras, with_each, strict=True))


def test_a_swap_that_breaks_off_is_mended_by_the_next(engine: Engine, loras: list[LoraChoice], monkeypatch: pytest.MonkeyPatch):
    before, right, real = pixels(engine), pixels(engine, loras[2]), live.merge
    calls: list[object] = []

    def breaks(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise MemoryError
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("infer.live.merge", breaks)
        with pytest.raises(MemoryError):
            pixels(engine, loras[1])
    assert np.array_equal(pixels(engine, loras[2]), right) and np.array_equal(pixels(engine), before)


def test_weights_count_and_several_add_up(engine: Engine, stacking: Engine, loras: list[LoraChoice], mini_pipe: FluxPipeline):
    chosen = (weighted(loras[0], 0.7), weighted(loras[1], -0.5), weighted(loras[4], 1.5))
    made = pixels(engine, *chosen)
    for i, choice in enumerate(chosen):
        mini_pipe.load_lora_weights(str(choice.file.path), adapter_name=f"a{i}")
    mini_pipe.set_adapters(["a0", "a1", "a2"], [choice.weight for choice in chosen])
    try:
        assert distance(made, plain(mini_pipe)) <= 1
    finally:
        mini_pipe.unload_lora_weights()
    assert distance(made, pixels(stacking, *chosen)) <= 1
    assert np.array_equal(pixels(engine, weighted(loras[0], 0)), pixels(engine))


def test_a_dora_makes_the_picture_that_peft_makes(engine: Engine, stacking: Engine, loras: list[LoraChoice]):
    # diffusers' pipeline drops DoRA's scales from most formats; its model with PEFT's own layers has them.
    other = Engine("mini")
    transformer: FluxTransformer2DModel = other.base.transformer([()])
    spec = LoraSpec(4, 4, "attention", use_dora=True)
    spec.attach(transformer, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, t in tensors(transformer).items():
            t.copy_(t * 1.3 if "magnitude" in key else t + 0.15 * torch.randn(t.shape, generator=generator))
    other.base._merged = None  # PEFT has put its layers around the linears
    right = pixels(other)
    assert distance(right, pixels(engine)) > 2
    assert distance(pixels(engine, loras[3]), right) <= 1 and distance(pixels(stacking, loras[3]), right) <= 1
    half = pixels(engine, weighted(loras[3], 0.5), loras[2])
    assert distance(half, pixels(stacking, weighted(loras[3], 0.5), loras[2])) <= 1


def plain(pipe: FluxPipeline, **changes: object) -> np.ndarray:
    """The picture of the plain pipeline."""
    [image] = pipe(
        PROMPT, width=64, height=64, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=48, generator=torch.Generator().manual_seed(7), **changes
    ).images  # fmt: skip
    return np.asarray(image, dtype=np.int16)


def test_pinned_memory_holds_what_was_put_into_it_without_rounding():
    memory, drawn = PinnedMemory(pin=False, chunk_bytes=4096), torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=drawn).to(dtype) for shape, dtype in (((3, 5), torch.float32), ((30, 30), torch.bfloat16), ((70, 70), torch.float32))
    ]
    kept = [memory.keep(tensor) for tensor in tensors] + [memory.keep(tensors[0])]
    assert all(torch.equal(mine, right) and mine.data_ptr() != right.data_ptr() for mine, right in zip(kept, [*tensors, tensors[0]], strict=True))
    assert [len(chunk) for chunk in memory.chunks] == [4096, 70 * 70 * 4]


def test_where_the_system_pins_no_more_the_rest_is_ordinary_memory(capsys: pytest.CaptureFixture[str]):
    memory, tensor = PinnedMemory(pin=True, chunk_bytes=64), torch.arange(12.0)  # without a GPU nothing can be pinned
    assert all(torch.equal(memory.keep(tensor), tensor) for _ in range(3)) and len(memory.chunks) == 3
    assert capsys.readouterr().err.count("note: the system pins no more than 0.0 GB of memory for the GPU") == 1


def test_loras_used_least_lately_leave_first(loras: list[LoraChoice]):
    engine = Engine("mini")
    kept = engine.adapters
    for choice in loras[:3]:
        kept.weighted((choice,))
    layers = [one for choice in (loras[0], loras[3]) for one in kept.weighted((choice,))[0][0].layers.values()]
    kept.limit_bytes = sum(4 * t.numel() for one in layers for t in (one.down, one.up))
    kept.weighted((loras[0],))
    kept.weighted((loras[3],))
    assert list(kept._read) == [loras[0].file.sha256, loras[3].file.sha256]


# Several at once


def test_a_batch_of_four_different_requests_equals_the_four(engine: Engine, stacking: Engine, loras: list[LoraChoice]):
    pieces = [
        Piece(request(), 7, (loras[0],)),
        Piece(request(prompt="a portrait of a woman", guidance_scale=2), 9, (loras[1], weighted(loras[2], 0.4))),
        Piece(request(), 7),
        Piece(request(), 8, (loras[3],)),
    ]
    singles = [pixels(engine, *piece.loras, seed=piece.seed, prompt=piece.request.prompt, guidance_scale=piece.request.guidance_scale) for piece in pieces]
    steps: list[tuple[int, int]] = []
    together = stacking.together(pieces, lambda done, total: steps.append((done, total)))
    assert steps == [(4, 8), (8, 8)], "one batch of four"
    for output, single in zip(together, singles, strict=True):
        assert distance(np.asarray(output.image, dtype=np.int16), single) <= 1
    # Without places for several LoRAs each picture is made by itself, and to the bit.
    apart = engine.together(pieces)
    assert all(np.array_equal(np.asarray(output.image), single) for output, single in zip(apart, singles, strict=True))
    assert [output.seed for output in apart] == [7, 9, 7, 8]


def test_requests_of_different_kinds_do_not_share_a_batch(stacking: Engine):
    pieces = [Piece(request(), 1), Piece(request(width_px=96), 1), Piece(request(num_inference_steps=3), 1), Piece(request(), 2)]
    outputs = stacking.together(pieces)
    assert [output.image.size for output in outputs] == [(64, 64), (96, 64), (64, 64), (64, 64)]
    assert distance(np.asarray(outputs[3].image, dtype=np.int16), pixels(stacking, seed=2)) <= 1


def test_more_different_loras_than_a_batch_has_places_for_are_refused(stacking: Engine, loras: list[LoraChoice]):
    sets = [stacking.adapters.weighted((choice,))[0] for choice in loras]
    with pytest.raises(UserError, match="5 different sets of LoRAs in one batch; the limit is 4"):
        stacking.base.transformer(sets)
    pieces = [Piece(request(), seed, (weighted(choice, 0.5),)) for seed, choice in enumerate((*loras, loras[0]))]
    for output, piece in zip(stacking.together(pieces), pieces, strict=True):  # in batches that have room for them
        assert distance(np.asarray(output.image, dtype=np.int16), pixels(stacking, *piece.loras, seed=piece.seed)) <= 1
    stacking.base.transformer(sets[1:])  # and the places are used again
    stacking.base.transformer([sets[0], sets[2], (), sets[0]])


def test_outputs_of_a_request_are_those_of_its_seeds_whatever_ran_before(engine: Engine, loras: list[LoraChoice]):
    three = [np.asarray(output.image) for output in engine.generate(request(num_outputs=3, seed=2**32 - 1), (loras[1],))]
    pixels(engine, loras[0], width_px=96)
    for seed, picture in zip((2**32 - 1, 0, 1), three, strict=True):
        assert np.array_equal(pixels(engine, loras[1], seed=seed), picture)
    at_once = Engine("mini", Settings(batch=3)).generate(request(num_outputs=3, seed=2**32 - 1), (loras[1],))
    assert all(distance(np.asarray(output.image, dtype=np.int16), picture.astype(np.int16)) <= 1 for output, picture in zip(at_once, three, strict=True))


def test_a_dora_in_its_place_leaves_other_pictures_as_they_were_to_the_bit(loras: list[LoraChoice]):
    engine = Engine("mini", Settings(mixed=True))
    before = [pixels(engine), pixels(engine, loras[0])]
    pixels(engine, loras[3])
    assert all(np.array_equal(*pair) for pair in zip([pixels(engine), pixels(engine, loras[0])], before, strict=True))


def test_one_file_with_two_descriptions_is_two_loras(engine: Engine, stacking: Engine, loras: list[LoraChoice], tmp_path: Path):
    found = []
    for alpha in (2, 8):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        save_file(load_file(loras[0].file.path), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 2}))
        found.append(LoraChoice(LoraFile.read(folder / "adapter_model.safetensors"), 1.0))
    assert found[0].file.sha256 == found[1].file.sha256
    for some in (engine, stacking):
        assert distance(pixels(some, found[0]), pixels(some, found[1])) > 2
    assert np.array_equal(pixels(engine, found[1]), pixels(Engine("mini"), found[1]))


# Pictures to start from


@pytest.fixture(scope="module")
def picture(engine: Engine) -> Image.Image:
    return next(engine.generate(request(num_inference_steps=6, seed=3))).image


def test_a_cell_that_a_mask_touches_may_change_for_the_picture_is_put_together_by_the_pixel():
    mask = Image.new("L", (64, 32))
    mask.putpixel((17, 9), 255)
    assert torch.equal(engine_module._latent_mask(mask)[0, 0].nonzero(), torch.tensor([[1, 2]])) and engine_module._latent_mask(mask).max() == 1


def test_how_much_of_a_picture_changes_is_its_strength(engine: Engine, picture: Image.Image):
    before = np.asarray(picture, dtype=np.int16)
    changed = [np.abs(pixels(engine, num_inference_steps=6, source=Source(picture, None, strength)) - before).mean() for strength in (0, 0.3, 0.6, 1)]
    assert changed[0] < 6 and changed[1] < changed[2] < changed[3] / 4, "at 0 there is only the way through the VAE"
    assert np.array_equal(pixels(engine, num_inference_steps=6, source=Source(picture, None, 1)), pixels(engine, num_inference_steps=6))


def test_a_mask_changes_only_what_is_white_in_it(engine: Engine, picture: Image.Image):
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((16, 8, 47, 39), fill=255)
    before, white = np.asarray(picture, dtype=np.int16), np.asarray(mask) > 0
    made = pixels(engine, num_inference_steps=6, prompt="a person with glasses", source=Source(picture, mask, 1.0))
    assert np.array_equal(made[~white], before[~white]) and np.abs(made[white] - before[white]).mean() > 3


def test_a_picture_of_another_size_is_cut_to_the_shape(engine: Engine, picture: Image.Image):
    wide = Image.new("RGB", (200, 100), "red")
    wide.paste(picture.resize((100, 100)), (50, 0))
    ready = fitted(Source(wide, Image.new("L", wide.size, 255)), request())
    assert ready.image.size == ready.mask.size == (64, 64) and ready.image.getpixel((1, 1)) != (255, 0, 0)  # type: ignore[union-attr]
    assert pixels(engine, source=Source(wide, None, 0.5)).shape == (64, 64, 3)
    with pytest.raises(UserError, match="the mask is 10 x 10 px and the picture 64 x 64"):
        Source(picture, Image.new("L", (10, 10)))


def test_a_negative_prompt_is_that_of_the_plain_pipeline(engine: Engine, mini_pipe: FluxPipeline):
    ours = pixels(engine, negative_prompt="glasses, a beard", true_cfg_scale=3.0)
    assert distance(ours, plain(mini_pipe, negative_prompt="glasses, a beard", true_cfg_scale=3.0)) <= 1
    assert distance(ours, pixels(engine)) > 2
    with pytest.raises(UserError, match="needs a true_cfg_scale above 1"):
        request(negative_prompt="glasses")


# Plans


@pytest.mark.parametrize(("precision", "limit"), [("int8", 1.0), ("fp8", 5.0), ("nf4", 40.0)])
def test_small_bases_make_nearly_the_same_picture_with_loras_too(precision: str, limit: float, engine: Engine, loras: list[LoraChoice]):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    small = Engine("mini", Settings(precision=precision))
    assert small.base.mixes
    for chosen in ((), (loras[0],), (loras[3],)):
        assert 0 < np.abs(pixels(small, *chosen) - pixels(engine, *chosen)).mean() <= limit


@pytest.mark.parametrize("swapped", [1, 99])
def test_blocks_in_host_memory_make_the_same_picture(swapped: int, engine: Engine, loras: list[LoraChoice]):
    some = Engine("mini", Settings(swapped=swapped))
    assert np.array_equal(pixels(some), pixels(engine))
    assert distance(pixels(some, loras[0], loras[1]), pixels(engine, loras[0], loras[1])) <= 1
    assert distance(pixels(some, loras[3]), pixels(engine, loras[3])) <= 1, (
        "the scales of a DoRA come from the block's own weights, not from what lies in its place"
    )
    stored, small = Engine("mini", Settings(swapped=swapped, precision="int8")), Engine("mini", Settings(precision="int8"))
    for chosen in ((), (loras[3],), (loras[0],)):
        assert distance(pixels(stored, *chosen), pixels(small, *chosen)) <= 1


def test_encoders_kept_elsewhere_and_tiles_change_nothing_that_shows(engine: Engine, loras: list[LoraChoice]):
    right = pixels(engine, loras[2])
    for encoders in ("host", "disk"):
        other = Engine("mini", plan=ServingPlan("fp32", encoders=encoders, tiled=True))
        assert distance(pixels(other, loras[2]), right) <= 1
        assert (other.base.prompts._encoders is None) == (encoders == "disk")


# Speed


def test_a_cache_of_steps_leaves_out_work_and_is_the_same_each_time(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    caching, passes = Engine("mini", Settings(cache="max")), []
    block = type(caching.base.transformer([()]).transformer_blocks[1].ff)
    real = block.forward
    monkeypatch.setattr(block, "forward", lambda *arguments, **named: passes.append(1) or real(*arguments, **named))
    [first, second, right] = [pixels(made, num_inference_steps=16) for made in (caching, caching, engine)]
    assert np.array_equal(first, second), "nothing of the first picture is left in the cache"
    assert 0 < np.abs(first - right).mean() < 20
    # Two double blocks of two feed-forwards and four single ones of none: 4 passes a step where nothing is left out.
    assert len(passes) < 2.6 * 4 * 16
    passes.clear()
    pixels(caching, num_inference_steps=16, negative_prompt="rain", true_cfg_scale=3.0)
    assert len(passes) < 0.8 * 2 * 4 * 16, "what is wanted and what is not have a cache each"
    with pytest.raises(UserError, match="a cache of steps and batches exclude each other"):
        Settings(cache="max", batch=2)


@pytest.mark.parametrize("settings", [{}, {"cache": "balanced"}, {"batch": 3}, {"batch": 3, "mixed": True}], ids=str)
def test_what_is_fast_is_compiled_for_the_pictures_at_hand_and_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset(), counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced as for any backend, and no code is made
    fast, slow = (Engine("mini", Settings(fast=fast, **settings)) for fast in (True, False))
    asked = {"width_px": 96, "num_inference_steps": 4}
    fast.base.transformer([()] * fast.settings.batch, (96, 64))
    before = counters["stats"]["unique_graphs"]
    assert np.array_equal(*(pixels(made, num_outputs=made.settings.batch, **asked) for made in (fast, slow)))
    assert counters["stats"]["unique_graphs"] == before > 0 and not counters["graph_break"]


@pytest.mark.slow  # two compilations
@pytest.mark.parametrize("mixed", [False, True])
def test_twenty_swaps_of_ranks_from_4_to_64_compile_nothing_again(mixed: bool, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch._dynamo.reset()
    fast = Engine("mini", Settings(fast=True, mixed=mixed))
    assert fast.record() == {"precision": "fp32", "fast": True}, "it is made again in the same way"
    draw, choices = random.Random(0), []
    for i in range(20):
        transformer, rank = load_family("mini").transformer(CPU, torch.float32), draw.choice((4, 8, 16, 32, 64))
        spec = LoraSpec(rank, rank, "all-linear" if i % 2 else "attention+ff")
        spec.attach(transformer, seed=i)
        generator = torch.Generator().manual_seed(i)
        save_lora(tmp_path / f"{i}.safetensors", {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in tensors(transformer).items()}, spec, {})
        choices.append(LoraChoice(LoraFile.read(tmp_path / f"{i}.safetensors"), 1.0))
    pixels(fast, choices[0], width_px=128, height_px=128)
    assert "compile (once" in capsys.readouterr().err
    before = counters["stats"]["unique_graphs"]
    made = [pixels(fast, choice, width_px=128, height_px=128) for choice in choices]
    assert counters["stats"]["unique_graphs"] == before > 0
    for choice, picture in list(zip(choices, made, strict=True))[::6]:
        assert np.abs(picture - pixels(engine, choice, width_px=128, height_px=128)).mean() < 0.1


def test_glimpses_show_the_colours_of_the_picture_that_comes(engine: Engine):
    glimpse, seen = Glimpse(engine.family, engine.base.vae()), []
    [output] = engine.generate(request(num_inference_steps=6, width_px=96), (), None, lambda latents: seen.append(glimpse.pictures(latents)[0]))
    assert [one.size for one in seen] == [(12, 8)] * 6
    small = output.image.resize((12, 8), Image.Resampling.BOX)
    far = [np.abs(np.asarray(one, dtype=np.int16) - np.asarray(small, dtype=np.int16)).mean() for one in seen]
    assert far[-1] < far[0] and far[-1] < 30


def test_prompts_are_read_together_where_the_encoders_do_not_stay(monkeypatch: pytest.MonkeyPatch):
    other, loads = Engine("mini", plan=ServingPlan("fp32", encoders="disk")), []
    real = type(other.family).text_encoders
    monkeypatch.setattr(type(other.family), "text_encoders", lambda *arguments: loads.append(1) or real(*arguments))
    requests = [request(prompt=f"a person in {place}", negative_prompt="rain", true_cfg_scale=2) for place in ("a park", "a kitchen")]
    other.read(requests)
    assert [pixels(other, prompt=one.prompt).shape for one in requests] and len(loads) == 1


@pytest.mark.parametrize(("capability", "native_px", "refused"), [((7, 5), 1024, True), ((7, 5), 128, False), ((8, 0), 1024, False)])
def test_a_gpu_without_bf16_is_refused_for_a_model_of_flux_size(capability: tuple[int, int], native_px: int, refused: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 2080 Ti")
    with pytest.raises(UserError, match=r"bf16, which RTX 2080 Ti \(compute capability 7.5\) lacks") if refused else nullcontext():
        check_device(torch.device("cuda"), native_px, "FLUX.1-dev")


def test_where_memory_runs_out_the_next_lighter_plan_makes_the_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    other = Engine("mini", plan=ServingPlan("fp32"))
    other._lighter = [ServingPlan("fp32", swapped=2, loras="stacked"), ServingPlan("int8", loras="stacked")]
    real, loaded, before = Base.transformer, Engine._base, weakref.ref(other.base)

    def runs_out(base: Base, *of_batch: Any) -> FluxTransformer2DModel:
        if not base.plan.swapped:
            raise torch.OutOfMemoryError("no more")
        return real(base, *of_batch)

    def base_of(self: Engine, plan: ServingPlan) -> Base:
        assert before() is None, "the base that did not fit is gone before the next one comes"
        return loaded(self, plan)

    monkeypatch.setattr(Base, "transformer", runs_out)
    monkeypatch.setattr(other, "_base", partial(base_of, other))
    assert np.array_equal(pixels(other), pixels(Engine("mini", Settings(swapped=2))))
    assert capsys.readouterr().err.count("note: the GPU's memory ran out with: base fp32") == 1 and other.base.plan.swapped == 2
    monkeypatch.setattr(Base, "transformer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    with pytest.raises(UserError, match="the GPU's memory ran out, and no plan is lighter than: base int8"):
        pixels(other)
