"""Training on the mini model: the right loss, the same bytes after any interruption, and a LoRA that others can load."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file
from trainers import trainer_of

from infer.engine import Engine
from infer.loras import resolve
from infer.request import Request
from lorabooth import sampling, stages
from lorabooth.cli import main
from lorabooth.config import TrainConfig
from lorabooth.errors import UserError
from lorabooth.photos import Manifest, ingest
from lorabooth.runs import RunDir
from tests.test_processes import untrained
from train import encode, fit
from train import report as train_report
from train.__main__ import main as train_stages
from train.checkpoint import load_checkpoint, save_checkpoint
from train.command import recipe_config, train
from train.data import cached_key, items, stem, validation_items, write_cached
from train.validation import measure


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two LoRA files hold the same tensors to the bit; the dates in their metadata may differ."""
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[k].view(torch.int32), right[k].view(torch.int32)) for k in left)


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


# Recipes


def test_what_a_recipe_leaves_open_is_as_in_the_models_own(tmp_path: Path):
    recipe, named = tmp_path / "r8.yaml", {"trigger_word": "TOK"}
    recipe.write_text("lora_rank: 8\nwandb_sample_interval: 7\n")
    own, changed = recipe_config(None, named | {"model": "mini"}), recipe_config(recipe, named | {"model": "mini", "steps": 5})
    assert changed == own.model_copy(update={"lora_rank": 8, "preview_every": 7, "steps": 5}) and own.resolution == "128"
    assert recipe_config(recipe, named).resolution == TrainConfig.model_fields["resolution"].default
    recipe.write_text("model: mini\nlora_rank: 8\n")
    assert recipe_config(recipe, named) == own.model_copy(update={"lora_rank": 8})
    recipe.write_text("model: mini\noptimizer: prodigy\nprecompute_modulation: true\n")  # which exclude what mini's has
    found = recipe_config(recipe, named)
    assert (found.loraplus_lr_ratio, found.train_text_encoder, found.resolution) == (1, False, "128")


# Held-out photos


def test_held_out_photos_are_not_trained_on_and_their_loss_falls(tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(tmp_path / "run")
    options = ["--validation-photos", "1", "--validation-every", "5", "--steps", "20", "--learning-rate", "0.002", "--preview-every", "0"]
    assert main([*tiny_command, *options, "--out", str(run.path)]) == 0
    rows = [row for row in run.history() if row.get("event") == "validation"]
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    manifest = Manifest.load(run.path)
    [kept_out] = validation_items(manifest, run.config)
    assert kept_out.photo not in {item.photo for item in items(manifest, run.config)}
    assert "held out" in (run.path / "report.html").read_text()
    assert main([*tiny_command, "--validation-photos", "3", "--out", str(tmp_path / "none")]) == 2
    assert "validation_photos is 3 of 3 photos: none is left to train on" in capsys.readouterr().err


# Averaged weights


def test_averaged_weights_are_the_average_and_previews_leave_the_raw_ones_alone(run: RunDir):
    trainer = trainer_of(run)
    average = [p.detach().clone() for p in trainer.state.parameters]
    for step in range(1, 4):
        fit.train_step(trainer)
        decay = min(trainer.config.ema_decay, step / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, trainer.state.parameters, strict=True)]
    for mine, other in zip(trainer.state.ema, average, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(e, p) for e, p in zip(trainer.state.ema, trainer.state.parameters, strict=True))
    raw = [p.detach().clone() for p in trainer.state.parameters]
    fit.preview(trainer)
    assert all(torch.equal(p, r) for p, r in zip(trainer.state.parameters, raw, strict=True))
    picture = run.samples / "step-000003-0.png"
    assert Image.open(picture).size == (64, 64)
    before = picture.read_bytes()
    with torch.no_grad():
        torch._foreach_zero_(trainer.state.parameters)
    trainer.show_weights(), fit.preview(trainer)
    assert picture.read_bytes() == before, "it is of the average"
    torch._foreach_zero_(trainer.state.ema)
    fit.preview(trainer)
    assert picture.read_bytes() != before


