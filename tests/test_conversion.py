"""LoRA files in other programs' formats: the same function on all layers there and back, read by diffusers, made again to the same picture."""

import base64
import io
import json
import re
from pathlib import Path

import lora_formats as formats
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from infer import convert
from infer.engine import Engine
from infer.loras import LoraChoice, resolve
from infer.request import Request
from infer.same_picture import picture_difference
from infer.trigger import filled, triggers_of
from lorabooth import conversion
from lorabooth.cli import main
from lorabooth.comparison import difference
from lorabooth.conversion import FORMATS, merged, reduced, written
from lorabooth.errors import UserError
from lorabooth.families.flux1 import TARGETS, Flux1
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora import LoraSpec
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, LowRank, additions

FAMILY = Flux1("mini")
LAYOUT, CLIP = Layout(sizes_of(FAMILY.empty_transformer())), ClipLayout(sizes_of(FAMILY.empty_clip()))
MODULES = LoraSpec(1, 1, TARGETS["all-linear"]).module_names(FAMILY.empty_transformer())
REQUEST = Request("a portrait of TOK, smiling", 64, 64, 5, num_inference_steps=3)


def drawn(modules: list[str], ranks: list[int], seed: int = 0, layout: Layout = LAYOUT) -> Additions:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, module in enumerate(modules):
        outputs, inputs = layout.sizes[module]
        rank = ranks[i % len(ranks)]
        found[module] = LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))
    return Additions(found, {}, ())


def again(found: Additions, form: str, dtype: torch.dtype, folder: Path, layout: Layout = LAYOUT) -> Additions:
    save_file(written(found, layout, form, dtype), folder / f"{form}.safetensors")
    return additions(LoraFile.read(folder / f"{form}.safetensors"), layout, CLIP, "mini")


def test_there_and_back_on_all_494_layers_of_flux_dev(tmp_path: Path):
    with init_empty_weights():
        layout = Layout(sizes_of(FluxTransformer2DModel(guidance_embeds=True)))
    modules = [name for name in layout.sizes if "blocks" in name]
    found = drawn(modules, [1], layout=layout)
    assert len(modules) == 494
    for form in FORMATS:
        read = again(found, form, torch.float32, tmp_path, layout)
        assert difference(found, read) < 1e-5 and all(len(one.down) == 1 for one in read.transformer.values()), form
    # And diffusers reads kohya's as we do: its own conversion knows these shapes.
    theirs = FluxPipeline.lora_state_dict(str(tmp_path / "kohya.safetensors"))
    for name, one in found.transformer.items():
        down, up = (theirs[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up[:8] @ down[:, :8], one.up[:8] @ one.down[:, :8], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(MODULES), min_size=1, max_size=12, unique=True), st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(FORMATS), st.sampled_from(list(conversion.DTYPES.values())), st.integers(0, 99),
)  # fmt: skip
def test_any_layers_of_any_ranks_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, modules: list[str], ranks: list[int], form: str, dtype: torch.dtype, seed: int
):
    found = drawn(modules, ranks, seed)
    assert difference(found, again(found, form, dtype, tmp_path_factory.getbasetemp())) <= conversion.TOLERANCE[dtype]


def test_the_names_are_those_of_published_files(tmp_path: Path):
    found = drawn(MODULES, [2])
    pairs = {name: (one.down, one.up) for name, one in found.transformer.items()}
    for form, writer in (("kohya", formats.kohya), ("comfyui", formats.comfyui), ("diffusers", formats.diffusers)):
        theirs = load_file(writer(tmp_path / f"{form}.safetensors", pairs))
        ours = written(found, LAYOUT, form, torch.float32)
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}, form


def test_layers_outside_the_blocks_and_clip_and_dora(tmp_path: Path):
    outside = drawn(["norm_out.linear", "proj_out", "x_embedder", "time_text_embed.text_embedder.linear_2"], [3])
    clip = {name: LowRank(torch.randn(2, size[1]), torch.randn(size[0], 2)) for name, size in CLIP.sizes.items()}
    scaled = {name: LowRank(one.down, one.up, torch.rand(len(one.up))) for name, one in drawn(MODULES, [2]).transformer.items()}
    for form in FORMATS:
        for found in (Additions(outside.transformer, clip, ()), Additions(scaled, {}, ())):
            assert difference(found, again(found, form, torch.float32, tmp_path)) < 1e-5, form
    part = {name: one for name, one in scaled.items() if name.endswith("to_q")}
    with pytest.raises(UserError, match=r"this DoRA has scales for a part of double_blocks\.0\.img_attn\.qkv only"):
        written(Additions(part, {}, ()), LAYOUT, "kohya", torch.float32)
    with pytest.raises(UserError, match="a DoRA cannot be merged"):
        merged([(Additions(part, {}, ()), 0.5)])
    with pytest.raises(UserError, match="the rank of a DoRA cannot be reduced"):
        reduced(Additions(part, {}, ()), 1)


