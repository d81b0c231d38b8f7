"""What the LoRA must leave alone (items that preserve) and the scenes it must not change (items under other photos' captions)."""

import random
from collections import Counter
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
from train.data import Batch, Cache, counts


def part_of(trainer: fit.Trainer, index: int) -> slice:
    """The part of a batch that one of two processes computes."""
    return replace(trainer, accelerator=SimpleNamespace(process_index=index, num_processes=2)).part


def test_the_class_phrase_stands_where_the_trigger_stood():
    assert encode.of_class("a TOK in a hat, TOKYO behind TOK", "TOK", "a man") == "a man in a hat, TOKYO behind a man"
    assert encode.of_class("TOK's dog and the <x>", "<x>", r"a \1 dog") == r"TOK's dog and a \1 dog"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_what_preserves_aims_at_the_base_and_leaves_the_weights_alone(run: RunDir, init: str):
    config = run.config.model_copy(update={"preservation_rate": 0.3, "lora_init": init, "lora_dropout": 0.1})
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


# Captions of other photos


def test_a_share_learns_under_the_captions_of_other_photos(run: RunDir):
    config = run.config.model_copy(update={"caption_swap_rate": 0.3})
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    picked = trainer.sampler.batch(0)
    captions = {photo: load_file(run.cache / f"{photo}.text.safetensors")["embeds"] for photo in trainer.sampler.photos}
    assert len(captions) == 3 and len(picked) == 2
    seen = Counter[str]()
    for seed in range(200):
        batch = trainer.cache.batch(picked, config, random.Random(seed))
        assert batch.photos == tuple(item.photo for item in picked) and batch.preserved == 0
        said = [next(photo for photo, text in captions.items() if torch.equal(text, row)) for row in batch.conditioning.embeds]
        changed = [i for i, photo in enumerate(batch.photos) if said[i] != photo]
        assert changed == list(range(2 - batch.swapped, 2))
        seen.update(said[i] for i in changed)
    assert 0.2 < seen.total() / (200 * len(picked)) < 0.4
    assert set(seen) == captions.keys() - {picked[1].photo} and max(seen.values()) < 2 * min(seen.values()), "any of the others"
    alone = Cache(run, [picked[1].photo]).batch(picked[1:], config, random.Random(5))
    assert torch.equal(alone.conditioning.embeds[0], captions[picked[1].photo]), "a run of one photo has no other caption"


def test_captions_are_swapped_from_a_step_on_and_nothing_else_changes_there(run: RunDir):
    config = run.config.model_copy(update={"caption_swap_rate": 0.5, "caption_swap_after": 2, "preservation_rate": 0.5})
    run._write_config(config)
    encode.run(run)
    late, never = trainer_of(run), trainer_of(run, caption_swap_rate=0.0)
    for index in range(4):
        batch, plain = (fit._batch(trainer, index)[0] for trainer in (late, never))
        assert batch.swapped == (index >= 2) and batch.preserved == plain.preserved == 1 and plain.swapped == 0
        assert batch.photos == plain.photos and torch.equal(batch.conditioning.embeds[0], plain.conditioning.embeds[0])
        assert torch.equal(batch.conditioning.embeds, plain.conditioning.embeds) == (index < 2)


@pytest.mark.parametrize(
    ("preservation", "swap", "size"), [(0.25, 0.25, 4), (0.25, 0.25, 1), (0.3, 0.3, 2), (0.1, 0.6, 3), (0.5, 0.9, 2), (0, 0.4, 1), (0.9, 0.9, 1)]
)
def test_shares_of_a_batch_are_what_the_rates_say_and_twins_where_they_are_equal(preservation: float, swap: float, size: int):
    config = TrainConfig(trigger_word="TOK", preservation_rate=preservation, caption_swap_rate=swap)
    found = [counts(config, size, i / 1000, 0) for i in range(1000)]
    assert sum(p for p, _ in found) / (1000 * size) == pytest.approx(preservation, abs=0.01)
    assert all(p + s <= size for p, s in found)
    if preservation + swap <= 1:
        assert sum(s for _, s in found) / (1000 * size) == pytest.approx(swap, abs=0.01)
    if preservation == swap and size > 1:
        assert all(p == s for p, s in found)


