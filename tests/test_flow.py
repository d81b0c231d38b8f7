"""The flow maths and the sampling loop, against diffusers' own pipeline."""

from itertools import pairwise

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

from lorabooth import flow, sampling
from lorabooth.families import load_family
from lorabooth.families.flux1 import Conditioning


def test_pack_and_ids_are_those_of_the_pipeline() -> None:
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(flow.pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(flow.image_ids(6, 10), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


def test_unpack_undoes_pack() -> None:
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(flow.unpack(flow.pack(latents), 6, 10), latents)


def test_velocity_carries_the_path_from_noise_to_data() -> None:
    x_0, noise = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    sigma = torch.tensor([0.2, 0.5, 1.0])
    x = flow.add_noise(x_0, noise, sigma)
    torch.testing.assert_close(x - sigma.view(-1, 1, 1) * flow.velocity(x_0, noise), x_0)
    torch.testing.assert_close(flow.euler_step(noise, flow.velocity(x_0, noise), 1.0, 0.0), x_0)


def test_logit_normal_has_its_median_at_one_half() -> None:
    sigma = flow.logit_normal(20_000, generator=torch.Generator().manual_seed(0))
    assert sigma.min() > 0 and sigma.max() < 1
    assert abs(sigma.median().item() - 0.5) < 0.01
    assert abs(torch.logit(sigma).std().item() - 1) < 0.02


@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096])
def test_schedule_is_that_of_flux_dev(tokens: int) -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=calculate_shift(tokens))
    torch.testing.assert_close(flow.schedule(12, flow.resolution_mu(tokens)), scheduler.sigmas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 160)])
def test_sampling_gives_the_picture_of_plain_flux_pipeline(mini_pipe: FluxPipeline, width: int, height: int) -> None:
    family = load_family("mini")
    prompt, steps, guidance, seed = "a person in a red hoodie, smiling", 6, 3.5, 11
    plain = mini_pipe(
        prompt, width=width, height=height, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=48,
        generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).images  # fmt: skip
    cpu = torch.device("cpu")
    conditioning = family.encode_prompts(family.text_encoders(cpu, torch.float32), [prompt])
    transformer = family.transformer(cpu, torch.float32)
    ours = sampling.denoise(family, transformer, conditioning, sampling.noise(seed, width, height), steps, guidance)
    torch.testing.assert_close(flow.pack(ours), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_a_start_from_a_picture_gives_that_of_diffusers_image_to_image(mini_pipe: FluxPipeline, strength: float) -> None:
    family, cpu = load_family("mini"), torch.device("cpu")
    conditioning = family.encode_prompts(family.text_encoders(cpu, torch.float32), ["a person in a red hoodie"])
    transformer, drawn, picture = family.transformer(cpu, torch.float32), sampling.noise(3, 64, 96), torch.randn(1, 16, 12, 8)
    ours = sampling.denoise(family, transformer, conditioning, drawn, 7, 3.5, known=sampling.Known(picture, strength))
    plain = FluxImg2ImgPipeline(**mini_pipe.components)
    plain.set_progress_bar_config(disable=True)
    first = 7 - sampling.steps_done(7, strength)
    sigma = family.sigmas(7, 24)[first]
    theirs = plain(
        "a person in a red hoodie", image=torch.zeros(1, 3, 96, 64), strength=strength, width=64, height=96, num_inference_steps=7, guidance_scale=3.5,
        latents=flow.pack((1 - sigma) * picture + sigma * drawn), max_sequence_length=48, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(flow.pack(ours), theirs, rtol=1e-4, atol=1e-4)


def test_a_mask_keeps_what_it_does_not_name_and_guidance_takes_the_prompt_that_is_not_wanted_away() -> None:
    family, cpu = load_family("mini"), torch.device("cpu")
    encoded = family.encode_prompts(family.text_encoders(cpu, torch.float32), ["a person in a red hoodie", "glasses"])
    wanted, unwanted = (Conditioning(encoded.embeds[i : i + 1], encoded.pooled[i : i + 1]) for i in range(2))
    transformer, drawn, picture = family.transformer(cpu, torch.float32), sampling.noise(3, 64, 64), torch.randn(1, 16, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 4:] = 1
    ours = sampling.denoise(family, transformer, wanted, drawn, 4, 3.5, None, sampling.Negative(unwanted, 2.0), sampling.Known(picture, 0.5, mask))
    # The same, stated without packing and in the words of the papers.
    x, sigmas = None, family.sigmas(4, 16)[2:]
    for sigma, following in pairwise(sigmas):
        x = (1 - sigma) * picture + sigma * drawn if x is None else x

        def velocity(conditioning: Conditioning, x: torch.Tensor = x, sigma: torch.Tensor = sigma) -> torch.Tensor:
            with torch.no_grad():
                return flow.unpack(family.velocity(transformer, flow.pack(x), sigma[None], 3.5, conditioning, flow.image_ids(8, 8)), 8, 8)

        guided = velocity(unwanted) + 2.0 * (velocity(wanted) - velocity(unwanted))
        x = mask * (x + (following - sigma) * guided) + (1 - mask) * ((1 - following) * picture + following * drawn)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[..., :2, :], picture[..., :2, :])
