"""FLUX.1: the structure of dev without its weights, and every promise of the family on a tiny pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline, FluxTransformer2DModel

from lorabooth import flow, lora, mini
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.families.flux1 import VAE_SCALE, Flux1, fitted_encoder, t5_length, tiny
from lorabooth.lora import LoraSpec

CPU = torch.device("cpu")

# transformer/config.json of black-forest-labs/FLUX.1-dev.
DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
WIDTH = 3072

# Written down by hand, not taken from the patterns under test: module -> (in, out), in widths of the model.
DOUBLE_ATTENTION = {f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
DOUBLE_FF = {"ff.net.0.proj": (1, 4), "ff.net.2": (4, 1), "ff_context.net.0.proj": (1, 4), "ff_context.net.2": (4, 1)}
DOUBLE_NORMS = {"norm1.linear": (1, 6), "norm1_context.linear": (1, 6)}
SINGLE_ATTENTION = {f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v")}
SINGLE_FF = {"proj_mlp": (1, 4), "proj_out": (5, 1)}
SINGLE_NORMS = {"norm.linear": (1, 3)}


def dev_modules(double: dict[str, tuple[int, int]], single: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Names and widths over all 57 blocks."""
    found = {f"transformer_blocks.{i}.{name}": widths for i in range(19) for name, widths in double.items()}
    return found | {f"single_transformer_blocks.{i}.{name}": widths for i in range(38) for name, widths in single.items()}


def empty_dev() -> FluxTransformer2DModel:
    with init_empty_weights():
        return FluxTransformer2DModel(**DEV)


