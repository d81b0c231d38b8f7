"""LoRA files of every trainer: each says the same to our reader, and makes the picture that diffusers' loader or a weight merged by hand makes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_formats as formats
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel
from lora_formats import Pairs
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from infer.engine import Engine
from infer.loras import LoraChoice
from infer.request import Request
from lorabooth.errors import UserError
from lorabooth.families.flux1 import TARGETS, Flux1
from lorabooth.layout import ClipLayout, Layout, sizes_of
from lorabooth.lora import LoraSpec
from lorabooth.lora_file import LoraFile
from lorabooth.lowrank import Additions, additions

FAMILY = Flux1("mini")


def one_layer_of(number: float) -> dict[str, Tensor]:
    name = "transformer.transformer_blocks.0.attn.to_q"
    return {f"{name}.lora_A.weight": torch.full((2, 224), number), f"{name}.lora_B.weight": torch.full((224, 2), number)}


LAYOUT, CLIP = Layout(sizes_of(FAMILY.empty_transformer())), ClipLayout(sizes_of(FAMILY.empty_clip()))
REQUEST = Request("a person in a red hoodie, smiling", 64, 64, 5, num_inference_steps=3)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """A LoRA on every linear of the blocks, of rank 4 and in places 2, so strong that it shows."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in LoraSpec(4, 4, TARGETS["all-linear"]).module_names(FAMILY.empty_transformer()):
        outputs, inputs = LAYOUT.sizes[name]
        rank = 2 if "ff." in name else 4
        found[name] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5, torch.randn(outputs, rank, generator=generator) * 0.25
    return found


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("mini")


def read(path: Path) -> Additions:
    return additions(LoraFile.read(path), LAYOUT, CLIP, "mini")


def pixels(engine: Engine, *files: Path, request: Request = REQUEST) -> np.ndarray:
    return np.asarray(next(engine.generate(request, tuple(LoraChoice(LoraFile.read(file), 1.0) for file in files))).image, np.int16)


def merged_by_hand(changes: dict[str, Tensor]) -> np.ndarray:
    """The picture of a base whose weights were changed before anything of ours saw it."""
    engine = Engine("mini")
    transformer = engine.base.transformer([()])
    with torch.no_grad():
        for name, change in changes.items():
            transformer.get_submodule(name).weight += change
    return pixels(engine)


@pytest.mark.parametrize("writer", formats.WRITERS)
def test_each_format_says_the_same(writer: Callable[[Path, Pairs], Path], pairs: Pairs, tmp_path: Path):
    found = read(writer(tmp_path / "x.safetensors", pairs))
    assert found.transformer.keys() == pairs.keys() and not found.clip and not found.left_out
    for name, change in formats.changes(pairs).items():
        assert_close(found.transformer[name].up @ found.transformer[name].down, change, rtol=1e-5, atol=1e-6)
        assert len(found.transformer[name].down) == len(pairs[name][0]), "fused layers keep the rank that they had before"


def test_xlabs_says_the_same(pairs: Pairs, tmp_path: Path):
    shared = formats.shared_attention(pairs)
    found = read(formats.xlabs(tmp_path / "x.safetensors", shared))
    assert found.transformer.keys() == shared.keys()
    for name, change in formats.changes(shared).items():
        assert_close(found.transformer[name].up @ found.transformer[name].down, change, rtol=1e-5, atol=1e-6)


def test_each_format_makes_the_picture_of_a_weight_merged_by_hand_and_of_diffusers_loader(
    pairs: Pairs, engine: Engine, mini_pipe: FluxPipeline, tmp_path: Path
):
    right, without = merged_by_hand(formats.changes(pairs)), pixels(engine)
    assert np.abs(right - without).max() > 30
    for writer in formats.WRITERS:
        assert np.abs(pixels(engine, writer(tmp_path / writer.__name__ / "x.safetensors", pairs)) - right).max() <= 1, writer.__name__
    for writer in (formats.diffusers, formats.diffusers_with_alpha_in_its_metadata):  # its conversions of the others know FLUX.1-dev's own widths only
        mini_pipe.load_lora_weights(str(tmp_path / writer.__name__ / "x.safetensors"))
        try:
            [theirs] = mini_pipe(
                REQUEST.prompt,
                width=64,
                height=64,
                num_inference_steps=3,
                guidance_scale=3.5,
                max_sequence_length=48,
                generator=torch.Generator().manual_seed(5),
            ).images
        finally:
            mini_pipe.unload_lora_weights()
        assert np.abs(np.asarray(theirs, np.int16) - right).max() <= 2, writer.__name__


