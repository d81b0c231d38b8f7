"""What the LoRA must leave alone: items that preserve, and their twins that learn."""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trainers import trainer_of

from lorabooth import flow
from lorabooth.config import TrainConfig
from lorabooth.runs import RunDir
from train import encode, fit, objective
from train.data import preserving


def part_of(trainer: fit.Trainer, index: int) -> slice:
    """The part of a batch that one of two processes computes."""
    return replace(trainer, accelerator=SimpleNamespace(process_index=index, num_processes=2)).part


def test_the_class_phrase_stands_where_the_trigger_stood():
    assert encode.of_class("a TOK in a hat, TOKYO behind TOK", "TOK", "a man") == "a man in a hat, TOKYO behind a man"
    assert encode.of_class("TOK's dog and the <x>", "<x>", r"a \1 dog") == r"TOK's dog and a \1 dog"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_what_preserves_aims_at_the_base_and_leaves_the_weights_alone(run: RunDir, init: str):
    config = run.config.model_copy(update={"preservation_rate": 0.3, "lora_init": init, "lora_dropout": 0.1})
    shutil.rmtree(run.checkpoints)  # of another recipe
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    picked = trainer.sampler.batch(0)
    batches = [trainer.cache.batch(picked, config, random.Random(seed)) for seed in range(100)]
    assert 0.2 < sum(batch.preserved for batch in batches) / (100 * len(picked)) < 0.4
    preserving = next(batch for batch in batches if batch.preserved)
    assert preserving.preserved < len(picked), "the others go on learning"
    twin = picked[len(picked) - preserving.preserved]
    captions = load_file(run.cache / f"{twin.photo}-class.text.safetensors")["embeds"]
    assert torch.equal(preserving.conditioning.embeds[0], captions) and preserving.photos[0] == twin.photo

    trainer.transformer.eval()  # no dropout, so that a LoRA which has learned nothing is the base
    noise, sigma = objective.drawn(trainer, preserving, torch.Generator().manual_seed(1))
    errors = objective.squared_error(trainer, preserving, noise, sigma).mean((1, 2))
    assert errors[: preserving.preserved].max() < 1e-6 < 1e-3 < errors[preserving.preserved :].min()
    learned = []
    masked = replace(preserving, weights=torch.full_like(preserving.weights, 0.5))
    with torch.no_grad():
        for p in trainer.state.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            learned.append(p.clone())
        of_masked = objective.squared_error(trainer, masked, noise, sigma)[: preserving.preserved].mean()
    loss = objective.squared_error(trainer, preserving, noise, sigma)[: preserving.preserved].mean()
    assert loss > 1e-4
    assert of_masked == loss, "the base's own picture is all of it to be kept, whatever the photo's mask hides"
    assert all(torch.equal(p, q) for p, q in zip(trainer.state.parameters, learned, strict=True))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, trainer.state.parameters))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_preserves_is_the_twin_of_one_that_learns_under_much_noise(run: RunDir, count: int):
    config = run.config.model_copy(update={"preservation_rate": 0.5, "sigma_sampling": "uniform"})
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    picked = (trainer.sampler.batch(0) * 4)[:4]
    whole = replace(trainer.cache.batch(picked, config, random.Random(0)), preserved=count)
    drawn = [objective.drawn(trainer, whole, torch.Generator().manual_seed(seed)) for seed in range(200)]
    twins = min(count, 4 - count)
    for noise, sigma in drawn:
        assert torch.equal(noise[:count][count - twins :], noise[4 - twins :]) and torch.equal(sigma[:count][count - twins :], sigma[4 - twins :])
        assert len(noise.flatten(1).unique(dim=0)) == 4 - twins
    sigmas = torch.stack([sigma for _, sigma in drawn])
    if count < 2:  # what learns without a twin has the levels of the recipe
        assert sigmas[:, count : 4 - twins].mean() == pytest.approx(0.5, abs=0.06)
    assert sigmas[:, :count].mean() == pytest.approx(8 / 9, abs=0.03), "the mean of the highest of eight"
    # Two processes draw as one does, and share what preserves.
    shares = []
    for index in range(2):
        part = part_of(trainer, index)
        mine = replace(whole, mine=part)
        noise, sigma = objective.drawn(trainer, mine, torch.Generator().manual_seed(0))
        assert torch.equal(noise, drawn[0][0][part]) and torch.equal(sigma, drawn[0][1][part])
        shares.append(mine.own_preserved)
    assert sum(shares) == count and max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("rate", "size"), [(0.25, 4), (0.25, 1), (0.3, 2), (0.1, 3), (0, 1), (0.9, 1)])
def test_the_share_of_a_batch_that_preserves_is_what_the_rate_says(rate: float, size: int):
    config = TrainConfig(trigger_word="TOK", preservation_rate=rate)
    found = [preserving(config, size, i / 1000) for i in range(1000)]
    assert sum(found) / (1000 * size) == pytest.approx(rate, abs=0.01) and max(found) <= size


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_the_target_of_what_preserves_is_the_bases_own_prediction_in_each_process(run: RunDir, rate: float):
    config = run.config.model_copy(update={"preservation_rate": rate, "sigma_sampling": "uniform"})
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    picked = (trainer.sampler.batch(0) * 2)[:4]
    whole = trainer.cache.batch(picked, config, random.Random(2))
    assert whole.preserved == 4 * rate
    noise, sigma = objective.drawn(trainer, whole, torch.Generator().manual_seed(1))
    x = flow.add_noise(flow.pack(whole.latents), flow.pack(noise), sigma)
    ids = flow.image_ids(*whole.latents.shape[2:])
    targets = flow.pack(noise) - flow.pack(whole.latents)
    base = trainer.family.transformer(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for i, photo in enumerate(whole.photos[: whole.preserved]):
            said = trainer.cache.conditioning([f"{photo}-class"])
            targets[i] = trainer.family.velocity(base, x[i : i + 1], sigma[i : i + 1], 1.0, said, ids)[0]
        for p in trainer.state.parameters:  # what the LoRA has learned is not in the target
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        trainer.transformer.eval()
        predicted = trainer.family.velocity(trainer.transformer, x, sigma, 1.0, whole.conditioning, ids)
        expected = (predicted - targets).square()
        torch.testing.assert_close(objective.squared_error(trainer, whole, noise, sigma), expected, rtol=1e-3, atol=1e-4)
        for index in range(2):  # each process knows the targets of its part, wherever the twins are
            part = part_of(trainer, index)
            batch = trainer.cache.batch(picked, config, random.Random(2), part)
            own = objective.drawn(trainer, batch, torch.Generator().manual_seed(1))
            torch.testing.assert_close(objective.squared_error(trainer, batch, *own), expected[part], rtol=1e-3, atol=1e-4)
