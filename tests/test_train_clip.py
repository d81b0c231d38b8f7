"""A LoRA on CLIP beside the transformer's: trained, saved, resumed, and read by others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from trainers import trainer_of

from infer.engine import Engine
from infer.loras import LoraChoice, resolve
from infer.request import Request
from lorabooth.cli import main
from lorabooth.config import load_config
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.lora_file import LoraFile
from lorabooth.runs import RunDir
from lorabooth.sizes import GB
from lorabooth.speed import RTX_4090
from train import fit
from train.checkpoint import load_checkpoint, save_checkpoint
from train.plan import fitting
from train.planning import shapes_of
from train.trainer import with_weights


@pytest.fixture(scope="module")
def clip_run(tiny_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "run"
    assert main([*tiny_command, "--train-text-encoder", "true", "--text-encoder-lr-ratio", "1", "--lora-alpha", "8", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(clip_run: Path, tmp_path: Path) -> RunDir:
    """A copy of the run, to go on with."""
    return RunDir(Path(shutil.copytree(clip_run, tmp_path / "run")))


def pixels(engine: Engine, loras: tuple[LoraChoice, ...]) -> np.ndarray:
    request = Request("a portrait of TOK", 64, 64, seed=5, num_inference_steps=4)
    return np.asarray(next(engine.generate(request, loras)).image, dtype=np.int16)


def pooled_of(engine: Engine, *loras: LoraChoice) -> torch.Tensor:
    """What CLIP makes of a prompt with LoRAs."""
    return engine.base.prompts.encode("a portrait of TOK", engine.adapters.weighted(loras)[1]).pooled


def test_plain_diffusers_reads_both_parts_and_makes_the_picture_that_the_generator_makes(clip_run: Path, mini_pipe: FluxPipeline, tmp_path: Path):
    keys = set(load_file(clip_run / "lora.safetensors"))
    for side in "AB":
        assert f"text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_{side}.weight" in keys
    assert sum(key.startswith("text_encoder.") for key in keys) == 2 * 4 * 2, "four linears in each of mini's two layers"
    mini_pipe.load_lora_weights(str(clip_run / "lora.safetensors"))
    try:
        pooled = mini_pipe.encode_prompt("a portrait of TOK", None, max_sequence_length=48)[1]
        image = mini_pipe(
            "a portrait of TOK", height=64, width=64, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=48,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
    finally:
        mini_pipe.unload_lora_weights()
    plain = mini_pipe.encode_prompt("a portrait of TOK", None, max_sequence_length=48)[1]
    engine, choice = Engine("mini"), resolve(str(clip_run))
    assert_close(pooled_of(engine, choice), pooled, rtol=1e-5, atol=1e-5)
    assert (pooled - plain).abs().max() > 0.01, "the part for CLIP changes nothing, so the comparison above shows nothing"
    assert np.abs(pixels(engine, (choice,)) - np.asarray(image, dtype=np.int16)).max() <= 2


def test_the_weight_of_a_lora_is_that_of_its_clip_part_too(clip_run: Path, tmp_path: Path):
    engine, choice = Engine("mini"), resolve(str(clip_run))
    without = pooled_of(engine)
    whole, half, none = (pooled_of(engine, LoraChoice(choice.file, weight)) for weight in (1.0, 0.5, 0.0))
    assert_close(none, without, rtol=1e-5, atol=1e-5)
    assert 0.2 < (half - without).norm() / (whole - without).norm() < 0.8
    # The same file without that part: the prompt is encoded as without a LoRA, and the picture is another one.
    state = {key: t for key, t in load_file(clip_run / "lora.safetensors").items() if key.startswith("transformer.")}
    save_file(state, tmp_path / "part.safetensors")
    part = LoraChoice(LoraFile.read(tmp_path / "part.safetensors"), 1.0)
    assert pooled_of(engine, part) is without
    assert np.abs(pixels(engine, (part,)) - pixels(engine, (choice,))).max() > 2


def test_a_resumed_run_gives_the_same_bytes(run: RunDir):
    def weights(trainer: fit.Trainer) -> list[torch.Tensor]:
        return [t.detach().clone() for t in (*trainer.state.parameters, *trainer.state.ema)]

    shutil.rmtree(run.checkpoints)
    trainer = trainer_of(run)
    start = weights(trainer)
    fit.train_step(trainer)
    save_checkpoint(run, trainer.state)
    fit.train_step(trainer)
    resumed = trainer_of(run)
    load_checkpoint(run, resumed.state)
    fit.train_step(resumed)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(resumed), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(trainer), start, strict=True)), "a part of the LoRA was not trained"


@pytest.mark.parametrize("plus", [1.0, 4.0])
def test_clip_learns_at_its_share_of_the_rate_and_a_resume_goes_on_so(run: RunDir, plus: float):
    shutil.rmtree(run.checkpoints)
    settings = {"text_encoder_lr_ratio": 0.25, "loraplus_lr_ratio": plus, "optimizer": "adamw", "weight_decay": 0.0, "ema_decay": 0.0, "max_grad_norm": 1e9}
    trainer = trainer_of(run, **settings)
    start = [t.detach().clone() for t in trainer.state.parameters]
    fit.train_step(trainer)
    # Adam's first step is the rate itself, whatever the gradient.
    moved = [float((p.detach() - s).abs().max()) for p, s in zip(trainer.state.parameters, start, strict=True)]
    clip = len([p for p in trainer.text_encoder.parameters() if p.requires_grad])
    assert clip == 2 * 4 * 2
    rate, of_transformer, of_clip = trainer.config.learning_rate, moved[:-clip], moved[-clip:]
    assert max(of_transformer) == pytest.approx(plus * rate, rel=0.01) and max(of_clip) == pytest.approx(0.25 * plus * rate, rel=0.01)
    save_checkpoint(run, trainer.state)
    resumed = trainer_of(run, **settings)
    load_checkpoint(run, resumed.state)
    for each in (trainer, resumed):
        fit.train_step(each)
    assert all(torch.equal(a, b) for a, b in zip(trainer.state.parameters, resumed.state.parameters, strict=True))


def test_prodigy_has_one_rate_for_both_parts(run: RunDir):
    shutil.rmtree(run.checkpoints)
    trainer = trainer_of(run, optimizer="prodigy", text_encoder_lr_ratio=0.25)
    fit.train_step(trainer)
    assert len(trainer.state.optimizer.param_groups) == 1


def test_other_weights_are_shown_to_clip_too(run: RunDir):
    trainer = trainer_of(run)
    load_checkpoint(run, trainer.state)
    cached = trainer.cache.conditioning(["trigger"])
    with with_weights(trainer, [torch.zeros_like(p) for p in trainer.live]):
        assert_close(trainer.conditioned(cached).pooled, cached.pooled, rtol=1e-5, atol=1e-5)
    assert (trainer.conditioned(cached).pooled - cached.pooled).abs().max() > 0.01


def test_the_modulation_is_not_computed_ahead_and_clip_has_its_place_in_the_plan():
    config = load_config(None, {"trigger_word": "TOK", "model": "mini", "train_text_encoder": True})
    shapes = shapes_of(config, load_family("mini"))
    plain = shapes_of(load_config(None, {"trigger_word": "TOK", "model": "mini"}), load_family("mini"))
    clip = load_family("mini").clip(torch.device("cpu"), torch.float32)
    assert shapes.text_encoder == sum(p.numel() for p in clip.parameters())
    assert shapes.lora - plain.lora == 2 * 4 * 16 * (128 + 128), "two layers of four linears of 128 x 128, rank 16"
    found = fitting(shapes, config, RTX_4090, 8 * GB, 8 * GB)
    assert found and not any(estimate.plan.precomputed for estimate in found)
    assert all(estimate.items["text encoder"] == 2 * shapes.text_encoder for estimate in found)
    with pytest.raises(UserError, match="precompute_modulation needs the pooled prompts ahead"):
        load_config(None, {"trigger_word": "TOK", "train_text_encoder": True, "precompute_modulation": True})