@pytest.mark.parametrize("writer", [formats.kohya, formats.diffusers_with_alpha_in_its_metadata, formats.diffusers])
def test_all_494_layers_of_flux_dev_are_those_of_diffusers_loader(writer: Callable[[Path, Pairs], Path], tmp_path: Path):
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    layout, generator = Layout(sizes_of(transformer)), torch.Generator().manual_seed(2)
    names = LoraSpec(1, 1, TARGETS["all-linear"]).module_names(transformer)
    pairs = {name: (torch.randn(1, layout.sizes[name][1], generator=generator), torch.randn(layout.sizes[name][0], 1, generator=generator)) for name in names}
    path = writer(tmp_path / "x.safetensors", pairs)
    ours = additions(LoraFile.read(path), layout, CLIP, "FLUX.1-dev").transformer
    theirs, metadata = FluxPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    strength = metadata["transformer.lora_alpha"] / metadata["transformer.r"] if metadata else 1
    assert len(ours) == len(names) == 494
    for name, low_rank in ours.items():
        down, up = (theirs[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert_close(low_rank.up[-8:] @ low_rank.down[:, :8], strength * up[-8:] @ down[:, :8], rtol=1e-4, atol=1e-5)


def test_layers_outside_the_blocks_too(pairs: Pairs, engine: Engine, tmp_path: Path):
    # BFL's last modulation has its halves in the other order; diffusers' own conversion swaps the rows of the down as well, which is another LoRA.
    generator = torch.Generator().manual_seed(1)
    names = {"final_layer.adaLN_modulation.1": "norm_out.linear", "img_in": "x_embedder", "vector_in.in_layer": "time_text_embed.text_embedder.linear_1"}
    tensors, changes = {}, {}
    for theirs, ours in names.items():
        outputs, inputs = LAYOUT.sizes[ours]
        down, up = torch.randn(2, inputs, generator=generator) * inputs**-0.5, torch.randn(outputs, 2, generator=generator) * 0.1
        tensors |= {f"diffusion_model.{theirs}.lora_A.weight": down, f"diffusion_model.{theirs}.lora_B.weight": up}
        changes[ours] = (torch.cat(up.chunk(2)[::-1]) if theirs.startswith("final") else up) @ down
    made = pixels(engine, formats.write(tmp_path / "x.safetensors", tensors))
    assert np.abs(made - merged_by_hand(changes)).max() <= 1 and np.abs(made - pixels(engine)).max() > 2


def test_the_part_for_clip_by_every_name(pairs: Pairs, engine: Engine, tmp_path: Path):
    generator = torch.Generator().manual_seed(4)
    names = {name: (torch.randn(2, size[1], generator=generator), torch.randn(size[0], 2, generator=generator)) for name, size in CLIP.sizes.items()}
    diffusers = {f"text_encoder.text_model.{name}.lora_{side}.weight": t for name, both in names.items() for side, t in zip("AB", both, strict=True)}
    kohya = {
        f"lora_te1_text_model_{name.replace('.', '_')}.lora_{side}.weight": t
        for name, both in names.items()
        for side, t in zip(("down", "up"), both, strict=True)
    }
    kohya |= {f"lora_te1_text_model_{name.replace('.', '_')}.alpha": torch.tensor(2.0) for name in names}
    first, second = (read(formats.write(tmp_path / f"{i}.safetensors", tensors)) for i, tensors in enumerate((diffusers, kohya)))
    assert first.clip.keys() == second.clip.keys() == CLIP.sizes.keys() and not first.transformer and not first.left_out + second.left_out
    for name, (down, up) in names.items():
        for found in (first, second):
            assert_close(found.clip[name].up @ found.clip[name].down, up @ down)
    assert np.abs(pixels(engine, tmp_path / "0.safetensors") - pixels(engine)).max() > 2
    assert np.array_equal(pixels(engine, tmp_path / "0.safetensors"), pixels(engine, tmp_path / "1.safetensors"))


def test_the_scales_of_a_dora_on_a_fused_layer_are_shared_out(tmp_path: Path):
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = one_layer(name, up=(672, 2)) | {f"{name}.dora_scale": torch.arange(672.0)[:, None]}
    found = read(formats.write(tmp_path / "x.safetensors", tensors)).transformer
    for i, x in enumerate("qkv"):
        assert torch.equal(found[f"transformer_blocks.0.attn.to_{x}"].magnitude, torch.arange(224.0 * i, 224.0 * (i + 1)))  # type: ignore[arg-type]


def test_what_has_no_place_is_listed_by_name(pairs: Pairs, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    formats.diffusers(tmp_path / "x.safetensors", pairs)
    t5 = {f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}
    more = t5 | {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.zeros(3), "transformer.proj_out.diff": torch.zeros(3)}
    path = formats.write(tmp_path / "y.safetensors", load_file(tmp_path / "x.safetensors") | more)
    assert read(path).left_out == tuple(sorted(more))
    assert np.array_equal(pixels(engine, path), pixels(engine, tmp_path / "x.safetensors"))
    said = capsys.readouterr().err
    assert said.count("left out") == 1 and all(name in said for name in more)


def one_layer(name: str = "transformer.transformer_blocks.0.attn.to_q", down: tuple[int, ...] = (2, 224), up: tuple[int, ...] = (224, 2)) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}


DESCRIPTIONS = ("not json", "[" * 5000, "[1]", '{"transformer.lora_alpha": "abc"}', '{"transformer.lora_alpha": [1]}')
DESCRIPTIONS += tuple(f'{{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern}}}' for pattern in ("[1]", '{"to_q": null}', '"x"'))


@pytest.mark.parametrize("described", DESCRIPTIONS, ids=lambda text: text[:60])
def test_a_description_that_makes_no_sense_is_said(described: str, tmp_path: Path):
    with pytest.raises(UserError, match="the description of its adapter is not readable"):
        read(formats.write(tmp_path / "x.safetensors", one_layer(), lora_adapter_metadata=described))


def test_names_of_strangers_cannot_command_the_terminal(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = formats.write(tmp_path / "x.safetensors", one_layer() | {f"\x1b[31mx{i}": torch.zeros(1) for i in range(9)}, **{"lorabooth.base": "\x1b[2J"})
    pixels(engine, path)
    assert "left out" in (said := capsys.readouterr().err) and "\x1b" not in said
    with pytest.raises(UserError) as caught:
        read(formats.write(tmp_path / "y.safetensors", one_layer("\x1b[31mlayer\n"), **{"lorabooth.base": "\x1b[2J"}))
    assert str(caught.value.message).isprintable() and "?[31mlayer?" in caught.value.message


def test_numbers_that_run_over_are_said(engine: Engine, tmp_path: Path):
    before = pixels(engine)
    with pytest.raises(UserError, match="the numbers ran over"):
        pixels(engine, formats.write(tmp_path / "x.safetensors", one_layer_of(1e20)))
    assert np.array_equal(pixels(engine), before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (one_layer(down=(2, 3072)), r"does not fit mini: transformer_blocks\.0\.attn\.to_q takes 224 numbers and gives 224 there, 3072 and 224 in the LoRA"),
        (one_layer(up=(3072, 2)), r"takes 224 numbers and gives 224 there, 224 and 3072 in the LoRA"),
        (one_layer("transformer.transformer_blocks.18.attn.to_q"), r"lacks these layers of it: transformer\.transformer_blocks\.18\.attn\.to_q "),
        (one_layer(down=(3, 224)), "damaged: the two halves of transformer.transformer_blocks.0.attn.to_q do not fit together"),
        (one_layer(down=(2,)), "damaged: the two halves"),
        ({key: t for key, t in one_layer().items() if "lora_A" in key}, "lacks these layers of it"),
        (one_layer() | one_layer("diffusion_model.double_blocks.0.img_attn.qkv", up=(672, 1), down=(1, 224)), "names a layer twice, in two formats that"),
        (one_layer() | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(3)}, "the alpha of .* is not one number"),
        (one_layer() | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(1, 17)}, "DoRA whose scales lie along the inputs"),
        (one_layer() | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(1, 224)}, "DoRA whose scales lie along the inputs"),
        (one_layer() | {"transformer.transformer_blocks.0.attn.to_q.lora_down.weight": torch.ones(2, 224)}, "names a layer twice: .*lora_down.* and .*lora_A"),
        ({key.replace(".weight", f".{name}.weight"): t for name in ("one", "two") for key, t in one_layer().items()}, "names a layer twice"),
        ({key: t * torch.nan for key, t in one_layer().items()}, "numbers that are not finite"),
        ({key: t.int() for key, t in one_layer().items()}, "holds no fractions but int32"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2), "lora_x": torch.ones(1)}, "is a LoKr, not a LoRA"),
        ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr, not a LoRA"),
        ({f"lora_unet_double_blocks_0_img_attn_qkv.{x}.weight": torch.ones(2, 2) for x in ("a1", "a2", "b1", "b2")}, "is a GLoRA, not a LoRA"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.diff": torch.ones(2, 2)}, "is a LyCORIS of whole weights, not a LoRA"),
        ({"lora_unet_double_blocks_0_img_mlp_0.weight": torch.ones(2), "lora_unet_double_blocks_0_img_mlp_0.on_input": torch.tensor(True)}, "is a IA3, not"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tensors: dict[str, Tensor], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as caught:
        read(formats.write(tmp_path / "x.safetensors", tensors))
    assert "\n" not in caught.value.message


def test_an_alpha_may_be_a_whole_number(tmp_path: Path):
    """As in LoRAs that sd-scripts extracts from a model."""
    alpha = "transformer.transformer_blocks.0.attn.to_q.alpha"
    whole, fraction = (read(formats.write(tmp_path / f"{a.dtype}.safetensors", one_layer() | {alpha: a})) for a in (torch.tensor(1), torch.tensor(1.0)))
    (one,), (other,) = whole.transformer.values(), fraction.transformer.values()
    assert torch.equal(one.up, other.up) and torch.equal(one.up, torch.full((224, 2), 0.5))


def test_a_lora_in_two_formats_that_are_the_same_is_read_once(tmp_path: Path):
    tensors = one_layer() | one_layer("lora_unet_double_blocks_0_img_attn_qkv", up=(672, 2))
    assert read(formats.write(tmp_path / "x.safetensors", tensors)).transformer.keys() == {f"transformer_blocks.0.attn.to_{x}" for x in "qkv"}


def test_a_model_with_more_blocks_is_another_model(tmp_path: Path):
    """HunyuanVideo's layers have FLUX.1's names and widths; it has 20 and 40 blocks, not 19 and 38."""
    last = len({name.split(".")[1] for name in LAYOUT.sizes if name.startswith("single_transformer_blocks")})
    beyond = f"transformer.single_transformer_blocks.{last}.attn.to_q"
    fits = {name: t for module in LAYOUT.sizes if module.endswith("attn.to_q") for name, t in one_layer(f"transformer.{module}").items()}
    many = fits | {name.replace("to_q", f"to_{x}"): t for name, t in fits.items() for x in "kv"}
    for name in (beyond, beyond.replace("transformer.", "lora_transformer_", 1).replace(".", "_"), f"diffusion_model.single_blocks.{last}.linear2"):
        with pytest.raises(UserError, match=r"lacks these layers of it: .*single_"):
            read(formats.write(tmp_path / "x.safetensors", many | one_layer(name)))
    assert read(formats.write(tmp_path / "x.safetensors", many | one_layer("transformer.something.else"))).left_out


CLIP_LAYER = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        (f"text_encoder.text_model.{CLIP_LAYER}", ("lora_A.weight", "lora_B.weight")),
        (f"text_encoders.clip_l.transformer.text_model.{CLIP_LAYER}", ("lora_down.weight", "lora_up.weight")),  # ComfyUI's node that extracts LoRAs
        (f"clip_l.text_model.{CLIP_LAYER}", ("lora_down.weight", "lora_up.weight")),  # OneTrainer
        (f"text_encoder.text_model.{CLIP_LAYER}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),  # diffusers' conversion of kohya's
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora", ("down.weight", "up.weight")),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", ("lora_down.weight", "lora_up.weight")),
    ],
)
def test_clip_by_each_of_its_names(name: str, ends: tuple[str, str], tmp_path: Path):
    outputs, inputs = CLIP.sizes[next(module for module in CLIP.sizes if module.endswith(CLIP_LAYER))]
    tensors = {f"{name}.{ends[0]}": torch.ones(2, inputs), f"{name}.{ends[1]}": torch.ones(outputs, 2)}
    found = read(formats.write(tmp_path / "x.safetensors", one_layer() | tensors))
    assert len(found.clip) == len(found.transformer) == 1 and not found.left_out


