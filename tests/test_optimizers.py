"""Every optimiser by its name: it learns, and an interrupted run gives the same bytes as one that was not."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import get_scheduler

from lorabooth.cli import main
from lorabooth.config import Optimizer, TrainConfig
from lorabooth.errors import UserError
from lorabooth.families import load_family
from lorabooth.runs import RunDir
from train import encode, fit, optimizers
from train.checkpoint import load_checkpoint, save_checkpoint

NAMES = [name for name in get_args(Optimizer) if name != "auto"]


def test_an_optimiser_of_bitsandbytes_does_not_wait_for_the_gpu_after_each_tensor():
    optimizer = optimizers.MAKERS["adamw8bit"]([{"params": [torch.nn.Parameter(torch.ones(4096))]}])
    step = inspect.unwrap(next(kind.step for kind in type(optimizer).__mro__ if "step" in vars(kind)))
    assert "sync_gpu" in step.__code__.co_names and step.__globals__["sync_gpu"].__module__ == "train.optimizers"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run whose training is still to be done."""
    run = RunDir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    shutil.rmtree(run.checkpoints)
    return run


def trainer_of(run: RunDir, **changed: Any) -> fit.Trainer:
    """A trainer of the run with some settings changed, at the newest checkpoint."""
    trainer = fit.start(run, run.config.model_copy(update=changed), load_family("mini"), Accelerator(cpu=True))
    load_checkpoint(run, trainer.state)
    return trainer


def weights(trainer: fit.Trainer) -> list[torch.Tensor]:
    return [t.detach().clone() for t in (*trainer.state.parameters, *trainer.state.ema)]


# Rates at which the tiny run's LoRA (rank 4, of normal random numbers) moves visibly in a few steps.
RATES = {"prodigy": 1.0, "lion": 1e-3, "lion8bit": 1e-3}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_gives_the_same_bytes_and_the_loss_falls(run: RunDir, name: str):
    # Gradient accumulation too: a resume in the middle of a step begins that step again.
    settings = {"optimizer": name, "learning_rate": RATES.get(name, 5e-3), "gradient_accumulation": 2, "lora_rank": 32}
    trainer = trainer_of(run, **settings)
    start = weights(trainer)
    for _ in range(2):
        fit.train_step(trainer)
    save_checkpoint(run, trainer.state)
    for _ in range(2):
        fit.train_step(trainer)
    whole = weights(trainer)
    resumed = trainer_of(run, **settings)
    assert resumed.state.step == 2
    for _ in range(2):
        fit.train_step(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole, weights(resumed), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, start, strict=True))


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_n_steps_a_stop_and_m_more_are_n_plus_m_steps_over_several_shapes(run: RunDir, stop: int):
    # Three photos at two resolutions: an epoch of six batches, two of them a step, so that each stop is inside an epoch or at its end.
    settings = {
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "gradient_accumulation": 2,
        "resolution": "64,96",
        "batch_size": 1,
        "ema_decay": 0.9,
        "lora_dropout": 0.3,
    }
    run._write_config(run.config.model_copy(update=settings))
    encode.run(run)
    trainer = trainer_of(run)
    assert len(trainer.sampler.by_bucket) > 1 and trainer.sampler.per_epoch == 6
    for _ in range(stop):
        fit.train_step(trainer)
    save_checkpoint(run, trainer.state)
    resumed = trainer_of(run)
    assert resumed.state.step == stop
    for each in (trainer, resumed):
        for _ in range(5 - stop):
            fit.train_step(each)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(resumed), strict=True))
    assert not any(torch.equal(p, average) for p, average in zip(resumed.state.parameters, resumed.state.ema, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_lowers_the_loss(name: str):
    config = TrainConfig(trigger_word="TOK", optimizer=name, learning_rate=RATES.get(name, 1e-2))
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 64), torch.randn(256, 128)
    target = x @ torch.randn(128, 64) / 11
    optimizer = optimizers.build(name, dict(layer.named_parameters()), config)

    def loss() -> torch.Tensor:
        return (layer(x) - target).square().mean()

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])  # whose rate is its own
def test_a_step_takes_the_decays_share_of_the_rate_off_each_weight(name: str):
    config = TrainConfig(trigger_word="TOK", optimizer=name, learning_rate=1e-2, weight_decay=2.0)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(weight.clone())
    optimizer = optimizers.build(name, {"p": p}, config)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), weight * (1 - 1e-2 * 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_a_matrix_that_starts_at_zero_moves_at_the_rate(name: str):
    p = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = optimizers.build(name, {"p": p}, TrainConfig(trigger_word="TOK", optimizer=name, learning_rate=1e-3))
    generator = torch.Generator().manual_seed(0)
    p.grad = torch.randn(64, 128, generator=generator)
    for _ in range(5):
        optimizer.step()
    assert 0.3 < p.detach().abs().mean() / (5 * 1e-3) < 1.5, "as lora_B does"


def test_prodigy_says_nothing_where_an_answer_may_stand(capsys: pytest.CaptureFixture[str]):
    optimizers.build("prodigy", {"p": torch.nn.Parameter(torch.ones(4))}, TrainConfig(trigger_word="TOK", optimizer="prodigy"))
    assert not capsys.readouterr().out


def test_gradients_are_no_longer_than_the_recipe_allows(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    run._write_config(run.config.model_copy(update={"max_grad_norm": 1e-4}))
    trainer, norms = trainer_of(run), []
    step = trainer.state.optimizer.step

    def stepping() -> object:
        norms.append(float(torch.cat([p.grad.flatten() for p in trainer.state.parameters if p.grad is not None]).norm()))
        return step()

    monkeypatch.setattr(trainer.state.optimizer, "step", stepping)
    fit.train_step(trainer)
    assert norms == [pytest.approx(1e-4, rel=0.01)]


def test_the_command_takes_the_name_and_the_record_keeps_it(tiny_command: list[str], tmp_path: Path):
    run = RunDir(tmp_path / "run")
    assert main([*tiny_command, "--optimizer", "lion8bit", "--preview-every", "0", "--out", str(run.path)]) == 0
    state = json.loads((run.checkpoints / "step-000004" / "state.json").read_text())
    assert state["optimizer_name"] == "lion8bit" and run.config.optimizer == "lion8bit"
    eight_bit = [t for t in load_file(run.checkpoints / "step-000004" / "optimizer.safetensors").values() if t.dtype == torch.uint8]
    assert eight_bit, "no moment was kept in 8 bits"


def test_auto_is_adamw8bit_on_a_gpu_and_adamw_elsewhere():
    config = TrainConfig(trigger_word="TOK")
    assert optimizers.chosen(config, torch.device("cuda")) == "adamw8bit"
    assert optimizers.chosen(config, torch.device("cpu")) == "adamw"


def test_a_run_that_moves_to_another_kind_of_machine_does_not_mix_optimisers(run: RunDir):
    trainer = trainer_of(run)
    fit.train_step(trainer)
    trainer.state.optimizer_name = "adamw8bit"
    save_checkpoint(run, trainer.state)
    with pytest.raises(UserError, match="was trained with adamw8bit so far, and here 'auto' means adamw"):
        trainer_of(run)


@pytest.mark.parametrize(("given", "used"), [(2e-4, 1.0), (0.5, 0.5), (1.0, 1.0)])
def test_prodigy_takes_a_rate_of_other_optimisers_for_its_own_default(given: float, used: float):
    assert optimizers.rate(TrainConfig(trigger_word="TOK", optimizer="prodigy", learning_rate=given)) == used
    assert optimizers.rate(TrainConfig(trigger_word="TOK", learning_rate=given)) == given


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_after_the_warm_up_the_rate_is_that_of_transformers_schedule(name: str, warmup: int):
    config = TrainConfig(trigger_word="TOK", learning_rate=0.5, steps=12, warmup_steps=warmup, lr_scheduler=name)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5) for _ in range(2))
    schedule = get_scheduler("constant_with_warmup" if name == "constant" else name, theirs, warmup, config.steps)
    for step in range(config.steps):
        optimizers.set_rates(ours, config, step)
        rate = ours.param_groups[0]["lr"]
        # During the warm-up we are a step ahead: their first step has a rate of zero, and moves nothing.
        assert rate == pytest.approx(theirs.param_groups[0]["lr"] if step >= warmup else 0.5 * (step + 1) / warmup)
        theirs.step()
        schedule.step()
    assert rate > 0, "the last step moves something, too"