def test_layers_of_unequal_ranks_are_of_one_for_diffusers_and_keep_their_own_for_others(tmp_path: Path):
    """get_peft_kwargs of diffusers 0.37 takes the alpha of all from the rank that most have."""
    found = drawn(MODULES, [4, 2, 4])
    tensors = written(found, LAYOUT, "diffusers", torch.float32)
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {4}
    assert {len(one.down) for one in again(found, "diffusers", torch.float32, tmp_path).transformer.values()} == {4, 2}, "zeros are no rank"


def test_an_alpha_is_exact_in_a_coarse_precision(tmp_path: Path):
    found = drawn([f"transformer_blocks.0.attn.to_{x}" for x in "qkv"], [129])
    tensors = written(found, LAYOUT, "kohya", torch.bfloat16)
    assert {int(t) for name, t in tensors.items() if name.endswith("alpha")} == {387}


def test_comfyuis_own_dora_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    norms = FAMILY.transformer(torch.device("cpu"), torch.float32).get_parameter(f"{MODULES[0]}.weight").norm(dim=1)
    name = f"transformer.{MODULES[0]}"
    outputs, inputs = LAYOUT.sizes[MODULES[0]]
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, inputs), f"{name}.lora_B.weight": torch.zeros(outputs, 2), f"{name}.lora_magnitude_vector": norms}
    file = formats.write(tmp_path / "dora.safetensors", tensors, **{"lorabooth.base": "mini"})
    for form in FORMATS:
        said = main(["convert", str(file), "--format", form, "--out", str(tmp_path / f"{form}.safetensors")]), capsys.readouterr().err
        assert (said[0] == 0 and "ComfyUI divides a DoRA's scales" in said[1]) == (form == "comfyui"), said


def test_what_shares_its_down_keeps_its_rank(tmp_path: Path):
    found = drawn(MODULES, [4])
    shared = {name: LowRank(torch.ones(4, one.down.shape[1]), one.up) for name, one in found.transformer.items()}
    tensors = written(Additions(shared, {}, ()), LAYOUT, "kohya", torch.float32)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 224)
    assert difference(Additions(shared, {}, ()), again(Additions(shared, {}, ()), "kohya", torch.float32, tmp_path)) < 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_layers_that_change_nothing_are_written_and_read(form: str, tmp_path: Path):
    found = drawn(MODULES, [2])
    nothing = {name: LowRank(one.down[:0], one.up[:, :0]) for name, one in list(found.transformer.items())[::3]}
    for some in (found.transformer | nothing, {name: LowRank(one.down[:0], one.up[:, :0]) for name, one in found.transformer.items()}):
        assert difference(Additions(some, {}, ()), again(Additions(some, {}, ()), form, torch.float32, tmp_path)) < 1e-5


def test_merging_and_reducing_are_what_the_matrices_say():
    first, second = drawn(MODULES[:3], [3], 1), drawn(MODULES[1:5], [2], 2)
    both = merged([(first, 0.7), (second, -0.4)])
    for module in MODULES[:5]:
        right = sum(
            (weight * one.transformer[module].up @ one.transformer[module].down for one, weight in ((first, 0.7), (second, -0.4)) if module in one.transformer),
            torch.tensor(0.0),
        )
        torch.testing.assert_close(both.transformer[module].up @ both.transformer[module].down, right, rtol=1e-4, atol=1e-4)
    same, lost = reduced(both, 5)
    assert lost < 1e-6 and difference(both, same) < 1e-4
    less, lost = reduced(both, 2)
    squares = [(both.transformer[m].up @ both.transformer[m].down - less.transformer[m].up @ less.transformer[m].down).square().sum() for m in both.transformer]
    whole = [(one.up @ one.down).square().sum() for one in both.transformer.values()]
    assert lost == pytest.approx(float((sum(squares) / sum(whole)) ** 0.5), rel=1e-4) and lost > 0.1
    assert all(len(one.down) == 2 for one in less.transformer.values())


# Commands


