"""LoRA files: plain diffusers reads ours to the same pictures, and what is no LoRA is refused in one sentence."""

import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from infer.loras import resolve, split_weight
from lorabooth import flow, mini
from lorabooth.errors import UserError
from lorabooth.families.flux1 import Conditioning, Flux1
from lorabooth.lora import LoraSpec, save_lora, since, tensors
from lorabooth.lora_file import MAX_HEADER_BYTES, LoraFile

CPU = torch.device("cpu")
FAMILY = Flux1("mini")


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    """The mini model's transformer as training loads it."""
    return FAMILY.transformer(CPU, torch.float32)


@pytest.fixture(scope="module")
def plain() -> FluxPipeline:
    """The mini model as anybody would load it; of its own, since the session's must stay free of LoRAs."""
    return FluxPipeline.from_pretrained(mini.FOLDER, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)


@pytest.fixture
def clean(plain: FluxPipeline) -> Iterator[FluxPipeline]:
    yield plain
    plain.unload_lora_weights()


@torch.no_grad()
def output(transformer: FluxTransformer2DModel) -> Tensor:
    """The velocity at a fixed input, without gradients."""
    return velocity(transformer)


def velocity(transformer: FluxTransformer2DModel) -> Tensor:
    """The velocity at a fixed input."""
    config, generator = transformer.config, torch.Generator().manual_seed(1)
    embeds = torch.randn(1, 5, config.joint_attention_dim, generator=generator)
    conditioning = Conditioning(embeds, torch.randn(1, config.pooled_projection_dim, generator=generator))
    x = flow.pack(torch.randn(1, 16, 8, 8, generator=generator))
    return FAMILY.velocity(transformer, x, torch.tensor([0.6]), 3.5, conditioning, flow.image_ids(8, 8))


def randomised(transformer: FluxTransformer2DModel, spec: LoraSpec) -> None:
    """Put a LoRA on that does something."""
    generator = torch.Generator().manual_seed(2)
    for parameter in spec.attach(transformer, seed=0):
        parameter.data.normal_(std=0.1, generator=generator)


def write_lora(path: Path, tensors_by_key: dict[str, Tensor] | None = None, **metadata: str) -> Path:
    save_file(tensors_by_key or {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 4)}, path, metadata=metadata)
    return path


def write_header(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def test_a_fresh_lora_changes_nothing(transformer: FluxTransformer2DModel):
    before = output(transformer)
    LoraSpec(4, 4, "all-linear").attach(transformer, seed=0)
    assert torch.equal(output(transformer), before)


def test_the_same_seed_gives_the_same_lora():
    first, second, other = (LoraSpec(4, 4, "attention").attach(FAMILY.transformer(CPU, torch.float32), seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("rank", "alpha", "targets"), [(4, 4, "attention"), (4, 4, "attention+ff"), (4, 8, "all-linear"), (6, 2, "attention+ff")])
def test_plain_diffusers_gives_the_output_of_the_trained_model(
    transformer: FluxTransformer2DModel, clean: FluxPipeline, tmp_path: Path, rank: int, alpha: int, targets: str
):
    base, spec = output(transformer), LoraSpec(rank, alpha, targets)
    randomised(transformer, spec)
    trained = output(transformer)
    assert (trained - base).abs().max() > 0.01, "the LoRA must matter for this test to mean something"
    save_lora(tmp_path / "lora.safetensors", tensors(transformer), spec, {})
    clean.load_lora_weights(str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(output(clean.transformer), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"init": "gaussian"}, {"init": "pissa"}, {"dropout": 0.5}], ids=str)
def test_every_kind_of_lora_starts_at_the_base_and_plain_diffusers_reads_what_it_learned(
    transformer: FluxTransformer2DModel, clean: FluxPipeline, tmp_path: Path, options: dict[str, Any]
):
    base, spec = output(transformer), LoraSpec(4, 8, "attention+ff", **options)
    parameters = spec.attach(transformer, seed=0)
    torch.testing.assert_close(output(transformer), base, rtol=1e-3, atol=1e-4)
    start = {name: t.clone() for name, t in tensors(transformer).items()}
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    trained = output(transformer.eval())
    assert (trained - base).abs().max() > 0.01, "the LoRA must matter for this test to mean something"
    state = tensors(transformer)
    save_lora(tmp_path / "lora.safetensors", since(start, state) if spec.init == "pissa" else state, spec, {})
    clean.load_lora_weights(str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(output(clean.transformer), trained, rtol=1e-3, atol=1e-4)


def test_a_pissa_lora_starts_again_from_what_it_took_out_before(transformer: FluxTransformer2DModel):
    spec = LoraSpec(4, 4, "attention", init="pissa")
    spec.attach(transformer, seed=0)
    again = FAMILY.transformer(CPU, torch.float32)
    spec.attach(again, seed=1, start={name: t.clone() for name, t in tensors(transformer).items()})
    assert transformer.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in transformer.state_dict().items())


def test_alpha_is_folded_into_the_weights(transformer: FluxTransformer2DModel, tmp_path: Path):
    spec = LoraSpec(4, 8, "attention")
    randomised(transformer, spec)
    state = tensors(transformer)
    save_lora(tmp_path / "a.safetensors", state, spec, {})
    save_lora(tmp_path / "b.safetensors", {name: t * 2 if ".lora_B." in name else t for name, t in state.items()}, LoraSpec(4, 4, "attention"), {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_metadata_can_be_read_back(transformer: FluxTransformer2DModel, tmp_path: Path):
    spec, path = LoraSpec(4, 4, "attention"), tmp_path / "runs/tok/lora.safetensors"
    randomised(transformer, spec)
    path.parent.mkdir(parents=True)
    save_lora(path, tensors(transformer), spec, {"modelspec.trigger_phrase": "TÖK", "lorabooth.base": "mini"}, torch.bfloat16)
    file = LoraFile.read(path)
    assert (file.name, file.trigger_word, file.metadata["lorabooth.base"]) == ("tok", "TÖK", "mini")
    assert json.loads(file.metadata["lora_adapter_metadata"])["transformer.r"] == 4
    assert len(file.shapes) == len(tensors(transformer)) and len(file.sha256) == 64
    assert resolve(str(path.parent)).file.path == path


def make_text(path: Path) -> None:
    path.write_text("this is a text, not a LoRA, whatever its name says")


def make_cut(path: Path) -> None:
    path.write_bytes(write_lora(path).read_bytes()[:-1])


def make_longer(path: Path) -> None:
    path.write_bytes(write_lora(path).read_bytes() + b"\0")


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora": [1.0]}))


def make_checkpoint(path: Path) -> None:
    torch.save({"lora": torch.zeros(1)}, path)


def make_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")


def make_no_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 5) + b"hello")


def make_other_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 3) + b"[1]")