def test_loraplus_has_the_second_matrices_learn_faster_and_a_resume_goes_on_so(run: RunDir):
    settings = {"optimizer": "adamw", "loraplus_lr_ratio": 4.0, "weight_decay": 0.0, "ema_decay": 0.0, "max_grad_norm": 1e9}
    trainer, plain = trainer_of(run, **settings), trainer_of(run, **settings | {"loraplus_lr_ratio": 1.0})
    start = weights(trainer)
    fit.train_step(trainer)
    fit.train_step(plain)
    after = zip(weights(trainer), weights(plain), start, strict=True)
    # Adam's first step is the rate itself, whatever the gradient; lora_A has none as long as lora_B is zero.
    moved = [(float((p - s).abs().max()), float((q - s).abs().max())) for p, q, s in list(after)[: len(trainer.live)] if not s.any()]
    assert len(moved) == len(trainer.live) // 2
    assert all(fast == pytest.approx(4 * slow, rel=1e-3) and slow > 0 for fast, slow in moved)
    fit.train_step(trainer)
    save_checkpoint(run, trainer.state)
    resumed = trainer_of(run, **settings)
    rates = [group["lr"] for group in resumed.state.optimizer.param_groups]
    assert len(rates) == 2 and rates[1] == pytest.approx(4 * rates[0])
    for each in (trainer, resumed):
        fit.train_step(each)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(resumed), strict=True))


def test_accumulated_gradients_are_the_mean_over_the_batches(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(run, gradient_accumulation=3, max_grad_norm=1e9)
    expected = []
    for index in range(3):
        rng, generator = fit._randomness(trainer.config.seed, index)
        loss = fit.loss_of(trainer, trainer.cache.batch(trainer.sampler.batch(index), trainer.config, rng), generator)
        expected.append(torch.autograd.grad(loss, trainer.state.parameters))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(trainer.state.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in trainer.state.parameters))
    _, photos = fit.train_step(trainer)
    assert len(photos) == 3 * trainer.config.batch_size
    for got, parts in zip(seen, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, sum(parts) / 3, rtol=1e-4, atol=1e-7)