@pytest.fixture(scope="module")
def dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer on the meta device: names and shapes, no memory."""
    return empty_dev()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("families") / "tiny")


@pytest.fixture(scope="module")
def family(folder: Path) -> Flux1:
    return load_family(str(folder))


def test_the_empty_model_has_the_size_of_flux_dev(dev: FluxTransformer2DModel):
    assert sum(p.numel() for p in dev.parameters()) == 11_901_408_320


@pytest.mark.parametrize(
    ("targets", "count", "double", "single"),
    [
        ("attention", 266, DOUBLE_ATTENTION, SINGLE_ATTENTION),
        ("attention+ff", 418, DOUBLE_ATTENTION | DOUBLE_FF, SINGLE_ATTENTION | SINGLE_FF),
        ("all-linear", 494, DOUBLE_ATTENTION | DOUBLE_FF | DOUBLE_NORMS, SINGLE_ATTENTION | SINGLE_FF | SINGLE_NORMS),
    ],
)
def test_each_target_matches_the_same_layers_in_all_57_blocks(
    dev: FluxTransformer2DModel, targets: str, count: int, double: dict[str, tuple[int, int]], single: dict[str, tuple[int, int]]
):
    names = LoraSpec(16, 16, targets).module_names(dev)
    assert len(names) == len(set(names)) == count
    assert set(names) == set(dev_modules(double, single))
    # Outside of the blocks there are linears of the same names, which belong to no target.
    assert not {"proj_out", "x_embedder", "context_embedder", "norm_out.linear"} & set(names)


def test_a_regular_expression_of_the_users_own_matches_whole_names(dev: FluxTransformer2DModel):
    names = LoraSpec(16, 16, r"single_transformer_blocks\.(7|20)\.proj_out").module_names(dev)
    assert names == ["single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"]
    assert LoraSpec(16, 16, "proj_out").module_names(dev) == ["proj_out"]


def test_the_hosted_trainers_regular_expression_is_searched_in_names(dev: FluxTransformer2DModel):
    def names(expression: str) -> list[str]:
        return LoraSpec.of(TrainConfig(trigger_word="TOK", layers_to_optimize_regex=expression)).module_names(dev)

    four = [f"single_transformer_blocks.{i}.proj_out" for i in (7, 12, 16, 20)]
    assert names(r"single_transformer_blocks.(7|12|16|20).proj_out") == names(r"transformer.single_transformer_blocks.(7|12|16|20).proj_out") == four
    assert names("^proj_out$") == ["proj_out"]
    assert len(names("to_q")) == 57
    with pytest.raises(UserError, match=r"^layers_to_optimize_regex: 'to_z' matches no layer"):
        names("to_z")
    with pytest.raises(UserError, match=r"^layers_to_optimize_regex: '.to_q' is not a regular expression"):
        names("(to_q")


def test_the_prefix_changes_nothing_of_an_expression_that_matches_without_it(dev: FluxTransformer2DModel):
    assert len(LoraSpec(16, 16, r"(?!single).*attn\.to_[qkv]").module_names(dev)) == 3 * 19
    assert len(LoraSpec(16, 16, r"[^s].*attn\.to_q").module_names(dev)) == 19


def test_names_may_be_those_in_lora_files(dev: FluxTransformer2DModel):
    expression = r"transformer\.single_transformer_blocks\.7\.proj_out"
    assert LoraSpec(16, 16, expression).module_names(dev) == ["single_transformer_blocks.7.proj_out"]


def test_targets_that_match_nothing_are_refused_with_a_list_of_what_can_be_matched(dev: FluxTransformer2DModel):
    with pytest.raises(UserError, match="'atention' matches no layer") as caught:
        LoraSpec(16, 16, "atention").module_names(dev)
    for name in ("attention+ff", "all-linear", "transformer_blocks.N.attn.to_q", "single_transformer_blocks.N.proj_mlp", "x_embedder"):
        assert name in caught.value.hint
    assert "\n" not in caught.value.message and len(caught.value.hint) < 2000


def test_targets_that_are_no_regular_expression_are_refused(dev: FluxTransformer2DModel):
    with pytest.raises(UserError, match="is not a regular expression"):
        LoraSpec(16, 16, "attn.(to_q").module_names(dev)


def test_a_rank_16_lora_on_flux_dev_has_the_keys_and_shapes_that_diffusers_reads():
    dev, rank = empty_dev(), 16
    parameters = LoraSpec(rank, rank, "attention+ff").attach(dev, seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.tensors(dev).items()}
    modules = dev_modules(DOUBLE_ATTENTION | DOUBLE_FF, SINGLE_ATTENTION | SINGLE_FF)
    down = {f"transformer.{name}.lora_A.weight": (rank, WIDTH * inputs) for name, (inputs, _) in modules.items()}
    up = {f"transformer.{name}.lora_B.weight": (WIDTH * outputs, rank) for name, (_, outputs) in modules.items()}
    assert shapes == down | up
    assert sum(p.numel() for p in parameters) == rank * WIDTH * (19 * 36 + 38 * 17) == 65_372_160
    assert len(parameters) == 2 * 418 and all(p.dtype == torch.float32 for p in parameters)


def test_only_the_lora_can_be_trained(family: Flux1):
    transformer = family.transformer(CPU, torch.float32)
    assert not any(p.requires_grad for p in transformer.parameters())
    parameters = LoraSpec(4, 4, "attention").attach(transformer, seed=0)
    trainable = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert len(trainable) == len(parameters) == 2 * 11 and all(".lora_" in name for name in trainable)


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_a_component_loads_from_its_own_files_alone(folder: Path, tmp_path: Path, component: str):
    shutil.copytree(folder / component, tmp_path / component)
    shutil.copy(folder / "model_index.json", tmp_path)
    module = getattr(Flux1(str(tmp_path)), component)(CPU, torch.float32)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    with pytest.raises(UserError, match=r"has no 'tokenizer': it is not a FLUX\.1 pipeline"):
        Flux1(str(tmp_path)).text_encoders(CPU, torch.float32)


@pytest.mark.parametrize(
    ("component", "file"), [("transformer", "config.json"), ("transformer", "diffusion_pytorch_model.safetensors"), ("text_encoder_2", "model.safetensors")]
)
def test_a_component_whose_files_are_damaged_or_missing_is_named(folder: Path, tmp_path: Path, component: str, file: str):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    load = {"transformer": Flux1(str(tmp_path)).transformer, "text_encoder_2": Flux1(str(tmp_path)).text_encoders}[component]
    path = tmp_path / component / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"its {component} cannot be loaded: "):
        load(CPU, torch.float32)
    path.unlink()
    with pytest.raises(UserError, match=f"its {component} cannot be loaded: "):
        load(CPU, torch.float32)


def test_prompts_become_conditioning_of_a_fixed_length(family: Flux1):
    encoders = family.text_encoders(CPU, torch.float32)
    length = t5_length(encoders.tokenizer_2)
    encoded = family.encode_prompts(encoders, ["a portrait of TOK", ""])
    assert encoded.embeds.shape == (2, length, 16) and encoded.pooled.shape == (2, 16)
    assert not torch.equal(encoded.embeds[0], encoded.embeds[1])
    alone = family.encode_prompts(encoders, [""])
    torch.testing.assert_close(alone.embeds[0], encoded.embeds[1])
    assert family.cut("a portrait") == "" and "house" in family.cut("a portrait " * length + "house")


def test_a_text_encoder_that_does_not_fit_gives_the_same_from_host_memory(family: Flux1):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=5, num_heads=4)).eval().requires_grad_(False)
    prompts = torch.arange(24).view(2, 12)
    plainly = encoder(prompts)[0]
    swapped = fitted_encoder(encoder, CPU, free_bytes=1e9)
    for _ in range(2):
        assert torch.equal(swapped(prompts)[0], plainly)
    first, last = (encoder.encoder.block[i].layer[0].SelfAttention.q.weight for i in (0, 4))
    assert first.data_ptr() == last.data_ptr(), "two places for five blocks"
    assert fitted_encoder(encoder, CPU) is encoder


def test_pictures_and_latents_have_one_to_eight_sides(family: Flux1):
    vae = family.vae(CPU, torch.float32)
    latents = family.encode_pictures(vae, torch.rand(2, 3, 64, 96) * 2 - 1)
    assert latents.shape == (2, 16, 64 // VAE_SCALE, 96 // VAE_SCALE)
    assert family.decode_pictures(vae, latents).shape == (2, 3, 64, 96)


def test_velocity_is_what_plain_diffusers_computes(family: Flux1, folder: Path):
    """The guidance, the noise level and the position ids reach the transformer as FLUX's own pipeline passes them."""
    pipe = FluxPipeline.from_pretrained(folder)
    encoders, transformer = family.text_encoders(CPU, torch.float32), family.transformer(CPU, torch.float32)
    conditioning = family.encode_prompts(encoders, ["a portrait of TOK"])
    start = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    x = flow.pack(start)
    with torch.no_grad():
        ours = family.velocity(transformer, x, torch.tensor([0.7]), 3.5, conditioning, flow.image_ids(8, 12))
        embeds, pooled, text_ids = pipe.encode_prompt("a portrait of TOK", None, max_sequence_length=t5_length(encoders.tokenizer_2))
        theirs = pipe.transformer(
            hidden_states=x,
            timestep=torch.tensor([0.7]),
            guidance=torch.tensor([3.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_image_ids(1, 4, 6, CPU, torch.float32),
            return_dict=False,
        )[0]
    assert ours.shape == x.shape == (1, 24, 64)
    torch.testing.assert_close(ours, theirs)


def test_the_facts_of_a_model_come_from_its_configs(family: Flux1):
    assert family.native_px == 128 and family.uses_guidance
    sigmas = family.sigmas(4, 64)
    assert sigmas.shape == (5,) and sigmas[0] == 1 and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())


def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer/config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(UserError, match=r"is a SD3Transformer2DModel, not a FLUX\.1 model"):
        load_family(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "name", "commercial"),
    [
        ("mini", "Apache-2.0 (drawings: python-avatars, MIT)", True),
        ("black-forest-labs/FLUX.1-schnell", "Apache-2.0", True),
        ("black-forest-labs/FLUX.1-dev", "FLUX.1 [dev] Non-Commercial License v1.1.1", False),
        ("black-forest-labs/FLUX.1-Krea-dev", "FLUX.1 [dev] Non-Commercial License v1.1.1", False),
        ("someone/unknown-finetune", "FLUX.1 [dev] Non-Commercial License v1.1.1", False),
    ],
)
def test_a_licence_is_known_by_the_models_name_and_the_stricter_one_is_assumed(model: str, name: str, commercial: bool):
    licence = Flux1(model).licence
    assert (licence.name, licence.commercial, bool(licence.duties)) == (name, commercial, not commercial)
    assert licence.url.startswith("https://")


@pytest.mark.parametrize("model", ["schnellfoto/FLUX.1-dev", "/home/schnell/FLUX.1-dev"])
def test_a_name_around_the_model_does_not_loosen_its_licence(model: str):
    assert not Flux1(model).licence.commercial


def test_the_shipped_mini_model_is_of_this_family():
    family = load_family("mini")
    assert family.native_px == 128 and (mini.FOLDER / "model_index.json").exists()