@pytest.mark.parametrize("prefix", ["text_encoders.t5xxl.transformer.", "t5.", "lora_te2_", "text_encoder_9.", "clip_l.unheard_of."])
def test_layers_of_text_encoders_that_are_not_there_make_no_other_model(prefix: str, tmp_path: Path):
    text = {name: t for i in range(9) for name, t in one_layer(f"{prefix}encoder.block.{i}.layer.0.SelfAttention.q").items()}
    found = read(formats.write(tmp_path / "x.safetensors", one_layer() | text))
    assert len(found.transformer) == 1 and found.left_out == tuple(sorted(text))


def test_a_header_as_large_as_kohyas_tags_make_it_is_read(tmp_path: Path):
    assert read(formats.write(tmp_path / "x.safetensors", one_layer(), ss_tag_frequency=json.dumps({"x": {f"a caption {i} " * 9: 1 for i in range(60000)}})))


def strengths(path: Path, tensors: dict[str, Tensor], **described: Any) -> dict[str, float]:
    """Of each layer of such a file, whose tensors are all one."""
    found = read(formats.write(path, tensors, lora_adapter_metadata=json.dumps(described)))
    return {module: float(one.up[0, 0]) for module, one in found.transformer.items()}


def test_a_description_without_the_name_of_a_part_is_the_transformers(tmp_path: Path):
    """As a transformer's own `save_lora_adapter` writes it."""
    bare = {name.removeprefix("transformer."): t for name, t in one_layer().items()}
    assert strengths(tmp_path / "x.safetensors", bare, lora_alpha=8, r=2) == {"transformer_blocks.0.attn.to_q": 4.0}
    of_clip = {"text_encoder.lora_alpha": 8, "text_encoder.r": 2}
    assert strengths(tmp_path / "x.safetensors", one_layer(), **of_clip) == {"transformer_blocks.0.attn.to_q": 1.0}