def make_other_model(path: Path) -> None:
    write_lora(path, {"vae.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_text, "is not a safetensors file"),
        (make_no_json, "is not a safetensors file: its header is no JSON"),
        (make_other_json, "is not a safetensors file: its header is not as that format has it"),
        (make_cut, "is cut short"),
        (make_longer, "is longer than it should be"),
        (make_pickle, "is not a safetensors file"),
        (make_checkpoint, "is not a safetensors file"),
        (make_huge_header, "is not a safetensors file"),
        (make_other_model, "holds no LoRA: none of its 1 tensors is named lora"),
        (Path.touch, "is not a safetensors file"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path: Path, make, message: str):
    path = tmp_path / "lora.safetensors"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        LoraFile.read(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b'{"__metadata__": [], "a.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', id="metadata is a list"),
        pytest.param(b'{"a.lora_A.weight": {"data_offsets": [0, 0]}}', id="a tensor without a shape"),
        pytest.param(b'{"a.lora_A.weight": {"shape": 3, "data_offsets": [0, 0]}}', id="a shape that is a number"),
        pytest.param(b'{"lora":' + b"[" * 100_000, id="brackets within brackets"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes):
    with pytest.raises(UserError):
        LoraFile.read(write_header(tmp_path / "lora.safetensors", header))


def test_a_missing_file_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="no LoRA file at"):
        LoraFile.read(tmp_path / "lora.safetensors")


def test_a_weight_stands_behind_a_colon(tmp_path: Path):
    path = write_lora(tmp_path / "x.safetensors")
    assert resolve(str(path)).weight == 1.0
    assert resolve(f"{path}:0.8").weight == 0.8
    assert split_weight("runs/tok:-0.5") == ("runs/tok", -0.5)
    assert split_weight("owner/name:.25") == ("owner/name", 0.25)
    assert split_weight("owner/name") == ("owner/name", 1.0)


@pytest.mark.parametrize("weight", ["3.01", "-2.5", "99"])
def test_a_weight_out_of_range_is_refused_with_the_range(weight: str):
    with pytest.raises(UserError, match=rf"the weight of runs/tok is {weight}; it must lie from -2 to 3"):
        split_weight(f"runs/tok:{weight}")


def test_a_folder_with_a_colon_in_its_name_is_that_folder(tmp_path: Path):
    (tmp_path / "tok:2").mkdir()
    assert split_weight(str(tmp_path / "tok:2")) == (str(tmp_path / "tok:2"), 1.0)


def test_a_run_that_has_not_ended_says_so(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no LoRA yet: its training has not ended"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("reference", ["./nowhere", "nowhere.safetensors", "/no/where.safetensors", "a b/c"])
def test_what_is_no_lora_reference_is_refused_without_asking_the_hub(reference: str):
    with pytest.raises(UserError, match="no LoRA at"):
        resolve(reference)