def test_the_loss_of_held_out_photos_is_of_the_averaged_weights_and_of_the_same_noise_at_each_step(tiny_run: Path, tmp_path: Path):
    trainer = trainer_of(untrained(tiny_run, tmp_path / "run", validation_photos=1))
    for _ in range(3):
        fit.train_step(trainer)
    loss = measure(trainer)
    trainer.state.step += 7
    with torch.no_grad():
        torch._foreach_zero_(trainer.state.parameters)
    trainer.show_weights()
    assert measure(trainer) == loss
    torch._foreach_zero_(trainer.state.ema)
    assert measure(trainer) != loss


@pytest.mark.parametrize("full_error", [torch.OutOfMemoryError("no more"), RuntimeError("GET was unable to find an engine to execute this computation")])
def test_a_preview_that_the_gpu_has_no_room_for_is_decoded_on_the_cpu(run: RunDir, monkeypatch: pytest.MonkeyPatch, full_error: RuntimeError):
    trainer, decode, calls = trainer_of(run), sampling.decode, []

    def full(*inputs):
        calls.append(inputs)
        if len(calls) == 1:
            raise full_error
        return decode(*inputs)

    monkeypatch.setattr(sampling, "decode", full)
    fit.preview(trainer)
    assert len(calls) == 2 and Image.open(run.samples / "step-000000-0.png").size == (64, 64)


