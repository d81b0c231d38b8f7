"""The flow maths and the sampling loop, against diffusers' own pipeline."""

import pytest
import torch
from diffusers import FluxPipeline

from lorabooth import flow, sampling
from lorabooth.families import load_family


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