def pixels(engine: Engine, reference: Path) -> np.ndarray:
    return np.asarray(next(engine.generate(REQUEST, (resolve(str(reference)),))).image, np.int16)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_makes_the_picture_of_its_run(form: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / f"{form}.safetensors"
    assert main(["export", str(tiny_run), "--format", form, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and "read again: they differ by at most" in printed.err
    assert float(re.findall(r"a picture with it differs by ([\d.]+) of 255", printed.err)[0]) < 0.5
    engine = Engine("mini")
    assert np.abs(pixels(engine, out) - pixels(engine, tiny_run)).max() <= 1
    file, ours = LoraFile.read(out), LoraFile.read(tiny_run / "lora.safetensors")
    assert file.trigger_word == "TOK" and file.metadata["lorabooth.recipe"] == ours.metadata["lorabooth.recipe"]
    assert json.loads(file.metadata["lorabooth.made_of"]) == [{"name": "tiny", "sha256": ours.sha256, "weight": 1.0}]
    assert str(tiny_run) not in json.dumps(file.metadata)
    for one in (file, ours):
        assert one.metadata["sshs_model_hash"] == one.tensors_sha256 and one.metadata["modelspec.hash_sha256"] == f"0x{one.tensors_sha256}"
        kind, data = one.metadata["modelspec.thumbnail"].split(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
            assert kind == "data:image/jpeg;base64" and shown.format == "JPEG" and shown.size == (64, 64)


def test_what_would_make_another_picture_is_not_kept(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(convert, "picture_difference", lambda before, after, model: picture_difference((), after, model))
    monkeypatch.setattr(convert, "LEVELS", 0.05)
    assert main(["export", str(tiny_run), "--format", "kohya", "--out", str(tmp_path / "a.safetensors")]) == 2
    assert "would not make the same picture" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_where_no_picture_can_be_made_that_is_said(tiny_run: Path):
    said = picture_difference((resolve(str(tiny_run)),), tiny_run / "lora.safetensors", "black-forest-labs/FLUX.1-dev")
    assert isinstance(said, str) and "no picture was made to compare" in said


def test_the_raw_weights_are_others(tiny_run: Path, tmp_path: Path):
    for name, options in (("averaged", []), ("raw", ["--raw"])):
        assert main(["export", str(tiny_run), *options, "--format", "kohya", "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    one, other = (additions(LoraFile.read(tmp_path / f"{name}.safetensors"), LAYOUT, CLIP, "mini") for name in ("averaged", "raw"))
    assert one.transformer.keys() == other.transformer.keys() and difference(one, other) > 0.01


def test_several_are_made_one_that_makes_their_picture(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = tmp_path / "other.safetensors"
    save_file(written(drawn(MODULES, [2]), LAYOUT, "diffusers", torch.float32), other, {"lorabooth.base": "mini", "modelspec.trigger_phrase": "IN2"})
    out = tmp_path / "both.safetensors"
    assert main(["convert", f"{tiny_run}:0.8", f"{other}:0.02", "--format", "comfyui", "--out", str(out)]) == 0
    engine = Engine("mini")
    together = np.asarray(next(engine.generate(REQUEST, (resolve(f"{tiny_run}:0.8"), resolve(f"{other}:0.02")))).image, np.int16)
    assert np.abs(pixels(engine, out) - together).max() <= 1
    capsys.readouterr()
    assert main(["convert", str(out), "--format", "diffusers", "--rank", "1", "--out", str(tmp_path / "less.safetensors")]) == 0
    assert "rank 1 loses" in capsys.readouterr().err
    assert {t.shape[0] for name, t in load_file(tmp_path / "less.safetensors").items() if "lora_A" in name} == {1}
    for name in ("both", "less"):
        merged = LoraFile.read(tmp_path / f"{name}.safetensors")
        assert merged.trigger_word == "TOK and IN2" and merged.trigger_words == ("TOK", "IN2")
        triggers = triggers_of([LoraChoice(merged, 1.0)])
        assert filled("IN2 shakes hands with TOK", triggers) == "IN2 shakes hands with TOK" and filled("TOK, smiling", triggers) == "IN2, TOK, smiling"
    assert merged.metadata["modelspec.title"] == "tiny and other"


def test_mistakes_are_one_sentence_and_leave_no_file(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    huge = tmp_path / "huge.safetensors"
    big = {name: t * 1e6 for name, t in written(drawn(MODULES[:2], [2]), LAYOUT, "diffusers", torch.float32).items()}
    save_file(big, huge, {"lorabooth.base": "mini"})
    vast = tmp_path / "vast.safetensors"
    save_file({name: t * 1e31 for name, t in big.items()}, vast, {"lorabooth.base": "mini"})
    for command, words in (
        (["convert", str(tmp_path / "none.safetensors"), "--format", "kohya"], "no LoRA at"),
        (["convert", str(huge), "--format", "kohya", "--dtype", "fp16", "--out", str(tmp_path / "x.safetensors")], "too large for float16"),
        (["convert", str(tiny_run), "--format", "kohya", "--out", str(tmp_path / "x.pt")], "must end in .safetensors"),
        (["convert", str(vast), "--format", "kohya", "--rank", "1", "--out", str(tmp_path / "x.safetensors")], "its numbers are too large"),
        (["convert", str(tiny_run), "--format", "kohya", "--out", str(huge)], "there is another"),
        (["export", str(tiny_run), "--format", "diffusers", "--out", str(tiny_run / "lora.safetensors")], "there is another"),
        (["export", str(tmp_path), "--format", "kohya"], "is not a lorabooth run"),
        (["convert", str(tiny_run), "--format", "kohya", "--rank", "0"], "--rank"),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and words in said
    assert not list(tmp_path.glob("x.*"))