def test_the_exported_weights_are_the_averaged_ones_and_the_raw_ones_on_request(tiny_run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert train_stages(["export", str(folder), "--raw"]) is None
    exported, unaveraged = load_file(folder / "lora.safetensors"), load_file(folder / "lora-raw.safetensors")
    last = folder / "checkpoints" / "step-000004"
    raw, ema = ([t for t in load_file(last / name).values()] for name in ("lora.safetensors", "ema.safetensors"))

    def total(tensors) -> float:
        return sum(float(t.double().abs().sum()) for t in tensors)

    assert total(exported.values()) == pytest.approx(total(ema), rel=1e-9) != pytest.approx(total(raw), rel=1e-6)
    assert total(unaveraged.values()) == pytest.approx(total(raw), rel=1e-9)
    with pytest.raises(UserError, match="usage: python -m train encode"):
        train_stages(["fit", str(folder), "--raw"])


# What comes out


def test_a_run_leaves_a_described_lora_previews_metrics_and_a_report(tiny_run: Path):
    run = RunDir.open(tiny_run)
    with safe_open(run.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "TOK" and metadata["lorabooth.base"] == "mini" and metadata["ss_network_dim"] == "4"
    assert re.fullmatch("[0-9a-f]{64}", metadata["lorabooth.base_sha256"])
    assert str(tiny_run) not in str(metadata), "a path of this machine would travel with the file"
    assert [row["step"] for row in run.history() if "loss" in row] == [1, 2, 3, 4]
    assert sorted(file.name for file in run.samples.iterdir()) == ["step-000000-0.png", "step-000004-0.png"]
    report = (tiny_run / "report.html").read_text()
    assert report.count("data:image/webp") == 2 + 3 and "<svg" in report and not re.search(r"(src|href)=.?(http|//|\./)", report)
    assert "0.0 s" not in report.split("time of fit")[1][:60] and f"<td>{torch.__version__}</td>" in report
    litter = [file for file in tiny_run.rglob("*") if ".part" in file.name]
    assert not litter


def test_a_report_shows_captions_of_strangers_as_text(tiny_run: Path, tmp_path: Path):
    run = RunDir(shutil.copytree(tiny_run, tmp_path / "run"))
    next(run.captions.iterdir()).write_text("</figcaption><script>alert(1)</script>")
    assert "&lt;script&gt;" in (page := train_report.write(run).read_text()) and "<script" not in page


def test_plain_diffusers_loads_the_lora_and_makes_the_picture_that_the_generator_makes(tiny_run: Path, mini_pipe: FluxPipeline):
    def plain() -> np.ndarray:
        image = mini_pipe(
            "a portrait of TOK", height=96, width=128, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=48,
            generator=torch.Generator().manual_seed(5),
        ).images[0]  # fmt: skip
        return np.asarray(image, dtype=np.int16)

    without = plain()
    mini_pipe.load_lora_weights(str(tiny_run / "lora.safetensors"))
    try:
        theirs = plain()
    finally:
        mini_pipe.unload_lora_weights()
    engine, request = Engine("mini"), Request("a portrait of TOK", 128, 96, seed=5, num_inference_steps=4)
    ours = np.asarray(next(engine.generate(request, (resolve(str(tiny_run)),))).image, dtype=np.int16)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(theirs - without).max() > 20, "the LoRA changes nothing, so the comparison above shows nothing"


# Interruptions


def command_line(arguments: list[str]) -> subprocess.Popen[str]:
    # A shell that started us in the background may have told us to ignore SIGINT, and a child inherits that.
    return subprocess.Popen(
        [sys.executable, "-m", "lorabooth", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=os.environ | {"TQDM_MININTERVAL": "0"},
    )


def interrupted(arguments: list[str], when: str) -> tuple[int, str]:
    """Send Ctrl-C to a real command once `when` (a pattern) is on its standard error; its exit code as a shell has it, and all it said."""
    process = command_line(arguments)
    assert process.stderr is not None
    said = ""
    with process.stderr:
        while not re.search(when, said):
            character = process.stderr.read(1)
            assert character, f"ended with {process.wait()} before {when!r}: {said}"
            said += character
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    code = process.wait(timeout=120)
    # Where it meets an `exec` of text (making a dataclass), `python -m` ends by the signal itself, whatever we return; a shell shows 130 for both.
    return 130 if code == -signal.SIGINT else code, said


def test_a_ctrl_c_in_each_stage_ends_with_130_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):  # large, so that each stage takes long enough to be met in the middle
        noise = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1600, 1600)).save(photos / f"{i}.jpg")
    run = RunDir(tmp_path / "run")
    options = ["--trigger", "TOK", "--model", "mini", "--steps", "8", "--batch-size", "2", "--checkpoint-every", "100", "--preview-every", "0"]
    command = ["train", str(photos), *options, "--out", str(run.path)]
    for when in (r"read photos:\s+0%", r"encode photos:\s+0%", r"train:.*\| [1-5]/8"):
        code, said = interrupted(command, when)
        assert code == 130, said
        assert "run the same command again" in said and "Traceback" not in said, said
        assert not [file for file in run.path.rglob("*") if ".part" in file.name]
        assert not run.lora.exists()
    [checkpoint] = run.checkpoints.iterdir()
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert 1 <= stopped_at < 8, "the step at hand was not saved"
    assert main(command) == 0, capsys.readouterr().err
    assert f"{stopped_at}/8" in capsys.readouterr().err, "it did not go on from the step it had saved"
    assert run.lora.exists() and [row["step"] for row in run.history() if "loss" in row] == list(range(1, 9))


