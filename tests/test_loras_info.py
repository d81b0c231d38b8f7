"""`lorabooth loras info`: the format, figures and words of one LoRA file, whoever wrote it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import lora_formats as formats
import pytest
import torch
from lora_formats import Pairs
from safetensors.torch import load_file, save_file
from test_diff import TO_Q, drawn_pairs, of_mini
from test_loras_command import info, loras

from lorabooth import keys

NAMES = {
    "diffusers": "diffusers", "diffusers_with_alpha_in_its_metadata": "diffusers", "diffusers_with_alpha_tensors": "diffusers", "peft_folder": "PEFT adapter",
    "old_diffusers": "diffusers, old names", "kohya": "kohya", "comfyui": "BFL and ComfyUI", "onetrainer": "OneTrainer",
    "omi": "OneTrainer", "lycoris": "LyCORIS",
}  # fmt: skip


@pytest.mark.parametrize("writer", formats.WRITERS)
def test_each_format_is_named_and_gives_the_same_figures(writer: Callable[[Path, Pairs], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = drawn_pairs()
    told = info(capsys, of_mini(writer(tmp_path / "x.safetensors", pairs)))
    assert (told["format"], told["problem"], told["base"], told["fits"]) == (NAMES[writer.__name__], "", "mini", "mini")
    kinds = {name: (kind["changed"], kind["of"]) for name, kind in told["layers_by_kind"].items()}
    assert kinds["attention"] == (28, 28) and kinds["feed-forward"] == (16, 16) and kinds["norms"][0] == kinds["norms"][1] > 0 == kinds["CLIP"][0]
    whole = sum(float((up.double() @ down.double()).square().sum()) for down, up in pairs.values()) ** 0.5
    assert told["norm"] == pytest.approx(whole, rel=1e-6) and len(told["layers"]) == len(pairs)
    assert {layer["rank"] for layer in told["layers"]} == {4}, "what others fuse is told as what it was"


def test_xlabs_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert info(capsys, of_mini(formats.xlabs(tmp_path / "x.safetensors", formats.shared_attention(drawn_pairs()))))["format"] == "XLabs"
    assert keys.format_of(["lora_te1_text_model_x.lora_down.weight", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]) == "BFL and ComfyUI"
    assert keys.format_of(["x"]) == keys.format_of([]) == keys.format_of(["a.lora_A.weight"]) == "unknown"


def test_alpha_and_strength_are_those_of_the_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = drawn_pairs()
    for writer, alphas, strengths in (
        (formats.kohya, {"2": 22, "6": 4, "8": 4}, {"0.5": 30}),
        (formats.diffusers_with_alpha_in_its_metadata, {"8": 52}, {"2": 52}),
        (formats.peft_folder, {"8": 52}, {"4": 52}),
        (formats.diffusers, {"4": 52}, {"1": 52}),
    ):
        told = info(capsys, of_mini(writer(tmp_path / "x.safetensors", pairs)))
        assert set(told["alphas"]) == set(alphas) and set(told["strengths"]) == set(strengths), writer.__name__


def test_everything_a_run_says_of_its_lora_is_told(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    told, file = info(capsys, tiny_run), tiny_run / "lora.safetensors"
    assert (told["trigger_word"], told["base"], told["ranks"], told["dtypes"], told["dora"]) == ("TOK", "mini", {"4": 44}, {"F32": 88}, False)
    assert told["training"]["steps"] == "4" and told["training"]["learning rate"] == "0.02" and told["training"]["seed"] == "42" and "date" in told["training"]
    data = file.read_bytes()
    assert told["sha256"] == hashlib.sha256(data).hexdigest() and told["bytes"] == len(data)
    assert told["tensors_sha256"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    code, out, _ = loras(capsys, "info", tiny_run, "--layers")
    lines = {line[:16].strip(): line[16:] for line in out.splitlines() if line.startswith("  ")}
    assert lines["layers"] == "attention 28 of 28, feed-forward 16 of 16, norms 0 of 8" and lines["rank"] == "4" and lines["alpha"] == "4; strength 1"
    assert lines["hash"].startswith(told["tensors_sha256"][:12]) and out.count("\ntransformer.") == 44 and code == 0


def test_dora_clip_t5_and_what_fits_nothing_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = of_mini(formats.diffusers(tmp_path / "x.safetensors", drawn_pairs()), **{"ss_tag_frequency": '{"a": {"fox": 9, "tok": 12}, "b": 3}'})
    more = {f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{side}.weight": torch.zeros(()) for side in ("down", "up")}
    more |= {f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{side}.weight": torch.ones(2, 64) for side in ("down",)}
    more |= {f"transformer.{TO_Q}.lora_magnitude_vector": torch.ones(224), "\x1b[31mx": torch.ones(1)}
    save_file(load_file(file) | more, file, {"lorabooth.base": "mini", "ss_tag_frequency": '{"a": {"fox": 9, "tok": 12}, "b": 3}'})
    told = info(capsys, file)
    assert told["dora"] and told["layers_by_kind"]["T5"]["changed"] == 1 and told["words_in_captions"] == ["tok", "fox"]
    assert len(told["left_out"]) == 4 and sum(layer["dora"] for layer in told["layers"]) == 1
    out = loras(capsys, "info", file)[1]
    assert "T5 1 (not used)" in out and "no place in mini for ?[31mx" in out and "diffusers, DoRA" in out and "often in its captions: tok, fox" in out