CAPTIONS = [(0.0, 0.5), (0.25, 0.25), (0.5, 0.25), (0.25, 0.5), (0.5, 0.5), (0.75, 0.25)]


@pytest.mark.parametrize(("preservation", "swap"), CAPTIONS)
def test_the_target_under_another_caption_is_what_the_photo_adds_to_the_base_there(run: RunDir, preservation: float, swap: float):
    config = run.config.model_copy(update={"preservation_rate": preservation, "caption_swap_rate": swap, "sigma_sampling": "uniform"})
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    picked = (trainer.sampler.batch(0) * 2)[:4]
    whole = trainer.cache.batch(picked, config, random.Random(2))
    preserved, swapped = int(4 * preservation), int(4 * swap)
    assert (whole.preserved, whole.swapped) == (preserved, swapped)
    # One pass of the base for what preserves and two for what is swapped, but for twins one of them is the same.
    assert len(whole.asked) == preserved + (swapped if preserved == swapped else 2 * swapped)
    noise, sigma = objective.drawn(trainer, whole, torch.Generator().manual_seed(1))
    base = trainer.family.transformer(torch.device("cpu"), torch.float32)
    stems = {photo: trainer.cache.conditioning([photo]).embeds for photo in trainer.sampler.photos}

    @torch.no_grad()
    def of_base(i: int, stem: str) -> torch.Tensor:
        """The base's prediction for a caption with the class phrase, at the noise of an item."""
        x = flow.add_noise(flow.pack(whole.latents[i : i + 1]), flow.pack(noise[i : i + 1]), sigma[i : i + 1])
        ids = flow.image_ids(*whole.latents.shape[2:])
        return trainer.family.velocity(base, x, sigma[i : i + 1], 1.0, trainer.cache.conditioning([f"{stem}-class"]), ids)[0]

    targets = []
    for i, photo in enumerate(whole.photos):
        target = flow.pack(noise[i : i + 1])[0] - flow.pack(whole.latents[i : i + 1])[0]
        if i < preserved:
            target = of_base(i, photo)
        elif i >= 4 - swapped:
            [other] = [stem for stem, text in stems.items() if torch.equal(text[0], whole.conditioning.embeds[i])]
            change = of_base(i, other) - of_base(i, photo)
            assert other != photo and change.abs().mean() > 1e-3
            target = target + change
        targets.append(target)

    with torch.no_grad():
        for p in trainer.state.parameters:  # what the LoRA has learned is not in the target
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        trainer.transformer.eval()
        predicted = trainer.family.velocity(
            trainer.transformer,
            flow.add_noise(flow.pack(whole.latents), flow.pack(noise), sigma),
            sigma,
            1.0,
            whole.conditioning,
            flow.image_ids(*whole.latents.shape[2:]),
        )
        expected = (predicted - torch.stack(targets)).square()
        found = objective.squared_error(trainer, whole, noise, sigma)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        for index in range(2):  # each process knows the targets of its part, wherever the twins are
            part = part_of(trainer, index)
            batch: Batch = trainer.cache.batch(picked, config, random.Random(2), part)
            own = objective.drawn(trainer, batch, torch.Generator().manual_seed(1))
            torch.testing.assert_close(objective.squared_error(trainer, batch, *own), expected[part], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preservation", [0.0, 0.25])
def test_another_caption_is_learned_under_much_noise(run: RunDir, preservation: float):
    config = run.config.model_copy(update={"caption_swap_rate": 0.25, "preservation_rate": preservation, "sigma_sampling": "uniform"})
    run._write_config(config)
    encode.run(run)
    trainer = trainer_of(run)
    batch = trainer.cache.batch((trainer.sampler.batch(0) * 2)[:4], config, random.Random(0))
    sigmas = torch.stack([objective.drawn(trainer, batch, torch.Generator().manual_seed(seed))[1] for seed in range(300)])
    assert sigmas[:, 3].mean() == pytest.approx(8 / 9, abs=0.03), "the mean of the highest of eight"
    assert sigmas[:, 1:3].mean() == pytest.approx(0.5, abs=0.06)