def test_a_training_killed_and_resumed_gives_the_same_bytes_as_one_that_was_not(tiny_command: list[str], tmp_path: Path):
    command = [*tiny_command, "--steps", "8", "--preview-every", "3"]
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    process = command_line([*command, "--out", str(broken.path)])
    assert process.stderr is not None
    try:
        until = time.monotonic() + 120
        while not (broken.checkpoints / "step-000002").exists():
            assert process.poll() is None and time.monotonic() < until, "no checkpoint came"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stderr.close()
    assert not fit.finished(RunDir.open(broken.path)), "it was killed too late to show anything"
    assert main([*command, "--out", str(broken.path)]) == 0
    assert main([*command, "--out", str(whole.path)]) == 0
    assert same_bytes(whole.lora, broken.lora)
    assert not [file for file in broken.path.rglob("*") if ".part" in file.name], "the killed process's half checkpoint is still there"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_during_a_preview_saves_the_steps_before_it(number: signal.Signals, run: RunDir, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(run.checkpoints)
    trainer = trainer_of(run)
    trainer.config = run.config.model_copy(update={"checkpoint_every": 100, "preview_every": 1})
    preview = fit.preview

    def preview_and_signal(trainer: fit.Trainer) -> None:
        preview(trainer)
        if trainer.state.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(fit, "preview", preview_and_signal)
    with pytest.raises(KeyboardInterrupt):
        fit._loop(trainer)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000003"]


def test_what_an_interruption_kept_from_being_seen_is_made_by_the_next_session(
    tiny_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ["--validation-photos", "1", "--validation-every", "2", "--steps", "4", "--checkpoint-every", "1", "--preview-every", "2"]
    whole, stopped = RunDir(tmp_path / "whole"), RunDir(tmp_path / "stopped")
    assert main([*tiny_command, *options, "--out", str(whole.path)]) == 0
    saving = fit.save_checkpoint

    def save_and_stop(run: RunDir, state: fit.TrainState) -> None:
        saving(run, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "save_checkpoint", save_and_stop)
    assert [main([*tiny_command, *options, "--out", str(stopped.path)]) for _ in range(4)] == [130] * 4
    monkeypatch.undo()
    assert not (stopped.samples / "step-000004-0.png").exists()
    assert main([*tiny_command, *options, "--out", str(stopped.path)]) == 0
    pictures = [{file.name: file.read_bytes() for file in run.samples.iterdir()} for run in (whole, stopped)]
    assert pictures[0] == pictures[1] and {name[:11] for name in pictures[0]} == {"step-000000", "step-000002", "step-000004"}
    rows = [[row for row in run.history() if row.get("event") == "validation"] for run in (whole, stopped)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [0, 2, 4]
    assert same_bytes(whole.lora, stopped.lora) and "modelspec.thumbnail" in resolve(str(stopped.path)).file.metadata


def test_a_last_preview_that_cannot_be_made_keeps_no_lora_from_being_written(
    run: RunDir, tiny_command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def out_of_memory(_: fit.Trainer) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(fit, "preview", out_of_memory)
    (run.samples / "step-000004-0.png").unlink()
    run.lora.unlink()
    assert main([*tiny_command, "--out", str(run.path)]) == 0 and run.lora.exists()
    assert "what was to be seen after the last step is missing: the GPU's memory ran out" in capsys.readouterr().err


def test_no_prompts_for_previews_is_no_previews(tiny_command: list[str], tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preview_prompts: []\npreview_every: 1\n")
    assert main([*tiny_command, "--recipe", str(recipe), "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "samples").exists()


# Damage


@pytest.mark.parametrize("name", ["lora.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(run: RunDir, name: str):
    flip_bit(run.checkpoints / "step-000004" / name)
    trainer = trainer_of(run)
    load_checkpoint(run, trainer.state)
    assert trainer.state.step == 2
    ema = load_file(run.checkpoints / "step-000002" / "ema.safetensors")
    assert all(torch.equal(t, ema[str(i)]) for i, t in enumerate(trainer.state.ema))


def test_without_a_checkpoint_that_is_whole_training_starts_at_the_first_step(run: RunDir):
    for folder in run.checkpoints.iterdir():
        flip_bit(folder / "ema.safetensors")
    trainer = trainer_of(run)
    load_checkpoint(run, trainer.state)
    assert trainer.state.step == 0
    save_checkpoint(run, trainer.state)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000000"], "the newest good one must not give way to damaged ones"


def test_a_cache_file_that_is_missing_in_the_fit_stage_is_one_sentence(run: RunDir):
    shutil.rmtree(run.checkpoints)
    (run.cache / "00001.text.safetensors").unlink()
    with pytest.raises(UserError, match=r"00001\.text\.safetensors is missing or damaged"):
        fit.run(run)


def test_a_damaged_last_checkpoint_is_trained_again_and_never_exported(run: RunDir, tiny_run: Path, tiny_command: list[str]):
    flip_bit(run.checkpoints / "step-000004" / "ema.safetensors")
    run.lora.unlink()
    assert main([*tiny_command, "--out", str(run.path)]) == 0
    assert same_bytes(run.lora, tiny_run / "lora.safetensors")


def test_a_damaged_cache_file_is_encoded_again_and_the_others_are_kept(run: RunDir):
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.cache.iterdir()}
    cut, empty, missing, flipped = "00001-64x64.safetensors", "00002.text.safetensors", "trigger.text.safetensors", "00003-64x64.safetensors"
    flip_bit(run.cache / flipped)
    (run.cache / cut).write_bytes(before[cut][0][:-10])
    (run.cache / empty).write_bytes(b"")
    (run.cache / missing).unlink()
    encode.run(run)
    for file in run.cache.iterdir():
        content, written = before[file.name]
        if file.name in (cut, empty, missing, flipped):
            old, new = load(content), load_file(file)
            # The other texts of the batch are another length of computation: equal to rounding, not to the bit.
            assert all(torch.allclose(old[k], new[k], rtol=1e-4, atol=1e-5) for k in old)
        else:
            assert file.stat().st_mtime_ns == written
    assert {file.name for file in run.cache.iterdir()} == before.keys()


def test_photos_smaller_than_the_resolution_are_named(run: RunDir):
    manifest = Manifest.load(run.path)
    sides = {photo.original: f"{photo.width_px} x {photo.height_px}" for photo in manifest.photos}
    large = max(max(photo.width_px, photo.height_px) for photo in manifest.photos) + 200
    assert encode.enlarged(manifest, run.config.model_copy(update={"resolution": "64"})) == []
    [note] = encode.enlarged(manifest, run.config.model_copy(update={"resolution": f"64,{large}"}))
    assert note.startswith(f"3 of 3 photos are enlarged to train at {large} px: ") and all(f"{name} ({size})" in note for name, size in sides.items())


def test_a_changed_caption_is_encoded_again(run: RunDir):
    old = load_file(run.cache / "00001.text.safetensors")["embeds"]
    (run.captions / "00001.txt").write_text("TOK in a blue hoodie")
    encode.run(run)
    assert not torch.equal(old, load_file(run.cache / "00001.text.safetensors")["embeds"])


def test_a_loss_that_is_not_finite_names_the_photo_and_writes_no_lora(tiny_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(tmp_path / "run")
    command = [*tiny_command, "--batch-size", "1", "--checkpoint-every", "1", "--preview-every", "0", "--out", str(run.path)]
    parsed = train.make_context("train", command[1:]).params
    values = {name: parsed[name] for name in TrainConfig.model_fields if name != "preview_prompts"}
    RunDir.create(run.path, recipe_config(None, values))
    ingest(Path(command[1]), run.path)
    for stage in ("caption", "encode"):
        stages.run_stage(stage, run)
    # The photo of the second step, so that a checkpoint of the first one exists.
    [poisoned] = trainer_of(run).sampler.batch(1)
    [original] = [photo.original for photo in Manifest.load(run.path).photos if stem(photo) == poisoned.photo]
    file = run.cache / poisoned.latents_name
    write_cached(file, {"latents": torch.full_like(load_file(file)["latents"], torch.nan)}, cached_key(file))
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "nan at step 2" in said and f"(photos {original})" in said and "Traceback" not in said
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000001"]
    assert all(torch.isfinite(t).all() for t in load_file(run.checkpoints / "step-000001" / "lora.safetensors").values())
    assert not run.lora.exists()