def test_a_pattern_behind_a_hat_means_the_whole_name(tmp_path: Path):
    outputs, inputs = LAYOUT.sizes["proj_out"]
    single = "single_transformer_blocks.0.proj_out"
    wide, high = LAYOUT.sizes[single][1], LAYOUT.sizes[single][0]
    tensors = one_layer("transformer.proj_out", down=(2, inputs), up=(outputs, 2)) | one_layer(f"transformer.{single}", down=(2, wide), up=(high, 2))
    for pattern, right in (("^proj_out", {"proj_out": 0.5, single: 4.0}), ("proj_out", {"proj_out": 0.5, single: 0.5})):
        assert strengths(tmp_path / "x.safetensors", tensors, **{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 1}}) == right


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_what_belongs_to_a_base_of_its_own_is_refused(start: str, tmp_path: Path):
    folder = tmp_path / "folder"
    path = formats.write(folder / "adapter_model.safetensors", {f"base_model.model.{name.removeprefix('transformer.')}": t for name, t in one_layer().items()})
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "init_lora_weights": start}))
    with pytest.raises(UserError, match=f"began as {start}, which takes a part out of the base"):
        read(path)
    with pytest.raises(UserError, match="began as"):
        strengths(tmp_path / "x.safetensors", one_layer(), **{"transformer.lora_alpha": 2, "transformer.init_lora_weights": start})
    assert strengths(tmp_path / "x.safetensors", one_layer(), **{"transformer.lora_alpha": 2, "transformer.init_lora_weights": "gaussian"})


@pytest.mark.parametrize("pattern", [r"transformer_blocks\.\d+\.attn\.to_q", ".*to_q", "to_q|to_k"])
def test_alphas_by_expressions_are_refused_and_by_names_read(pattern: str, tmp_path: Path):
    def described(key: str) -> Path:
        return formats.write(
            tmp_path / "x.safetensors", one_layer(), lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {key: 4}})
        )

    with pytest.raises(UserError, match="gives an alpha by an expression"):
        read(described(pattern))
    for name in ("to_q", r"^transformer_blocks\.0\.attn\.to_q$"):
        (one,) = read(described(name)).transformer.values()
        assert torch.equal(one.up, torch.full((224, 2), 2.0))


def test_a_layer_of_rank_0_is_damaged(tmp_path: Path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    layer = {f"{name}.lora_A.weight": torch.zeros(0, 224), f"{name}.lora_B.weight": torch.zeros(224, 0), f"{name}.alpha": torch.tensor(4.0)}
    file = formats.write(tmp_path / "a.safetensors", layer)
    with pytest.raises(UserError, match="the two halves"):
        additions(LoraFile.read(file), LAYOUT, CLIP, "mini")
